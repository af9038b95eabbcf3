"""Parameters, MACs and latency: what is promised must be what the folded model has."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bsdp
from bsdp.cost import Positions
from bsdp.layers import named_pairs
from bsdp.plain_layers import is_transposed, layer_outputs
from bsdp.stats import count_macs, measure_positions
from tests.helpers.cases import LAYER_CASES, LayerCase
from tests.helpers.compare import (
    assert_same_state,
    count_parameters,
    decomposed,
    half_ranks,
    keep_ranks,
    randomize_scales,
    snapshot,
)
from tests.helpers.marks import slow_but
from tests.helpers.nets import NETS, make_input, make_net
from tests.helpers.reference import fvcore_macs


def cut(net: nn.Module, inputs: Tensor, ratio: float, *, with_means: bool) -> bsdp.PruningPlan:
    """Prune by magnitude, with or without mean-to-bias."""
    pairs = named_pairs(net)
    statistics = bsdp.FeatureStatistics(pairs)
    with statistics.collecting():
        net(inputs)
    scores = bsdp.ScoreAccumulator(pairs, importance="magnitude").compute()
    plan = bsdp.select(scores, bsdp.measure_cost(net), ratio=ratio)
    bsdp.prune(net, plan, means=statistics.means() if with_means else None)
    return plan


COSTS = [(name, means) for means in (False, True) for name in NETS]


@pytest.mark.parametrize(("name", "with_means"), slow_but([*COSTS[: len(NETS)], ("residual", True)], COSTS))
def test_promised_cost_is_that_of_the_folded_model_before_and_after_cuts(name: str, with_means: bool) -> None:
    net, inputs = decomposed(make_net(name)), make_input(name)
    original = make_net(name)
    example = inputs[:1]
    cost = bsdp.measure_cost(net, example, new_bias=with_means)
    assert cost.original() == count_parameters(original)
    assert cost.original("macs") == count_macs(original, example)
    for ratio in (0.2, 0.5, 0.6):
        plan = cut(net, inputs, ratio, with_means=with_means)
        folded = bsdp.fold(net)
        assert cost.deployed(plan.ranks) == count_parameters(folded)
        assert cost.deployed(plan.ranks, "macs") == count_macs(folded, example)
        stats = bsdp.describe(net, example)
        assert (stats.params, stats.macs) == (count_parameters(folded), count_macs(folded, example))
        assert (stats.params_original, stats.macs_original) == (cost.original(), cost.original("macs"))
        # Measuring the pruned model anew says the same.
        again = bsdp.measure_cost(net, example, new_bias=with_means)
        assert again.deployed(plan.ranks, "macs") == cost.deployed(plan.ranks, "macs")
        assert again == cost


@pytest.mark.parametrize("name", [name for name in NETS if name != "signal"])
def test_macs_are_those_of_fvcore(name: str) -> None:
    net, inputs = make_net(name), make_input(name, batch=1)
    assert count_macs(net, inputs) == fvcore_macs(net, inputs) > 0


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_macs_of_every_layer_are_output_positions_times_weights(case: LayerCase) -> None:
    layer = case.build()
    inputs = torch.randn(1, *case.input_shape[1:])
    outputs = positions = layer(inputs).numel() // layer_outputs(layer)
    if is_transposed(layer):
        positions = inputs[0, 0].numel()
    assert count_macs(nn.Sequential(layer), inputs) == positions * layer.weight.numel()
    net = nn.Sequential(layer)
    bsdp.decompose(net, include=["0"])
    cost = bsdp.measure_cost(net, inputs)
    assert (cost.layers["0"].positions, cost.layers["0"].output_positions) == (positions, outputs)
    assert (cost.fixed_macs, cost.fixed_params) == (0, 0)
    assert count_macs(net, inputs) == cost.layers["0"].slope("macs") * bsdp.named_pairs(net)["0"].rank


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_macs_at_a_rank_are_those_of_the_folded_layer(case: LayerCase) -> None:
    net = nn.Sequential(case.build())
    inputs = torch.randn(1, *case.input_shape[1:])
    bsdp.decompose(net, include=["0"])
    cost, full = bsdp.measure_cost(net, inputs), bsdp.named_pairs(net)["0"].full_rank
    for rank in {1, 2, full // 2, full - 1, full} & set(range(1, full + 1)):
        pruned = copy.deepcopy(net)
        keep_ranks(pruned, {"0": rank})
        macs = count_macs(bsdp.fold(pruned), inputs)
        assert cost.deployed({"0": rank}, "macs") == bsdp.describe(pruned, inputs).macs == macs
        layer = cost.layers["0"]
        if layer.output_positions == layer.expansion * layer.positions:  # borders of small maps may cost a little more
            assert macs <= cost.original("macs")


class Choosy(nn.Module):
    """Takes a list of images and looks at values, which a tracer cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        scores = self.head(self.conv(torch.stack(images)).mean((2, 3)))
        return [{"best": row[row > -1e9], "name": "nothing to trace"} for row in scores]  # type: ignore[dict-item]


