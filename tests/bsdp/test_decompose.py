"""Decomposing whole models: exactness, what is replaced, what is left alone and why."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import bsdp
from bsdp.decompose import find_head
from bsdp.layers import BasisPair, named_pairs
from bsdp.stats import count_macs
from tests.helpers.cases import CASES_BY_NAME, LAYER_CASES, LayerCase
from tests.helpers.compare import assert_same_state, relative_error, snapshot
from tests.helpers.nets import NETS, ConvNet, make_input, make_net
from tests.helpers.reference import output_moment

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


# Oracle 1
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_full_rank_pair_has_the_outputs_of_its_layer(case: LayerCase, dtype: torch.dtype) -> None:
    model = nn.Sequential(case.build().to(dtype))
    inputs = torch.randn(case.input_shape, dtype=dtype)
    expected = model(inputs)
    done = bsdp.decompose(model, include=["0"])
    assert list(done.replaced) == ["0"]
    assert isinstance(model[0], BasisPair)
    assert model(inputs).dtype == dtype
    assert relative_error(model(inputs), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_full_rank_pair_is_exact_in_the_activation_metric_too(case: LayerCase, dtype: torch.dtype) -> None:
    model = nn.Sequential(case.build().to(dtype))
    inputs = torch.randn(case.input_shape, dtype=dtype)
    expected = model(inputs)
    moment = output_moment(model[0], inputs)  # fewer examples than outputs in some cases: a singular moment
    bsdp.decompose(model, include=["0"], metric="activation", statistics={"0": moment})
    # Weak directions are scaled by up to 1e7, which costs the conditioning of the product some digits.
    assert relative_error(model(inputs), expected) < 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_half_precision_error_is_at_most_three_times_that_of_the_layer(case: LayerCase, dtype: torch.dtype) -> None:
    layer = case.build().to(dtype)
    inputs = torch.randn(8, *case.input_shape[1:]).to(dtype)
    exact = copy.deepcopy(layer).double()(inputs.double())
    own_error = relative_error(layer(inputs), exact)
    pair = bsdp.pair_from_layer(layer)
    assert {t.dtype for t in pair.state_dict().values()} == {dtype}
    assert 0 < relative_error(pair(inputs), exact) <= 3 * own_error


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Any convolution that torch accepts, small, with an input for it."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    same = draw(st.booleans())
    stride = (1,) * dims if same else draw(st.tuples(*[st.integers(1, 2)] * dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    size = [d * (k - 1) + 1 + draw(st.integers(1, 4)) for d, k in zip(dilation, kernel, strict=True)]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 5)),
        kernel,
        stride=stride,
        padding="same" if same else draw(st.tuples(*[st.integers(0, 1)] * dims)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    nn.init.normal_(layer.weight)
    return layer, torch.randn(2, layer.in_channels, *size, dtype=torch.float64)


@given(convolutions())
def test_any_convolution_is_reproduced_and_folded_back(drawn: tuple[nn.Module, Tensor]) -> None:
    layer, inputs = drawn
    expected = layer(inputs)
    assume(expected.norm() > 1e-6)
    pair = bsdp.pair_from_layer(layer)
    assert relative_error(pair(inputs), expected) < 1e-12
    assert relative_error(bsdp.fold_pair(pair)(inputs), expected) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_a_whole_network_keeps_its_outputs_and_gets_pairs(name: str) -> None:
    net, inputs = make_net(name), make_input(name)
    expected = net(inputs)
    done = bsdp.decompose(net)
    assert done.replaced
    assert relative_error(net(inputs), expected) < 1e-12
    assert set(done.skipped) >= {"head"}
    assert {id(new) for _, new in done.replaced.values()} == {id(p) for p in named_pairs(net).values()}
    for name_, (old, new) in done.replaced.items():
        assert net.get_submodule(name_) is new
        assert type(old) is new.original_type


def test_random_state_and_modes_are_left_as_they_were() -> None:
    net = make_net("conv")
    net.bn1.train()
    net.conv1.eval()
    net.conv2.train()
    inputs = make_input("conv")
    state = torch.random.get_rng_state()
    bsdp.decompose(net, example_input=inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (net.training, net.bn1.training, net.bn2.training) == (False, True, False)
    assert (net.conv1.training, net.conv2.training, net.conv2.scaling.training) == (False, True, True)


def test_decomposing_twice_does_nothing_more() -> None:
    net = make_net("conv")
    bsdp.decompose(net)
    state = snapshot(net)
    again = bsdp.decompose(net)
    assert again.replaced == {}
    assert list(again.skipped) == ["head"]
    assert_same_state(net, state)


def test_a_second_call_may_decompose_what_the_first_left() -> None:
    net, inputs = make_net("conv"), make_input("conv")
    expected = net(inputs)
    bsdp.decompose(net, include=["conv1"])
    assert list(bsdp.decompose(net, exclude=["conv1"]).replaced) == ["conv2"]
    assert relative_error(net(inputs), expected) < 1e-12


# --- the head


def test_the_head_is_left_alone_by_default_and_decomposed_when_named() -> None:
    net, inputs = make_net("conv"), make_input("conv")
    expected = net(inputs)
    assert find_head(net) == "head"
    assert "it is the head" in bsdp.decompose(net).skipped["head"]
    assert list(bsdp.decompose(net, include=["head"]).replaced) == ["head"]
    assert relative_error(net(inputs), expected) < 1e-12


def test_the_head_may_be_a_convolution_and_is_the_last_in_module_order() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1))
    assert find_head(net) == "1"
    assert find_head(nn.ReLU()) is None


# --- include and exclude


@pytest.mark.parametrize(
    ("include", "exclude", "replaced"),
    [
        (None, None, ["conv1", "conv2"]),
        (["conv1"], None, ["conv1"]),
        (["conv?"], ["conv2"], ["conv1"]),
        (["*"], None, ["conv1", "conv2", "head"]),
        (None, ["conv*"], []),
        ([], None, []),
        ((name for name in ("conv2",)), (name for name in ("head",)), ["conv2"]),
    ],
)
def test_patterns_choose_layers(include: object, exclude: object, replaced: list[str]) -> None:
    done = bsdp.decompose(make_net("conv"), include=include, exclude=exclude)  # type: ignore[arg-type]
    assert list(done.replaced) == replaced
    assert set(done.replaced) | set(done.skipped) == {"conv1", "conv2", "head"}
    for name, reason in done.skipped.items():
        if name != "head":
            assert reason in ("not named in `include`", "named in `exclude`")


def test_patterns_match_modules_that_hold_a_layer() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 2))
    assert list(bsdp.decompose(net, exclude=["0"]).replaced) == ["1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_and_the_model_untouched(argument: str) -> None:
    net = make_net("conv")
    with pytest.raises(ValueError, match=f"`{argument}` has the pattern 'conv7', which matches no layer.*'conv1'"):
        bsdp.decompose(net, **{argument: ["conv1", "conv7"]})
    assert not named_pairs(net)


def test_scripted_and_quantised_layers_are_left_alone_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both ways are deprecated
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
        static = torch.ao.nn.quantized.Conv2d(3, 8, 3)
    model = nn.Sequential(scripted, quantised, static, nn.Linear(8, 8), nn.Linear(8, 2))
    done = bsdp.decompose(model)
    assert list(done.replaced) == ["3"]
    reasons = {name: reason.partition(":")[0] for name, reason in done.skipped.items()}
    assert reasons == {
        "0.0": "it is scripted",
        "1.0": "it is quantised",
        "2": "it is quantised",
        "4": "it is the head (the last layer of the model); name it in `include` to decompose it",
    }


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_single_string_is_refused_as_patterns(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must be a list"):
        bsdp.decompose(make_net("conv"), **{argument: "conv1"})


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="`metric` must be one of 'euclidean', 'activation', 'kfac', got 'cosine'"):
        bsdp.decompose(make_net("conv"), metric="cosine")
    with pytest.raises(ValueError, match="`metric` must be one of"):
        bsdp.pair_from_layer(nn.Linear(3, 3), metric="cosine")


# --- the activation metric


def test_activation_metric_needs_statistics_of_every_layer_it_decomposes() -> None:
    net = make_net("conv")
    moments = {"conv1": torch.eye(8)}
    with pytest.raises(ValueError, match="`statistics` lacks layer 'conv2'"):
        bsdp.decompose(net, metric="activation", statistics=moments)
    assert not named_pairs(net)
    with pytest.raises(ValueError, match=r"`metric=.activation.` needs `statistics`: see `bsdp"):
        bsdp.decompose(net, metric="activation")
    bsdp.decompose(net, metric="activation", statistics=moments, include=["conv1"])
    assert list(named_pairs(net)) == ["conv1"]


def test_activation_metric_names_the_layer_whose_statistics_are_bad() -> None:
    net = make_net("conv")
    with pytest.raises(ValueError, match=r"layer 'conv1' \(8, 3, 3, 3\): its output statistics must be 8 x 8"):
        bsdp.decompose(net, metric="activation", statistics={"conv1": torch.eye(3), "conv2": torch.eye(12)})
    assert not named_pairs(net)


def test_statistics_of_a_shared_layer_may_stand_under_its_second_name() -> None:
    net = make_net("shared")
    bsdp.decompose(net, metric="activation", statistics={"second": torch.eye(6, dtype=torch.float64)})
    assert list(named_pairs(net)) == ["first"]


# --- modules and parameters that are shared


def test_a_module_called_twice_under_two_names_becomes_one_pair_with_both() -> None:
    net = make_net("shared")
    done = bsdp.decompose(net)
    assert sorted(done.replaced) == ["first", "second"]
    assert net.first is net.second
    assert isinstance(net.first, BasisPair)
    assert done.replaced["first"] == done.replaced["second"]


def test_excluding_one_name_of_a_shared_module_excludes_it() -> None:
    done = bsdp.decompose(make_net("shared"), exclude=["second"])
    assert done.replaced == {}
    assert done.skipped["first"] == done.skipped["second"] == "named in `exclude`"


def test_layers_that_share_a_parameter_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    net[1].weight = net[0].weight
    done = bsdp.decompose(net)
    assert list(done.replaced) == ["2"]
    assert done.skipped["0"] == done.skipped["1"] == "it shares a parameter with another module"


def test_a_shared_bias_or_a_weight_tied_to_an_embedding_counts_too() -> None:
    net = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    net[1].weight = net[0].weight
    net[3].bias = net[2].bias
    done = bsdp.decompose(net)
    assert done.replaced == {}
    assert [done.skipped[n] for n in "123"] == ["it shares a parameter with another module"] * 3


# --- what is left alone


class OwnConv(nn.Conv2d):
    """A subclass may do anything in its forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).square()


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def with_pre_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    return layer


