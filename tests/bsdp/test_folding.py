"""Folding into plain layers: same outputs, the cheaper form, and the original left alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bsdp
from bsdp.folding import empty_folded, refuse_pairs, unfold_into
from bsdp.layers import BasisPair, named_pairs
from tests.helpers.cases import LAYER_CASES, LayerCase
from tests.helpers.compare import (
    assert_same_state,
    decomposed,
    half_ranks,
    keep_ranks,
    randomize_scales,
    relative_error,
    snapshot,
)
from tests.helpers.nets import NETS, make_input, make_net


def is_plain(model: nn.Module) -> bool:
    """No module of ours is left."""
    return not any(type(m).__module__.startswith("bsdp") for m in model.modules())


# Oracle 6
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_a_folded_pair_has_the_outputs_of_the_pair_at_every_rank(case: LayerCase) -> None:
    layer = case.build().double()
    inputs = torch.randn(case.input_shape, dtype=torch.float64)
    full = bsdp.layer_cost(layer).full_rank
    for rank in {1, max(1, full // 3), full}:
        pair = bsdp.pair_from_layer(layer)
        nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
        pair.keep(torch.cat([torch.arange(rank) + g * pair.rank for g in range(pair.groups)]))
        folded = bsdp.fold_pair(pair)
        assert relative_error(folded(inputs), pair(inputs)) < 1e-12
        assert isinstance(folded, nn.Sequential) is (bsdp.layer_cost(layer).kind(rank) == "pair")
        assert is_plain(folded)


# Oracle 6
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_folding_an_untouched_pair_gives_the_original_layer_back(case: LayerCase) -> None:
    layer = case.build().double()
    folded = bsdp.fold_pair(bsdp.pair_from_layer(layer))
    assert type(folded) is type(layer)
    assert repr(folded) == repr(layer)
    assert relative_error(folded.weight, layer.weight) < 1e-12
    assert (folded.bias is None) is (layer.bias is None)


# Oracle 7
@pytest.mark.parametrize(
    ("kernel", "rank", "form"), [(3, 57, "pair"), (3, 58, "fused"), (1, 31, "pair"), (1, 32, "fused")]
)
def test_the_cheaper_form_wins_and_fused_when_both_cost_the_same(kernel: int, rank: int, form: str) -> None:
    pair = BasisPair(nn.Conv2d(64, 64, kernel, bias=False), rank=rank)
    for parameter in pair.parameters():
        nn.init.zeros_(parameter)
    folded = bsdp.fold_pair(pair)
    parameters = sum(p.numel() for p in folded.parameters())
    assert parameters == (rank * (64 * kernel**2 + 64) if form == "pair" else 64 * 64 * kernel**2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_has_the_outputs_of_the_decomposed_one(name: str, dtype: torch.dtype) -> None:
    net, inputs = decomposed(make_net(name, dtype=dtype)), make_input(name, dtype=dtype)
    randomize_scales(net)
    for ranks in (None, half_ranks(net), dict.fromkeys(named_pairs(net), 1)):
        if ranks is not None:
            keep_ranks(net, ranks)
        folded = bsdp.fold(net)
        assert is_plain_but_for_the_net(folded)
        assert relative_error(folded(inputs), net(inputs)) < (1e-12 if dtype == torch.float64 else 1e-5)


def is_plain_but_for_the_net(model: nn.Module) -> bool:
    return all(is_plain(child) for child in model.children())


def test_the_given_model_is_left_alone_and_shares_nothing_with_the_copy() -> None:
    net = decomposed(make_net("conv"))
    keep_ranks(net, {"conv1": 8, "conv2": 4})  # one of each form
    before = snapshot(net)
    modules = list(net.modules())
    folded = bsdp.fold(net)
    with torch.no_grad():
        for tensor in (*folded.parameters(), *folded.buffers()):
            tensor.zero_()
    assert_same_state(net, before)
    assert list(net.modules()) == modules


def test_folding_takes_no_random_numbers() -> None:
    net = decomposed(make_net("grouped"))
    state = torch.random.get_rng_state()
    bsdp.fold(net)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shared_pairs_stay_shared() -> None:
    folded = bsdp.fold(decomposed(make_net("shared")))
    assert folded.first is folded.second
    assert isinstance(folded.first, nn.Conv2d)


def test_a_model_without_pairs_is_simply_copied() -> None:
    net, inputs = make_net("conv"), make_input("conv")
    folded = bsdp.fold(net)
    assert folded is not net
    assert torch.equal(folded(inputs), net(inputs))


def test_a_model_that_is_a_pair_is_folded_too() -> None:
    pair = bsdp.pair_from_layer(nn.Linear(6, 6).double())
    folded = bsdp.fold(pair)
    inputs = torch.randn(2, 6, dtype=torch.float64)
    assert type(folded) is nn.Linear
    assert relative_error(folded(inputs), pair(inputs)) < 1e-12


def test_every_module_keeps_its_mode_and_every_parameter_trains() -> None:
    net = decomposed(make_net("conv"))
    net.conv1.train()
    bsdp.freeze(net)
    folded = bsdp.fold(net)
    assert (folded.training, folded.conv1.training, folded.conv2.training) == (False, True, False)
    assert all(p.requires_grad for p in folded.parameters())
    assert not net.bn1.weight.requires_grad


def test_the_scales_of_a_pair_whose_bias_is_unused_fold_without_a_bias() -> None:
    net = decomposed(make_net("conv"))  # convolutions without biases
    assert bsdp.fold(net).conv1.bias is None
    net.conv1.scaling.bias.data[0] = 1.0
    assert bsdp.fold(net).conv1.bias[0] == 1.0
    keep_ranks(net, {"conv1": 2, "conv2": 2})
    folded = bsdp.fold(net)
    assert [layer.bias is None for layer in folded.conv1] == [True, False]
    assert [layer.bias is None for layer in folded.conv2] == [True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    pair = bsdp.pair_from_layer(nn.Linear(40, 30).to(dtype))
    nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
    exact = copy.deepcopy(pair).double()
    fused = bsdp.fold_pair(pair)
    assert torch.equal(fused.weight, exact.weight.to(dtype))
    pair.keep(torch.arange(4))
    exact.keep(torch.arange(4))
    assert torch.equal(bsdp.fold_pair(pair)[1].weight, exact.scaling.scaled_weight.to(dtype))


def test_hooks_on_the_parts_of_a_pair_stay_behind() -> None:
    net, inputs = decomposed(make_net("conv")), make_input("conv")
    calls: list[int] = []
    net.conv1.basis.register_forward_hook(lambda m, i, o: calls.append(1))
    bsdp.fold(net)(inputs)
    assert calls == []


@pytest.mark.parametrize("rank", [1, 99], ids=["pair", "fused"])
def test_hooks_that_change_what_a_layer_takes_and_gives_are_copied(rank: int) -> None:
    net, inputs = make_net("residual"), make_input("residual")
    net.left.register_forward_hook(lambda m, i, kwargs, o: 3 * o, with_kwargs=True)
    bsdp.decompose(net)
    handle = net.left.register_forward_pre_hook(lambda m, i: (2 * i[0],))
    keep_ranks(net, dict.fromkeys(named_pairs(net), rank))
    folded, expected = bsdp.fold(net), net(inputs)
    assert isinstance(folded.left, nn.Sequential) is (rank == 1)
    assert relative_error(folded(inputs), expected) < 1e-12
    handle.remove()  # of the given model only
    assert relative_error(net(inputs), expected) > 1e-6
    assert relative_error(folded(inputs), expected) < 1e-12


def test_a_gradient_hook_is_copied() -> None:
    net, inputs = decomposed(make_net("conv")), make_input("conv")
    calls: list[nn.Module] = []
    net.conv1.register_full_backward_hook(lambda m, gi, go: calls.append(m))
    folded = bsdp.fold(net)
    folded(inputs.requires_grad_()).sum().backward()
    assert calls == [folded.conv1]


class Shift:
    """Adds a parameter of another layer: a hook that belongs to a model."""

    def __init__(self, other: nn.Linear) -> None:
        self.other = other

    def hook(self, module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + self.other.bias[0]


def test_what_a_hook_knows_of_the_model_is_of_the_copy() -> None:
    net, inputs = decomposed(make_net("conv")), make_input("conv")
    net.conv1.register_forward_hook(Shift(net.head).hook)
    folded, expected = bsdp.fold(net), net(inputs)
    assert relative_error(folded(inputs), expected) < 1e-12
    net.head.bias.data += 1.0
    assert relative_error(folded(inputs), expected) < 1e-12
    folded.head.bias.data += 1.0
    assert relative_error(folded(inputs), net(inputs)) < 1e-12


def test_a_model_that_takes_a_folded_structure_keeps_its_hooks() -> None:
    nets = [make_net("residual"), make_net("residual")]
    for net in nets:
        net.left.register_forward_hook(lambda m, i, o: 3 * o)
    pruned, original = decomposed(nets[0]), nets[1]
    keep_ranks(pruned, dict.fromkeys(named_pairs(pruned), 1))
    plan = {n: {"kind": "pair", "rank": 1, "bias": p.needs_bias} for n, p in named_pairs(pruned).items()}
    unfold_into(original, plan)
    original.load_state_dict(bsdp.fold(pruned).state_dict())
    inputs = make_input("residual")
    assert relative_error(original(inputs), pruned(inputs)) < 1e-12


def test_the_copy_pickles_without_any_trace_of_this_package() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 2))
    bsdp.decompose(net)
    keep_ranks(net, {"0": 3, "2": 2})
    inputs = torch.randn(1, 3, 8, 8)
    assert b"bsdp" in pickle.dumps(net)
    pickled = pickle.dumps(bsdp.fold(net))
    assert b"bsdp" not in pickled
    assert relative_error(pickle.loads(pickled)(inputs), net(inputs)) < 1e-5


def test_the_copy_traces_and_exports() -> None:
    net = decomposed(make_net("residual", dtype=torch.float32))
    keep_ranks(net, half_ranks(net))
    folded, inputs = bsdp.fold(net), make_input("residual", dtype=torch.float32)
    program = torch.export.export(folded, (inputs,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    assert relative_error(program.module()(inputs), net(inputs)) < 1e-5


def test_refuse_pairs() -> None:
    refuse_pairs(make_net("conv"))
    with pytest.raises(ValueError, match=r"layer 'conv1' is a pair\); call `bsdp.fold\(model\)` first"):
        refuse_pairs(decomposed(make_net("conv")))


@pytest.mark.parametrize("kind", ["pair", "fused"])
@pytest.mark.parametrize("name", ["grouped", "tokens", "signal"])
def test_an_empty_folded_layer_has_the_keys_and_shapes_of_a_folded_one(name: str, kind: str) -> None:
    net = decomposed(make_net(name))
    keep_ranks(net, dict.fromkeys(named_pairs(net), 1 if kind == "pair" else 99))
    original = make_net(name)
    plan = {n: {"kind": kind, "rank": p.rank, "bias": p.needs_bias} for n, p in named_pairs(net).items()}
    assert {bsdp.layer_cost(p).kind(p.rank) for p in named_pairs(net).values()} == {kind}
    unfold_into(original, plan)
    expected = bsdp.fold(net).state_dict()
    assert {k: v.shape for k, v in original.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    original.load_state_dict(expected)
    inputs = make_input(name)
    assert relative_error(original(inputs), net(inputs)) < 1e-12
    assert repr(empty_folded(make_net(name).get_submodule(next(iter(plan))), **next(iter(plan.values())))) == repr(
        original.get_submodule(next(iter(plan)))
    )
