"""What trains after `freeze`, and which batch norms stay in eval mode."""

import pytest
import torch
from torch import nn

import bsdp
from bsdp.freezing import BATCH_NORM_MODES
from tests.helpers.compare import decomposed
from tests.helpers.nets import make_input, make_net

SCALES = {"conv1.scaling.delta", "conv2.scaling.delta"}
AFFINE = {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
HEAD = {"head.weight", "head.bias"}
BIASES = {"conv1.scaling.bias", "conv2.scaling.bias"}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("batch_norm", "expected"),
    [("frozen", SCALES), ("stats", SCALES), ("affine", SCALES | AFFINE), ("all", SCALES | AFFINE)],
)
def test_batch_norm_modes(batch_norm: str, expected: set[str]) -> None:
    net = decomposed(make_net("conv"))
    bsdp.freeze(net, batch_norm=batch_norm)
    assert trainable(net) == expected
    fixed = bsdp.fixed_batch_norms(net, batch_norm=batch_norm)
    assert fixed == ([net.bn1, net.bn2] if batch_norm in ("frozen", "affine") else [])


@pytest.mark.parametrize("batch_norm", BATCH_NORM_MODES)
def test_statistics_and_affine_terms_move_exactly_when_the_mode_says_so(batch_norm: str) -> None:
    net = decomposed(make_net("conv"))
    bsdp.freeze(net, batch_norm=batch_norm)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    for module in bsdp.fixed_batch_norms(net, batch_norm=batch_norm):
        module.eval()
    net(make_input("conv")).square().sum().backward()
    optimizer.step()
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {"bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"}
    assert (statistics <= moved) is (batch_norm in ("stats", "all"))
    assert ({"bn1.weight", "bn1.bias"} <= moved) is (batch_norm in ("affine", "all"))
    assert moved.isdisjoint(statistics) or batch_norm in ("stats", "all")
    assert moved >= SCALES


def test_the_head_trains_on_when_it_is_named() -> None:
    net = decomposed(make_net("conv"))
    bsdp.freeze(net, trainable=["head"])
    assert trainable(net) == SCALES | HEAD


def test_trainable_modules_keep_what_they_had_frozen() -> None:
    net = decomposed(make_net("conv"))
    net.head.bias.requires_grad_(False)
    bsdp.freeze(net, trainable=["head"])
    assert trainable(net) == SCALES | {"head.weight"}


def test_biases_of_the_pairs_are_a_switch() -> None:
    net = decomposed(make_net("conv"))
    bsdp.freeze(net, train_bias=True)
    assert trainable(net) == SCALES | BIASES
    bsdp.freeze(net)
    assert trainable(net) == SCALES


def test_freeze_also_freezes_bases_that_something_unfroze() -> None:
    net = decomposed(make_net("conv")).requires_grad_(True)
    bsdp.freeze(net)
    assert trainable(net) == SCALES


def test_freeze_makes_scales_train_that_something_froze() -> None:
    net = decomposed(make_net("conv")).requires_grad_(False)
    bsdp.freeze(net)
    assert trainable(net) == SCALES


def test_a_trainable_pattern_may_name_a_block_with_pairs_and_batch_norms() -> None:
    net = nn.Sequential(decomposed(make_net("conv")), decomposed(make_net("conv")))
    net[1].requires_grad_(True)
    bsdp.freeze(net, trainable=["1"])
    names = {name.partition(".")[0] for name in trainable(net)}
    assert names == {"0", "1"}
    assert {f"1.{name}" for name in AFFINE | HEAD | {"conv1.basis.weight"}} <= trainable(net)
    assert {name for name in trainable(net) if name.startswith("0.")} == {f"0.{name}" for name in SCALES}
    assert bsdp.fixed_batch_norms(net, trainable=["1"]) == [net[0].bn1, net[0].bn2]


def test_a_module_with_two_names_counts_as_named_by_either() -> None:
    net = make_net("shared")
    bsdp.freeze(net, trainable=["second", "head"])
    assert "first.weight" in trainable(net)


def test_other_layers_and_parameters_of_the_model_itself_are_frozen() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.norm = nn.LayerNorm(3)
            self.layer = nn.Linear(3, 3)

    net = Tokens()
    bsdp.freeze(net)
    assert trainable(net) == set()
    assert not net.token.requires_grad
    net = Tokens()
    bsdp.freeze(net, trainable=["token", "layer.bias"])
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {"token", "layer.bias"}


def test_a_bias_of_a_pair_trains_on_when_it_is_named() -> None:
    pair = bsdp.pair_from_layer(nn.Linear(4, 4)).requires_grad_(True)
    bsdp.freeze(pair, trainable=["scaling.bias"])
    assert trainable(pair) == {"scaling.delta", "scaling.bias"}


def test_a_model_that_is_itself_a_pair_keeps_its_scales() -> None:
    pair = bsdp.pair_from_layer(nn.Linear(4, 4))
    bsdp.freeze(pair)
    assert trainable(pair) == {"scaling.delta"}


def test_batch_norms_without_statistics_need_no_eval_mode() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3))
    assert bsdp.fixed_batch_norms(net) == [net[0]]
    assert bsdp.fixed_batch_norms(net, trainable=["0"]) == []


@pytest.mark.parametrize("function", [bsdp.freeze, bsdp.fixed_batch_norms])
def test_settings_that_are_not_allowed_are_refused_and_nothing_changes(function: object) -> None:
    net = decomposed(make_net("conv"))
    before = trainable(net)
    with pytest.raises(ValueError, match="`batch_norm` must be one of 'frozen', 'stats', 'affine', 'all', got 'eval'"):
        function(net, batch_norm="eval")  # type: ignore[operator]
    with pytest.raises(ValueError, match="`trainable` has the pattern 'classifier'"):
        function(net, trainable=["classifier"])  # type: ignore[operator]
    with pytest.raises(ValueError, match="`trainable` must be a list"):
        function(net, trainable="head")  # type: ignore[operator]
    assert trainable(net) == before
