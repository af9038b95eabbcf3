"""The pair: its function, its surface, and changing its rank in place."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.layers import BasisPair, BasisScalingConv, named_pairs
from bsdp.plain_layers import from_matrix, layer_outputs, matrix_of, to_matrix, weight_of
from tests.helpers.cases import CASES_BY_NAME, LAYER_CASES, LayerCase
from tests.helpers.compare import assert_same_state, relative_error, snapshot
from tests.helpers.nets import make_input, make_net

KINDS = ["first_conv", "groups", "conv1d_groups", "conv3d", "linear_tokens"]


def pair_of(name: str, **options: object) -> tuple[nn.Module, BasisPair, Tensor]:
    """A layer of the table in float64, its pair and an input."""
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    return layer, bsdp.pair_from_layer(layer), torch.randn(case.input_shape, dtype=torch.float64)


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_product_of_the_pair_is_the_original_weight(case: LayerCase) -> None:
    layer = case.build().double()
    pair = bsdp.pair_from_layer(layer)
    assert pair.weight.shape == layer.weight.shape
    assert relative_error(pair.weight, layer.weight) < 1e-12
    assert torch.equal(from_matrix(matrix_of(layer), layer.weight.shape[2:], transposed=pair.transposed), layer.weight)
    outputs = layer_outputs(layer)
    assert pair.rank == pair.full_rank == min(layer.weight.numel() // outputs, outputs // pair.groups)


@pytest.mark.parametrize("name", KINDS)
def test_product_follows_the_scales_and_computes_what_forward_does(name: str) -> None:
    layer, pair, inputs = pair_of(name)
    nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
    with torch.no_grad():
        layer.weight.copy_(pair.weight)
    assert relative_error(pair(inputs), layer(inputs)) < 1e-12


def test_product_is_differentiable_in_the_scales() -> None:
    _, pair, _ = pair_of("groups")
    pair.weight.square().sum().backward()
    assert pair.scaling.delta.grad is not None
    assert pair.scaling.delta.grad.abs().min() > 0


def test_pair_has_the_attributes_of_its_convolution() -> None:
    layer = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=2, groups=2, padding_mode="circular")
    pair = BasisPair(layer)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(pair, name) == getattr(layer, name)
    assert (pair.bias.shape, pair.weight.shape) == (layer.bias.shape, layer.weight.shape)


def test_pair_has_the_attributes_of_its_linear_layer() -> None:
    pair = BasisPair(nn.Linear(7, 5), rank=2)
    assert (pair.in_features, pair.out_features, pair.rank, pair.full_rank) == (7, 5, 2, 5)
    assert pair.weight.shape == (5, 7)
    assert not hasattr(pair, "in_channels")


def test_nothing_lies_between_the_layers_and_the_bias_is_on_the_second() -> None:
    layer, pair, inputs = pair_of("first_conv")
    assert list(dict(pair.named_children())) == ["basis", "scaling"]
    assert pair.basis.bias is None
    assert torch.equal(pair.bias, layer.bias)
    assert torch.equal(pair(inputs), pair.scaling(pair.basis(inputs)))


def test_only_the_scales_train_and_they_start_at_one() -> None:
    _, pair, _ = pair_of("groups")
    assert [name for name, p in pair.named_parameters() if p.requires_grad] == ["scaling.delta"]
    assert torch.equal(pair.scale, torch.ones(12, dtype=torch.float64))
    assert torch.equal(pair.scaling.delta, torch.zeros(12, dtype=torch.float64))


def test_state_dict_keys_are_the_documented_ones() -> None:
    _, pair, _ = pair_of("no_bias")
    assert sorted(pair.state_dict()) == [
        *("basis.weight", "scaling.bias", "scaling.delta", "scaling.sigma", "scaling.weight"),
    ]
    assert pair.scaling.weight.shape == (12, 12, 1, 1)


def test_ranks_show_in_print() -> None:
    text = str(BasisPair(nn.Conv2d(4, 8, 3, groups=2), rank=3))
    assert "rank=3, full_rank=4" in text
    assert "rank=3, out_channels=8, groups=2" in text


def test_needs_bias_when_the_layer_had_one_or_a_mean_moved_there() -> None:
    assert BasisPair(nn.Conv2d(4, 8, 3)).needs_bias
    pair = BasisPair(nn.Conv2d(4, 8, 3, bias=False))
    assert not pair.needs_bias
    pair.scaling.bias.data[3] = 0.5
    assert pair.needs_bias


def test_a_new_pair_takes_device_dtype_and_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    pair = BasisPair(nn.Conv2d(4, 8, 3, device="meta", dtype=torch.float16))
    assert {p.device.type for p in pair.parameters()} == {"meta"}
    assert {t.dtype for t in pair.state_dict().values()} == {torch.float16}
    layer = nn.Linear(4, 4)
    after_layer = torch.random.get_rng_state()
    BasisPair(layer)
    assert torch.equal(torch.random.get_rng_state(), after_layer)
    assert not torch.equal(before, after_layer)


# Oracle 11
def test_one_optimizer_step_moves_the_scales_and_nothing_else() -> None:
    net = make_net("residual", dtype=torch.float32)
    bsdp.decompose(net)
    bsdp.freeze(net)
    before = snapshot(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    net(make_input("residual", dtype=torch.float32)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.scaling.delta" for name in named_pairs(net)}


def test_weight_decay_alone_pulls_the_scales_to_one() -> None:
    _, pair, _ = pair_of("strided")
    nn.init.constant_(pair.scaling.delta, 0.5)
    optimizer = torch.optim.SGD([pair.scaling.delta], lr=0.5, weight_decay=1.0)
    pair.scaling.delta.grad = torch.zeros_like(pair.scaling.delta)
    optimizer.step()
    assert torch.equal(pair.scale, torch.full((8,), 1.25, dtype=torch.float64))


@pytest.mark.parametrize("name", KINDS)
def test_keep_leaves_the_sum_of_the_kept_terms(name: str) -> None:
    _, pair, inputs = pair_of(name)
    nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
    rank, groups = pair.rank, pair.groups
    local = torch.arange(0, rank, 2)
    keep = torch.cat([local + g * rank for g in range(groups)])
    full = copy.deepcopy(pair)
    mask = torch.ones(groups * rank, dtype=torch.bool)
    mask[keep] = False
    full.scaling.delta.data[mask] = -1.0
    pair.keep(keep)
    assert pair.rank == len(local)
    assert pair.basis.weight.shape[0] == len(keep)
    assert torch.equal(pair.scaling.sigma, full.scaling.sigma[keep])
    assert relative_error(pair(inputs), full(inputs)) < 1e-12


def test_keep_may_keep_other_bases_in_every_group() -> None:
    _, pair, _ = pair_of("groups")  # 2 groups of rank 6
    grouped = to_matrix(pair.weight.detach(), 2)
    outer = torch.einsum("gor,grf->grof", to_matrix(pair.scaling.weight, 2), to_matrix(pair.basis.weight, 2))
    pair.keep(torch.tensor([0, 5, 6 + 1, 6 + 2]))
    expected = torch.stack([outer[0, [0, 5]].sum(0), outer[1, [1, 2]].sum(0)])
    assert relative_error(to_matrix(pair.weight, 2), expected) < 1e-12
    assert relative_error(to_matrix(pair.weight, 2), grouped) > 0.1


def test_keep_keeps_the_identity_of_all_parameters_and_drops_stale_gradients() -> None:
    _, pair, inputs = pair_of("first_conv")
    pair(inputs).sum().backward()
    before = {name: id(p) for name, p in pair.named_parameters()}
    pair.keep(torch.tensor([0, 3, 4]))
    assert {name: id(p) for name, p in pair.named_parameters()} == before
    assert pair.scaling.delta.grad is None
    assert pair.basis.out_channels == 3
    assert [p.requires_grad for p in pair.parameters()] == [False, False, True, False]


def test_keep_then_backward_while_the_old_loss_is_still_held() -> None:
    # A held graph keeps the gradient accumulator of delta, which remembers the old shape.
    _, pair, inputs = pair_of("first_conv")
    loss = pair(inputs).square().sum()
    loss.backward()
    pair.keep(torch.tensor([1, 2]))
    pair(inputs).square().sum().backward()
    assert pair.scaling.delta.grad is not None
    assert pair.scaling.delta.grad.shape == (2,)
    assert loss.requires_grad


def test_keeping_everything_changes_nothing() -> None:
    _, pair, _ = pair_of("groups")
    before = snapshot(pair)
    pair.keep(torch.arange(12))
    assert_same_state(pair, before)


@pytest.mark.parametrize(
    "indices",
    [[0, 1, 6], [0, 1, 2, 6], [6, 7, 0, 1], [1, 0, 6, 7], [0, 0, 6, 7], [0, 1, 6, 12], [-1, 0, 6, 7], []],
    ids=["odd", "uneven", "groups_swapped", "unsorted", "twice", "beyond", "negative", "none"],
)
def test_keep_refuses_indices_that_do_not_fit_the_groups(indices: list[int]) -> None:
    _, pair, _ = pair_of("groups")
    before = snapshot(pair)
    with pytest.raises(ValueError, match="`indices` must"):
        pair.keep(torch.tensor(indices, dtype=torch.long))
    assert_same_state(pair, before)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("own", "loaded"), [(2, 4), (4, 2), (3, 3)])
def test_loading_a_state_dict_of_another_rank_resizes(name: str, own: int, loaded: int) -> None:
    layer, source, inputs = pair_of(name)
    rank = source.rank
    full = {r: torch.cat([torch.arange(r) + g * rank for g in range(source.groups)]) for r in (own, loaded)}
    target = bsdp.pair_from_layer(layer)
    source.keep(full[min(loaded, rank)])
    target.keep(full[min(own, rank)])
    nn.init.uniform_(source.scaling.delta, -0.5, 0.5)
    identity = [id(p) for p in target.parameters()]
    target.load_state_dict(source.state_dict())
    assert target.rank == min(loaded, rank)
    assert [id(p) for p in target.parameters()] == identity
    assert torch.equal(target(inputs), source(inputs))
    assert repr(target) == repr(source)


def test_loading_resizes_pairs_inside_a_model_and_the_model_trains_on() -> None:
    net = make_net("conv")
    bsdp.decompose(net)
    small = copy.deepcopy(net)
    for pair in named_pairs(small).values():
        pair.keep(torch.arange(3))
    state = small.state_dict()
    net.load_state_dict(state)
    inputs = make_input("conv")
    assert torch.equal(net(inputs), small(inputs))
    net(inputs).sum().backward()
    assert named_pairs(net)["conv1"].scaling.delta.grad is not None


def test_loading_with_assign_resizes_too() -> None:
    _, pair, inputs = pair_of("strided")
    other = copy.deepcopy(pair)
    other.keep(torch.tensor([0, 2]))
    pair.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(pair(inputs), other(inputs))


def test_loading_refuses_a_rank_that_the_layer_cannot_have() -> None:
    _, pair, _ = pair_of("strided")  # full rank 8
    state = pair.state_dict()
    state["scaling.weight"] = torch.zeros(8, 9, 1, 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for scaling.weight"):
        pair.load_state_dict(state)
    assert pair.rank == 8


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_resize_refuses_a_rank_out_of_range(rank: int) -> None:
    _, pair, _ = pair_of("strided")
    with pytest.raises(ValueError, match="between 1 and the full rank 8"):
        pair.resize(rank)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_decomposed_model_are_whole_and_independent(how: str) -> None:
    net = make_net("grouped")
    bsdp.decompose(net)
    named_pairs(net)["grouped"].keep(torch.tensor([0, 2, 6, 9]))
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    inputs = make_input("grouped")
    expected = net(inputs)
    assert torch.equal(other(inputs), expected)
    named_pairs(other)["grouped"].keep(torch.tensor([0, 2]))
    assert torch.equal(net(inputs), expected)


def test_state_dict_round_trips_through_weights_only_loading() -> None:
    net = make_net("conv")
    bsdp.decompose(net)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    net.load_state_dict(torch.load(buffer, weights_only=True))


def test_named_pairs_gives_each_pair_once_in_module_order() -> None:
    net = make_net("shared")
    bsdp.decompose(net)
    assert list(named_pairs(net)) == ["first"]
    assert named_pairs(nn.ReLU()) == {}
    alone = BasisPair(nn.Linear(3, 3))
    assert named_pairs(alone) == {"": alone}


def test_scaling_layer_alone_is_a_pointwise_convolution() -> None:
    layer = BasisScalingConv(6, 2, groups=2, dims=1, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.delta)
    nn.init.normal_(layer.bias)
    features = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.empty(3, 6, 5, dtype=torch.float64)
    for o in range(6):
        first = 2 * (o // 3)
        terms = [layer.weight[o, i, 0] * layer.scale[first + i] * features[:, first + i] for i in range(2)]
        expected[:, o] = sum(terms) + layer.bias[o]
    assert relative_error(layer(features), expected) < 1e-12


def test_set_factors_writes_all_of_them_and_puts_the_scales_back_to_one() -> None:
    layer, pair, inputs = pair_of("groups")
    other = BasisPair(layer)
    nn.init.constant_(other.scaling.delta, 0.5)
    identity = [id(p) for p in other.parameters()]
    coefficients = to_matrix(pair.scaling.weight.detach(), 2)
    other.set_factors(to_matrix(pair.basis.weight, 2), coefficients, pair.scaling.sigma.view(2, -1))
    other.scaling.bias.data.copy_(pair.bias)
    assert_same_state(other, pair.state_dict())
    assert torch.equal(other(inputs), pair(inputs))
    assert [id(p) for p in other.parameters()] == identity


@pytest.mark.parametrize("name", ["first_conv", "groups"])
def test_channels_last_pairs_are_cut_and_loaded_like_others(name: str) -> None:
    _, pair, inputs = pair_of(name)
    other = copy.deepcopy(pair).to(memory_format=torch.channels_last)
    keep = torch.cat([torch.arange(1, 4) + g * pair.rank for g in range(pair.groups)])
    for cut in (pair, other):
        cut.keep(keep)
    assert relative_error(other(inputs.to(memory_format=torch.channels_last)), pair(inputs)) < 1e-12
    other.resize(2)
    other.load_state_dict(pair.state_dict())
    assert relative_error(other(inputs), pair(inputs)) < 1e-12


def test_weight_of_a_pair_is_its_product() -> None:
    layer, pair, _ = pair_of("pointwise")
    assert relative_error(weight_of(pair), weight_of(layer)) < 1e-12