def test_a_model_that_cannot_be_traced_is_counted_while_it_runs() -> None:
    model, images = Choosy(), [torch.randn(3, 8, 8)]
    trains = [p.requires_grad for p in model.parameters()]
    assert count_macs(model, (images,)) == 36 * 27 * 8 + 8 * 4
    assert [p.requires_grad for p in model.parameters()] == trains
    bsdp.decompose(model)
    cost = bsdp.measure_cost(model, (images,))
    assert cost.original("macs") == 36 * 27 * 8 + 8 * 4


def test_attention_is_counted_as_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(query, key, value)

    shapes = (1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)
    inputs = tuple(torch.randn(shape) for shape in shapes)
    assert count_macs(Attention(), inputs) == 2 * 5 * 7 * 8 + 2 * 5 * 7 * 6


def test_a_transformer_is_counted_whole() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    projections = 5 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8)
    products = 2 * (2 * 5 * 5 * 4)
    norms = 2 * 5 * (5 * 8)  # fvcore counts five operations per element
    for frozen in (False, True):
        net.requires_grad_(not frozen)
        assert count_macs(net, torch.randn(1, 5, 8)) == projections + products + norms
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_transformer_in_a_decomposed_model_is_counted_and_runs_after_folding() -> None:
    layers = (nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    net, example = nn.Sequential(*layers).eval(), torch.randn(1, 5, 8)
    done = bsdp.decompose(net)
    assert list(done.replaced) == ["0"]
    assert "reads its weight" in done.skipped["1.linear1"]
    cost = bsdp.measure_cost(net, example)
    keep_ranks(net, {"0": 2})
    folded = bsdp.fold(net)
    assert cost.deployed({"0": 2}, "macs") == count_macs(folded, example)
    with torch.no_grad():
        assert torch.allclose(folded(example), net(example), atol=1e-5)


def test_a_shared_layer_counts_its_parameters_once_and_its_macs_for_every_call() -> None:
    net = decomposed(make_net("shared"))
    cost = bsdp.measure_cost(net, make_input("shared", batch=1))
    assert cost.layers["first"].positions == 64 + 16
    assert cost.original() == 6 * 54 + 21
    stats = bsdp.describe(net, make_input("shared", batch=1))
    assert [layer.name for layer in stats.layers] == ["first", "head"]
    assert stats.layers[0].macs_original == 80 * 6 * 54


def test_an_example_of_several_images_gives_the_macs_of_one() -> None:
    net = decomposed(make_net("conv"))
    one, four = make_input("conv", batch=1), make_input("conv", batch=4)
    assert bsdp.measure_cost(net, four) == bsdp.measure_cost(net, one)
    assert bsdp.describe(net, four) == bsdp.describe(net, one)


def test_without_an_example_there_are_no_macs() -> None:
    net = decomposed(make_net("conv"))
    cost = bsdp.measure_cost(net)
    assert cost.fixed_macs is None
    assert cost.layers["conv1"].positions is None
    stats = bsdp.describe(net)
    assert (stats.macs, stats.macs_original, stats.macs_kept) == (None, None, None)
    assert {layer.macs for layer in stats.layers} == {None}
    assert "MACs (" not in str(stats).splitlines()[-1]
    with pytest.raises(ValueError, match="MACs were not measured"):
        cost.original("macs")


def test_a_layer_that_is_never_called_has_no_macs_but_parameters() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    net.forward = lambda x: net[2](net[0](x))  # type: ignore[method-assign]
    positions = measure_positions(net, dict(net.named_children()), torch.randn(3, 5, 8))
    assert positions == {"0": Positions(5, 5), "1": Positions(0, 0), "2": Positions(5, 5)}


def test_measuring_leaves_the_model_as_it_was() -> None:
    net = decomposed(make_net("conv")).train()
    net.bn2.eval()
    net.dropout = nn.Dropout()
    modes = [m.training for m in net.modules()]
    before, example = snapshot(net), make_input("conv", batch=1)
    state = torch.random.get_rng_state()
    bsdp.measure_cost(net, example)
    bsdp.describe(net, example)
    bsdp.measure_latency({"a": net}, example, repeats=1, warmup=0)
    assert [m.training for m in net.modules()] == modes
    assert_same_state(net, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in net.modules())
    net(make_input("conv")).sum().backward()  # no inference tensors were left behind
    with pytest.raises(RuntimeError):
        bsdp.measure_cost(net, torch.zeros(1, 7, 8, 8, dtype=torch.float64))
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks for m in net.modules())