def with_weight(weight: Tensor | None) -> nn.Module:
    layer = nn.Linear(8, 8)
    del layer.weight
    layer.weight = None if weight is None else nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    return layer


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "no ordinary floating-point tensor"),
    "integers": (lambda: with_weight(torch.ones(8, 8, dtype=torch.int8)), "no ordinary floating-point tensor"),
    "sparse": (lambda: with_weight(torch.eye(8).to_sparse()), "no ordinary floating-point tensor"),
    "none": (lambda: with_weight(None), "no ordinary floating-point tensor"),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    "one_output_per_group": (lambda: nn.Conv2d(8, 4, 3, groups=4), "rank is already 1"),
    "one_input": (lambda: nn.Conv2d(1, 8, 1), "rank is already 1"),
    "one_output": (lambda: nn.Conv2d(8, 1, 3), "rank is already 1"),
    "too_small": (lambda: nn.Linear(2, 2), "no rank would make it smaller"),
    "old_weight_norm": (lambda: old_weight_norm(nn.Conv2d(8, 8, 3)), "forward pre-hooks"),
    "pre_hook": (lambda: with_pre_hook(nn.Conv2d(8, 8, 3)), "forward pre-hooks"),
    "lazy": (lambda: nn.LazyConv2d(8, 3), "lazy: run the model once"),
    "lazy_linear": (lambda: nn.LazyLinear(8), "lazy: run the model once"),
    "meta": (lambda: nn.Conv2d(8, 8, 3, device="meta"), "meta device"),
    "subclass": (lambda: OwnConv(8, 8, 3), "what a OwnConv computes is not what a plain layer does"),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), "type Bilinear are not supported"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_decomposed_is_left_alone_with_the_reason(name: str) -> None:
    build, reason = LEFT_ALONE[name]
    layer = build()
    model = nn.Sequential(layer, nn.Linear(8, 8), nn.Linear(8, 2))
    done = bsdp.decompose(model)
    assert list(done.replaced) == ["1"]
    assert model[0] is layer
    assert reason in done.skipped["0"]
    assert f"left: 0: {done.skipped['0']}" in str(done)
    # Naming it does not force it.
    assert reason in bsdp.decompose(model, include=["0"]).skipped["0"]