def test_counting_warns_of_nothing() -> None:
    class Branches(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) if inputs.sum() > -1e9 else inputs  # tracing warns of this

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert count_macs(Branches(3, 4), torch.zeros(1, 3)) == 12
    assert caught == []


# --- describe


def test_describe_a_plain_model() -> None:
    net, example = make_net("conv"), make_input("conv", batch=1)
    stats = bsdp.describe(net, example)
    assert stats.params == stats.params_original == count_parameters(net)
    assert stats.macs == stats.macs_original == fvcore_macs(net, example)
    assert (stats.params_kept, stats.macs_kept) == (1.0, 1.0)
    conv2 = stats.layers[1]
    assert (conv2.name, conv2.kind, conv2.rank, conv2.full_rank) == ("conv2", "plain", 12, 12)
    assert conv2.break_even_rank == pytest.approx(12 * 72 / 84)
    assert (conv2.params, conv2.params_original, conv2.macs, conv2.macs_original) == (864, 864, 16 * 864, 16 * 864)


def test_describe_a_pruned_model() -> None:
    net = decomposed(make_net("conv"))
    keep_ranks(net, {"conv1": 7, "conv2": 4})
    stats = bsdp.describe(net, make_input("conv", batch=1))
    conv1, conv2, head = stats.layers
    assert (conv1.kind, conv1.rank, conv1.params, conv1.macs) == ("fused", 7, 216, 64 * 216)
    assert (conv2.kind, conv2.rank, conv2.full_rank, conv2.params) == ("pair", 4, 12, 4 * 84)
    assert (conv2.params_original, conv2.macs, conv2.macs_original) == (864, 16 * 4 * 84, 16 * 864)
    assert (head.kind, head.params, head.macs) == ("plain", 52, 48)
    assert stats.params_kept == stats.params / stats.params_original
    assert stats.macs_kept == stats.macs / stats.macs_original < 1


def test_describe_says_which_layers_gained_a_bias() -> None:
    net = decomposed(make_net("conv"))
    keep_ranks(net, {"conv1": 2, "conv2": 4})
    before = bsdp.describe(net)
    net.conv2.scaling.bias.data += 1.0
    after = bsdp.describe(net)
    assert after.params == before.params + 12
    assert after.layers[1].params == before.layers[1].params + 12
    assert after.params_original == before.params_original


def test_the_table_has_every_layer_and_the_sums() -> None:
    net = decomposed(make_net("conv"))
    keep_ranks(net, {"conv1": 7, "conv2": 4})
    text = str(bsdp.describe(net, make_input("conv", batch=1)))
    rows = {line.split()[1]: line for line in text.splitlines() if len(line.split()) > 8}
    assert rows["conv1"].replace("│", " ").split() == [
        "conv1",
        "fused",
        "7",
        "8",
        "6.2",
        "216",
        "100.0%",
        "13,824",
        "100.0%",
    ]
    assert rows["conv2"].replace("│", " ").split() == [
        "conv2",
        "pair",
        "4",
        "12",
        "10.3",
        "336",
        "38.9%",
        "5,376",
        "38.9%",
    ]
    assert rows["head"].replace("│", " ").split() == ["head", "plain", "4", "4", "3.0", "52", "100.0%", "48", "100.0%"]
    assert "whole model, head included: 644 of 1,172 parameters (54.9% kept)" in text
    assert "MACs (" in text.splitlines()[-1]
    assert max(len(line) for line in text.splitlines()) <= 110


def test_long_names_are_folded_not_cut() -> None:
    net: nn.Module = nn.Linear(8, 8)
    for _ in range(60):
        net = nn.Sequential(net)
    name = bsdp.describe(net).layers[0].name
    text = "".join(line.split("│")[1].strip() for line in str(bsdp.describe(net)).splitlines() if line.startswith("│"))
    assert name in text
    assert max(len(line) for line in str(bsdp.describe(net)).splitlines()) <= 110


def test_describe_copes_with_layers_that_are_not_decomposed() -> None:
    class OwnConv(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 3)

    net = nn.Sequential(OwnConv(), parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    stats = bsdp.describe(net, torch.randn(1, 4, 7, 7))
    assert [(layer.name, layer.kind) for layer in stats.layers] == [("0", "plain"), ("1", "plain")]
    assert [layer.macs for layer in stats.layers] == [144 * 25, 144 * 9]


def test_describe_an_empty_model() -> None:
    stats = bsdp.describe(nn.ReLU(), torch.randn(1, 3))
    assert (stats.params, stats.params_original, stats.layers) == (0, 0, ())
    assert stats.params_kept == 0.0
    assert stats.macs_kept is None
    assert "0 of 0 parameters" in str(stats)


# --- latency


def test_latency_gives_positive_medians_by_name_and_runs_models_in_turn() -> None:
    order: list[str] = []

    class Watched(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, inputs: Tensor) -> Tensor:
            order.append(self.name)
            assert not self.training
            assert torch.is_inference_mode_enabled()
            return inputs + 1

    models = {"a": Watched("a"), "b": Watched("b")}
    latency = bsdp.measure_latency(models, torch.zeros(2, 3), repeats=3, warmup=2)
    assert list(latency) == ["a", "b"]
    assert all(0 < value < 1000 for value in latency.values())
    assert order == ["a", "b"] * 5
    assert models["a"].training


def test_latency_of_a_folded_half_rank_model_with_a_tuple_as_input() -> None:
    net = decomposed(make_net("conv"))
    randomize_scales(net)
    keep_ranks(net, half_ranks(net))
    models = {"original": make_net("conv"), "pruned": bsdp.fold(net)}
    latency = bsdp.measure_latency(models, (make_input("conv"),), repeats=2, warmup=1)
    assert latency.keys() == models.keys()


@pytest.mark.parametrize(
    ("options", "message"), [({"repeats": 0}, "`repeats` must"), ({"warmup": -1}, "`warmup` must")]
)
def test_latency_refuses_what_cannot_be_timed(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bsdp.measure_latency({"a": nn.ReLU()}, torch.zeros(1), **options)


def test_latency_restores_the_mode_also_after_an_error() -> None:
    net = make_net("conv").train()
    with pytest.raises(RuntimeError):
        bsdp.measure_latency({"a": net}, torch.zeros(1, 9, 2, 2))
    assert all(m.training for m in net.modules())