def test_attention_projections_are_left_alone_since_attention_reads_their_weights() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = nn.Sequential(attention, nn.Linear(8, 8), nn.Linear(8, 2))
    assert bsdp.decompose(model).skipped["0.out_proj"] == "nn.MultiheadAttention reads its weight"


def test_the_smallest_layer_worth_it_is_decomposed() -> None:
    # 3 x 3: one basis costs 6 of 9 weights.
    assert list(bsdp.decompose(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))).replaced) == ["0"]


def test_layers_that_are_not_layers_of_ours_are_not_mentioned() -> None:
    done = bsdp.decompose(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), nn.BatchNorm1d(3), nn.Embedding(3, 3)))
    assert done.replaced == done.skipped == {}
    assert str(done) == "0 layers decomposed, 0 left as they are"


def test_a_model_without_any_layer_refuses_patterns() -> None:
    with pytest.raises(ValueError, match="matches no layer"):
        bsdp.decompose(nn.ReLU(), include=["a"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_the_model_untouched(bad: float) -> None:
    net = make_net("conv")
    net.conv2.weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"layer 'conv2' \(12, 8, 3, 3\): its weight holds NaN or infinity"):
        bsdp.decompose(net)
    assert not named_pairs(net)


def test_a_model_that_is_itself_the_layer_is_refused_with_advice() -> None:
    layer = nn.Conv2d(8, 8, 3)
    assert list(bsdp.decompose(layer).skipped) == [""]  # it is its own head
    with pytest.raises(ValueError, match="wrap it"):
        bsdp.decompose(layer, include=["*"])


@pytest.mark.parametrize("layer", [OwnConv(8, 8, 3), nn.BatchNorm2d(8)], ids=type)
def test_pair_from_layer_refuses_other_types(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"`layer` must be one of Conv1d, .*, Linear, got {type(layer).__name__}"):
        bsdp.pair_from_layer(layer)


# --- example_input


class Idle(nn.Module):
    """Has a layer that forward never calls, and one whose weight it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(nn.functional.linear(self.used(inputs), self.read.weight))


def test_layers_that_are_never_called_are_left_alone_when_an_example_is_given() -> None:
    model, inputs = Idle(), torch.randn(3, 8)
    expected = model(inputs)
    done = bsdp.decompose(model, example_input=inputs)
    assert list(done.replaced) == ["used"]
    assert done.skipped["idle"] == done.skipped["read"] == "it is never called on the example input"
    assert relative_error(model(inputs), expected) < 1e-5


def test_without_an_example_code_that_reads_the_weight_goes_on_working() -> None:
    model, inputs = Idle(), torch.randn(3, 8)
    expected = model(inputs)
    assert list(bsdp.decompose(model).replaced) == ["used", "idle", "read"]
    assert relative_error(model(inputs), expected) < 1e-5
    model(inputs).sum().backward()
    assert model.read.scaling.delta.grad is not None


class Odd(nn.Module):
    """Calls a layer whose weight it also reads, one with an argument of its own, and reads the sizes of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Conv2d(8, 8, 3, padding=1)
        self.sized = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.read(images) + self.read.weight.mean()
        features = self.sized(features, output_size=[2 * images.shape[-2], 2 * images.shape[-1]])
        features = self.plain(features) / self.plain.out_channels
        return self.head(features.mean((2, 3)))


ODD_REASON = "other code reads its weight or bias, or calls it with more than its input"


def test_with_an_example_layers_that_must_stay_one_are_left_alone() -> None:
    model, inputs = Odd(), torch.randn(3, 8, 6, 5)
    expected, read = model(inputs), model.read
    done = bsdp.decompose(model, example_input=inputs)
    assert list(done.replaced) == ["plain"]
    assert model.read is read
    assert done.skipped["read"] == done.skipped["sized"] == ODD_REASON
    assert relative_error(model(inputs), expected) < 1e-5


def test_without_an_example_they_are_pairs_that_are_not_cut_once_they_were_seen() -> None:
    model, inputs = Odd().double(), torch.randn(2, 8, 6, 5).double()
    expected = model(inputs)
    bsdp.decompose(model)
    assert relative_error(model(inputs), expected) < 1e-12
    cost = bsdp.measure_cost(model, inputs[:1])
    scores = {name: torch.rand(8) for name in ("read", "sized", "plain")}
    plan = bsdp.select(scores, cost, ratio=0.6)
    assert plan.ranks["read"] == plan.ranks["sized"] == 8
    assert plan.ranks["plain"] < 8
    bsdp.prune(model, plan)
    folded = bsdp.fold(model)
    assert [type(layer) for layer in folded.children()] == [nn.Conv2d, nn.ConvTranspose2d, nn.Sequential, nn.Linear]
    assert relative_error(folded(inputs), model(inputs)) < 1e-12
    stats = bsdp.describe(model, inputs[:1])
    assert stats.params == sum(p.numel() for p in folded.parameters()) == cost.deployed(plan.ranks)
    assert stats.macs == count_macs(folded, inputs[:1]) == cost.deployed(plan.ranks, "macs")


class ReadsOnce(nn.Module):
    """Reads a weight or bias in its first pass only, as models do that cache what they derive from it."""

    def __init__(self, attribute: str = "weight") -> None:
        super().__init__()
        self.attribute = attribute
        self.read, self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.device: torch.device | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.device is None:
            self.device = getattr(self.read, self.attribute).device
        return self.head(self.plain(self.read(inputs)))


class ReadsBias(nn.Module):
    """Uses the bias of a layer once more."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.plain, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.plain(self.read(inputs) - self.read.bias))


def test_a_bias_that_is_read_counts_like_a_weight() -> None:
    model, inputs = ReadsBias(), torch.randn(3, 8)
    done = bsdp.decompose(model, example_input=inputs)
    assert list(done.replaced) == ["plain"]
    assert done.skipped["read"] == ODD_REASON
    watched = ReadsBias()
    bsdp.decompose(watched)
    cost = bsdp.measure_cost(watched, inputs[:1])
    assert [name for name, layer in cost.layers.items() if layer.whole] == ["read"]
    bsdp.prune(watched, bsdp.select({name: torch.rand(8) for name in cost.layers}, cost, ratio=0.4))
    folded = bsdp.fold(watched)
    assert relative_error(folded(inputs), watched(inputs)) < 1e-5


@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_a_weight_that_is_read_in_the_first_pass_only_counts(attribute: str) -> None:
    model, inputs = ReadsOnce(attribute), torch.randn(3, 8)
    done = bsdp.decompose(model, example_input=inputs)
    assert list(done.replaced) == ["plain"]
    assert done.skipped["read"] == ODD_REASON
    assert "spy" not in nn.Module.__getattr__.__qualname__


def test_a_watched_pair_notes_a_read_before_costs_are_measured() -> None:
    model, inputs = ReadsOnce(), torch.randn(3, 8)
    bsdp.decompose(model)
    for pair in named_pairs(model).values():
        pair.watched = True
    model(inputs)
    cost = bsdp.measure_cost(model, inputs[:1])
    assert [name for name, layer in cost.layers.items() if layer.whole] == ["read"]
    assert not any(pair.watched for pair in named_pairs(model).values())


class Listed(nn.Module):
    """Calls one layer through a plain list only, and a second one both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.both, self.plain = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.layers = [self.listed, self.both]

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.both(inputs)
        for layer in self.layers:
            features = layer(features)
        return self.head(self.plain(features))


def test_a_layer_that_the_model_also_holds_elsewhere_is_left_alone() -> None:
    model, inputs = Listed(), torch.randn(3, 8)
    expected, calls = model(inputs), []
    model.listed.register_forward_hook(lambda m, i, o: calls.append(m))
    done = bsdp.decompose(model, example_input=inputs)
    calls.clear()
    assert list(done.replaced) == ["plain"]
    assert [model.listed, model.both] == model.layers
    reason = "the model keeps a reference of its own to it (in a plain list, say), and goes on calling it"
    assert done.skipped["listed"] == done.skipped["both"] == reason
    assert relative_error(model(inputs), expected) < 1e-5
    assert calls == [model.listed]  # its own hook is back, ours is gone


class Particular(nn.Sequential):
    """Calls layers of the types it knows."""

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self:
            inputs = layer(inputs) if isinstance(layer, nn.Linear) else inputs
        return inputs


def test_a_layer_whose_pair_would_not_be_called_is_left_alone() -> None:
    model, inputs = Particular(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(3, 8)
    expected = model(inputs)
    done = bsdp.decompose(model, example_input=inputs)
    assert done.skipped["0"] == "the model does not call what replaces it: it looks for a layer of this very type"
    assert torch.equal(model(inputs), expected)


def test_a_model_that_does_not_run_on_the_example_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    first = model[0]
    with pytest.raises(RuntimeError):
        bsdp.decompose(model, example_input=torch.randn(1, 5))
    assert model[0] is first


def test_the_example_may_be_a_tuple_and_leaves_no_trace() -> None:
    net = make_net("conv").train()
    before = snapshot(net)
    bsdp.decompose(net, include=["conv1"], example_input=(make_input("conv"),))
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


# --- hooks


def test_forward_and_backward_hooks_move_and_their_handles_still_remove_them() -> None:
    net, inputs = make_net("conv"), make_input("conv")
    seen: list[str] = []
    handles = [
        net.conv2.register_forward_hook(lambda m, i, o: seen.append("forward")),
        net.conv2.register_forward_hook(lambda m, i, kw, o: seen.append("with_kwargs"), with_kwargs=True),
        net.conv2.register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        net.conv2.register_full_backward_pre_hook(lambda m, go: seen.append("backward_pre")),
    ]
    old = net.conv2
    bsdp.decompose(net)
    net(inputs).sum().backward()
    assert sorted(seen) == ["backward", "backward_pre", "forward", "with_kwargs"]
    seen.clear()
    old(torch.randn(1, 8, 4, 4, dtype=torch.float64)).sum().backward()
    assert seen == []
    for handle in handles:
        handle.remove()
    net(inputs).sum().backward()
    assert seen == []


def test_a_hook_that_changes_the_output_still_does() -> None:
    net, inputs = make_net("residual"), make_input("residual")
    net.left.register_forward_hook(lambda m, i, o: 3 * o)
    expected = net(inputs)
    bsdp.decompose(net)
    assert relative_error(net(inputs), expected) < 1e-12


# --- in a model that lives on


def test_a_decomposed_model_trains_and_its_scales_learn() -> None:
    net, inputs = make_net("conv"), make_input("conv", batch=16)
    target = inputs.mean((1, 2, 3)) > 0
    bsdp.decompose(net)
    bsdp.freeze(net, trainable=["head"])
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), target.long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("metric", ["euclidean", "activation"])
def test_channels_last_and_non_contiguous_weights_are_fine(metric: str) -> None:
    case = CASES_BY_NAME["strided"]
    layer = case.build().double().to(memory_format=torch.channels_last)
    inputs = torch.randn(case.input_shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    pair = bsdp.pair_from_layer(layer, metric=metric, moment=output_moment(layer, inputs))
    assert relative_error(pair(inputs), layer(inputs)) < 1e-12


def test_the_original_layers_come_back_unchanged_in_the_result() -> None:
    net = ConvNet()
    weight = net.conv1.weight.detach().clone()
    old, new = bsdp.decompose(net).replaced["conv1"]
    assert torch.equal(old.weight, weight)
    assert new is net.conv1
