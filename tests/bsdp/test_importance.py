"""Scores: the identities behind them, the accumulators against slow versions, and their state."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.feature_statistics import FeatureStatistics
from bsdp.importance import (
    IMPORTANCES,
    ScoreAccumulator,
    column_norms,
    energy,
    magnitude,
    sigma_energy,
    taylor_terms,
)
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import to_matrix
from tests.helpers.cases import CASES_BY_NAME
from tests.helpers.compare import decomposed, randomize_scales, relative_error
from tests.helpers.nets import NETS, make_input, make_net
from tests.helpers.reference import taylor_scores

TAYLOR = {"mean_square": 2, "mean_abs": 1}


def scored_net(name: str = "conv", *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A decomposed network at random scales."""
    net = decomposed(make_net(name, dtype=dtype))
    randomize_scales(net)
    return net


def backward(net: nn.Module, inputs: Tensor) -> None:
    """One minibatch."""
    net.zero_grad()
    net(inputs).square().mean().backward()


def scale_terms(net: nn.Module) -> dict[str, Tensor]:
    """``s dL/ds`` per layer, from the gradients that stand now."""
    return {n: (p.scale * p.scaling.delta.grad).detach() for n, p in named_pairs(net).items()}


# --- the identities (oracle 3)

SINGLE_USE = [name for name in NETS if name != "shared"]


@pytest.mark.parametrize("name", SINGLE_USE)
def test_identity_a_the_scale_term_is_the_activation_term(name: str) -> None:
    net = scored_net(name)
    scaled: dict[str, Tensor] = {}

    def replace_forward(pair_name: str, pair: BasisPair) -> Callable[[Tensor], Tensor]:
        plain = copy.deepcopy(pair.scaling)
        nn.init.zeros_(plain.delta)

        def forward(inputs: Tensor) -> Tensor:
            features = pair.basis(inputs)
            shape = (-1,) if pair.scaling.dims == 0 else (1, -1, *(1,) * pair.scaling.dims)
            scaled[pair_name] = features * pair.scale.view(shape)
            scaled[pair_name].retain_grad()
            return plain(scaled[pair_name])

        return forward

    inputs = make_input(name)
    backward(net, inputs)
    expected = scale_terms(net)
    for pair_name, pair in named_pairs(net).items():
        pair.forward = replace_forward(pair_name, pair)  # type: ignore[method-assign]
    backward(net, inputs)
    for pair_name, pair in named_pairs(net).items():
        z = scaled[pair_name]
        assert z.grad is not None
        axis = z.dim() - 1 if pair.scaling.dims == 0 else 1
        terms = (z * z.grad).movedim(axis, 0).flatten(1).sum(1).detach()
        assert relative_error(terms, expected[pair_name]) < 1e-10


@pytest.mark.parametrize("name", NETS)
def test_identities_b_and_c_terms_of_the_weight_gradient_and_their_sum(name: str) -> None:
    net = scored_net(name)
    inputs = make_input(name)
    backward(net, inputs)
    # The same function with one plain weight per layer, so that autograd gives G = dL/dW_eff.
    plain = copy.deepcopy(net)
    pairs = named_pairs(net)
    layers = {}
    for pair_name, pair in pairs.items():
        layers[pair_name] = bsdp.plain_layers.new_layer(
            pair, pair.scaling.weight.shape[0], bias=True, dtype=torch.float64
        )
        with torch.no_grad():
            layers[pair_name].weight.copy_(pair.weight)
            layers[pair_name].bias.copy_(pair.bias)
        for other in [
            n for n, m in plain.named_modules(remove_duplicate=False) if m is named_pairs(plain).get(pair_name)
        ]:
            plain.set_submodule(other, layers[pair_name])
    assert relative_error(plain(inputs), net(inputs)) < 1e-12
    backward(plain, inputs)
    for pair_name, pair in pairs.items():
        gradient = to_matrix(layers[pair_name].weight.grad, pair.groups)
        coefficients = to_matrix(pair.scaling.scaled_weight.detach(), pair.groups)
        bases = to_matrix(pair.basis.weight, pair.groups)
        terms = torch.einsum("gor,gof,grf->gr", coefficients, gradient, bases).flatten()
        expected = scale_terms(net)[pair_name]
        assert relative_error(terms, expected) < 1e-10
        whole = (gradient.flatten() * pair.weight.flatten()).sum().detach()
        assert float(expected.sum()) == pytest.approx(float(whole), rel=1e-9, abs=1e-12)


def test_under_train_mode_batch_norm_the_signed_terms_of_a_layer_sum_to_zero() -> None:
    net = scored_net("conv")
    net.bn1.train()
    net.bn1.eps = 1e-12
    backward(net, make_input("conv"))
    terms = scale_terms(net)
    assert float(terms["conv1"].sum()) == pytest.approx(0.0, abs=1e-9)
    assert float(terms["conv1"].abs().sum()) > 1e-3
    assert abs(float(terms["conv2"].sum())) > 1e-6  # its batch norm is in eval mode


# --- formulas


def test_formulas_on_numbers() -> None:
    scale, sigma = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([3.0, 2.0, 0.5])
    assert taylor_terms(scale, torch.tensor([-1.0, 4.0, 0.0])).tolist() == [-1.0, -2.0, 0.0]
    assert magnitude(scale, sigma).tolist() == [3.0, 1.0, 1.0]
    assert energy(scale, sigma, torch.tensor([1.0, 2.0, 4.0])).tolist() == [9.0, 2.0, 4.0]


@pytest.mark.parametrize("name", ["strided", "groups", "linear_tokens", "conv1d_groups"])
def test_column_norms_are_the_singular_values(name: str) -> None:
    pair = bsdp.pair_from_layer(CASES_BY_NAME[name].build().double())
    assert relative_error(column_norms(pair), pair.scaling.sigma) < 1e-12


# --- the accumulator


@pytest.mark.parametrize("importance", TAYLOR)
@pytest.mark.parametrize("name", NETS)
def test_accumulator_equals_the_slow_version(name: str, importance: str) -> None:
    net = scored_net(name)
    pairs = named_pairs(net)
    scores = ScoreAccumulator(pairs, importance=importance)
    gradients = []
    for batch in (2, 5, 3):
        backward(net, make_input(name, batch=batch))
        gradients.append({n: p.scaling.delta.grad.clone() for n, p in pairs.items()})
        scores.update()
    expected = taylor_scores(gradients, {n: p.scale for n, p in pairs.items()}, TAYLOR[importance])
    actual = scores.compute()
    assert scores.steps == 3
    assert list(actual) == list(pairs)
    for layer, value in expected.items():
        assert actual[layer].dtype == torch.float32
        assert relative_error(actual[layer], value) < 1e-5


def test_terms_are_taken_per_minibatch_not_of_the_mean_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    bsdp.decompose(net)
    delta = net[0].scaling.delta
    scores = ScoreAccumulator(named_pairs(net))
    for value in (1.0, -1.0):
        delta.grad = torch.full_like(delta, value)
        scores.update()
    assert scores.compute()["0"].tolist() == [1.0] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "square_overflows"])
def test_a_step_that_is_not_finite_counts_for_nothing(bad: float) -> None:
    net = scored_net(dtype=torch.float32)
    pairs = named_pairs(net)
    clean, dirty = ScoreAccumulator(pairs), ScoreAccumulator(pairs)
    for step in range(3):
        backward(net, make_input("conv", dtype=torch.float32))
        if step == 1:
            pairs["conv1"].scaling.delta.grad[2] = bad
            dirty.update()
            continue
        clean.update()
        dirty.update()
    assert dirty.steps == clean.steps == 2
    for name, value in clean.compute().items():
        assert torch.equal(dirty.compute()[name], value)


def test_a_layer_without_a_gradient_scores_zero_in_that_step() -> None:
    net = scored_net()
    pairs = named_pairs(net)
    scores = ScoreAccumulator(pairs)
    backward(net, make_input("conv"))
    first = (pairs["conv1"].scale * pairs["conv1"].scaling.delta.grad).detach().square()
    scores.update()
    pairs["conv1"].scaling.delta.grad = None
    scores.update()
    assert scores.steps == 2
    assert relative_error(scores.compute()["conv1"], first / 2) < 1e-6


def test_a_step_without_any_gradient_does_not_count() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net))
    scores.update()
    assert scores.steps == 0
    with pytest.raises(ValueError, match="no finite gradient was accumulated"):
        scores.compute()


def test_only_steps_that_were_not_finite_are_refused_too() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net))
    named_pairs(net)["conv1"].scaling.delta.grad = torch.full((8,), float("nan"), dtype=torch.float64)
    scores.update()
    with pytest.raises(ValueError, match="no finite gradient was accumulated"):
        scores.compute()


def test_reset_forgets_and_takes_the_new_ranks() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net))
    backward(net, make_input("conv"))
    scores.update()
    net.conv1.keep(torch.tensor([1, 4]))
    scores.reset()
    assert scores.steps == 0
    backward(net, make_input("conv"))
    scores.update()
    assert scores.compute()["conv1"].shape == (2,)


# Oracle 12
@pytest.mark.parametrize("importance", [*TAYLOR, "fisher", "second_order"])
def test_a_basis_multiplied_by_zero_downstream_scores_zero_and_goes_first(importance: str) -> None:
    net = scored_net("residual")
    pair = named_pairs(net)["left"]
    pair.scaling.weight.data[:, 5] = 0.0
    scores = ScoreAccumulator(named_pairs(net), importance=importance)
    for _ in range(2):
        inputs = make_input("residual")
        with scores.collecting():
            backward(net, inputs)
        scores.update()
        if scores.needs_curvature:
            scores.update_curvature(lambda x=inputs: net(x).square().mean())  # type: ignore[misc]
    computed = scores.compute()
    assert computed["left"][5] == 0.0
    assert sorted(torch.cat(list(computed.values())).tolist())[1] > 0.0
    plan = bsdp.select(
        computed, bsdp.measure_cost(net), budget=sum(len(v) for v in computed.values()) - 1, kind="bases"
    )
    assert plan.removed == 1
    assert plan.keep["left"].tolist() == [0, 1, 2, 3, 4, 6, 7]


def test_magnitude_needs_no_gradient() -> None:
    net = scored_net()
    pair = named_pairs(net)["conv1"]
    scores = ScoreAccumulator(named_pairs(net), importance="magnitude")
    assert not scores.needs_gradients
    scores.update()
    expected = (pair.scale * pair.scaling.sigma).abs()
    assert relative_error(scores.compute()["conv1"], expected) < 1e-6


def test_sigma_energy_keeps_the_smallest_ranks_that_hold_one_share_of_the_energy_in_every_layer() -> None:
    for sigma in (torch.tensor([1.0, 4.0, 2.0]), torch.tensor([3.0, 2.9, 0.5, 0.1])):
        scores = sigma_energy(0.5 * torch.ones_like(sigma), 2.0 * sigma)
        ordered = sigma.sort(descending=True).values
        for share in (0.5, 0.7, 0.9, 0.97):
            reached = [float(ordered[:rank].square().sum() / sigma.square().sum()) for rank in range(1, len(sigma) + 1)]
            rank = 1 + next(i for i, value in enumerate(reached) if value >= share)
            kept = scores > 1.0 - share  # what a ranking of all layers together leaves
            assert sigma[kept].sort(descending=True).values.tolist() == ordered[:rank].tolist()
    grouped = sigma_energy(torch.tensor([1.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 3.0]), groups=2)
    assert torch.allclose(grouped, torch.tensor([0.2, 1.0, 0.1, 1.0]))


def test_energy_is_the_output_error_of_dropping_each_basis_alone() -> None:
    net = scored_net("conv")
    inputs = make_input("conv")
    pair = named_pairs(net)["conv1"]
    statistics = FeatureStatistics(named_pairs(net))
    with statistics.collecting():
        net(inputs)
    energies = ScoreAccumulator(named_pairs(net), importance="energy").compute(statistics)["conv1"]
    expected = pair(inputs)
    for k in range(8):
        dropped = copy.deepcopy(pair)
        dropped.scaling.delta.data[k] = -1.0
        error = (dropped(inputs) - expected).square().sum() / (4 * 8 * 8)
        assert float(energies[k]) == pytest.approx(error.item(), rel=1e-5)


def test_energy_without_statistics_is_refused_naming_the_layer() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net), importance="energy")
    for statistics in (None, FeatureStatistics(named_pairs(net))):
        with pytest.raises(ValueError, match="`importance='energy'` needs feature statistics of layer 'conv1'"):
            scores.compute(statistics)


def test_an_unknown_importance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`importance` must be one of 'mean_square'.*Did you mean 'mean_square'"):
        ScoreAccumulator({}, importance="mean_squared")


def test_a_model_without_pairs_scores_nothing() -> None:
    scores = ScoreAccumulator({})
    scores.update()
    assert scores.steps == 0
    assert ScoreAccumulator({}, importance="magnitude").compute() == {}


def through_a_file(state: object) -> object:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_score_state_round_trips_and_accumulation_goes_on(importance: str) -> None:
    net = scored_net()
    pairs = named_pairs(net)
    whole, first = ScoreAccumulator(pairs, importance=importance), ScoreAccumulator(pairs, importance=importance)
    statistics = FeatureStatistics(pairs)
    for step in range(4):
        if step == 2:
            resumed = ScoreAccumulator(pairs, importance=importance)
            resumed.load_state_dict(through_a_file(first.state_dict()))  # type: ignore[arg-type]
            first = resumed
        inputs = make_input("conv", batch=3)
        for scores in (whole, first):
            with statistics.collecting(), scores.collecting():
                backward(net, inputs)
            scores.update()
            if scores.needs_curvature:
                signs = torch.Generator().manual_seed(step)
                scores.update_curvature(lambda x=inputs: net(x).square().mean(), generator=signs)  # type: ignore[misc]
    for name, value in whole.compute(statistics).items():
        assert torch.equal(first.compute(statistics)[name], value)
    counted = {**dict.fromkeys(TAYLOR, 4), "second_order": 4, "fisher": 12}
    assert first.steps == whole.steps == counted.get(importance, 0)


def test_sums_of_another_kind_of_score_are_not_taken_over() -> None:
    net = scored_net()
    scores, other = (ScoreAccumulator(named_pairs(net), importance=kind) for kind in ("mean_square", "mean_abs"))
    backward(net, make_input("conv"))
    scores.update()
    other.load_state_dict(scores.state_dict())
    assert other.steps == 0


def test_a_state_taken_earlier_does_not_change_later() -> None:
    net = scored_net()
    pairs = named_pairs(net)
    scores, statistics = ScoreAccumulator(pairs), FeatureStatistics(pairs)
    states = []
    for _ in range(2):
        with statistics.collecting():
            backward(net, make_input("conv"))
        scores.update()
        states.append((scores.state_dict(), statistics.state_dict()))
        if len(states) == 1:
            frozen = copy.deepcopy(states[0])
    assert torch.equal(states[0][0]["sum"], frozen[0]["sum"])
    assert torch.equal(states[0][1]["sums"]["conv1"], frozen[1]["sums"]["conv1"])
    assert not torch.equal(states[0][1]["sums"]["conv1"], states[1][1]["sums"]["conv1"])


def test_scores_of_other_ranks_are_refused() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net))
    backward(net, make_input("conv"))
    scores.update()
    state = scores.state_dict()
    net.conv1.keep(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="other ranks"):
        scores.load_state_dict(state)


def test_an_empty_state_round_trips() -> None:
    net = scored_net()
    scores = ScoreAccumulator(named_pairs(net))
    scores.load_state_dict(ScoreAccumulator(named_pairs(net)).state_dict())
    assert scores.steps == 0


# --- feature statistics


def direct(features: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    rows = features.detach().movedim(axis, 0).flatten(1)
    return rows.mean(1), rows.square().mean(1)


@pytest.mark.parametrize("name", ["first_conv", "groups", "conv1d", "conv3d_groups", "linear_narrow", "linear_tokens"])
def test_statistics_equal_the_direct_computation_over_uneven_batches(name: str) -> None:
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    pair = bsdp.pair_from_layer(layer)
    statistics = FeatureStatistics({"layer": pair})
    batches = [torch.randn(n, *case.input_shape[1:], dtype=torch.float64) + n for n in (4, 4, 1)]
    with statistics.collecting():
        features = [pair.basis(batch) for batch in batches]
    mean, second = direct(torch.cat(features), -1 if isinstance(layer, nn.Linear) else 1)
    assert mean.shape == (pair.groups * pair.rank,)
    assert relative_error(statistics.means()["layer"], mean) < 1e-12
    assert relative_error(statistics.second_moments()["layer"], second) < 1e-12


def test_statistics_of_a_module_called_at_two_sizes_weigh_every_position_alike() -> None:
    net, inputs = scored_net("shared"), make_input("shared")
    statistics = FeatureStatistics(named_pairs(net))
    seen: list[Tensor] = []
    net.first.basis.register_forward_hook(lambda m, i, o: seen.append(o))
    with statistics.collecting():
        net(inputs)
    rows = torch.cat([o.movedim(1, 0).flatten(1) for o in seen], dim=1).detach()
    assert [tuple(o.shape[2:]) for o in seen] == [(8, 8), (4, 4)]
    assert relative_error(statistics.means()["first"], rows.mean(1)) < 1e-12


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(3, 6, 3), (3, 7, 7)), (nn.Linear(3, 6), (3,))])
def test_statistics_of_inputs_without_a_batch_axis(layer: nn.Module, shape: tuple[int, ...]) -> None:
    pair = bsdp.pair_from_layer(layer.double())
    statistics = FeatureStatistics({"layer": pair})
    inputs = torch.randn(shape, dtype=torch.float64)
    with statistics.collecting():
        pair(inputs)
    mean, _ = direct(pair.basis(inputs)[None], 1)
    assert relative_error(statistics.means()["layer"], mean) < 1e-12


def test_nothing_is_recorded_outside_of_collecting_even_after_an_error() -> None:
    net = scored_net()
    statistics = FeatureStatistics(named_pairs(net))
    with pytest.raises(RuntimeError), statistics.collecting():
        net(torch.zeros(1, 5, 8, 8, dtype=torch.float64))
    net(make_input("conv"))
    assert statistics.means() == statistics.second_moments() == {}
    assert not any(pair.basis._forward_hooks for pair in named_pairs(net).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_features_neither_overflow_nor_lose_small_means(dtype: torch.dtype) -> None:
    pair = bsdp.pair_from_layer(nn.Linear(4, 4))
    statistics = FeatureStatistics({"layer": pair})
    for _ in range(3):
        statistics.update("layer", torch.full((4096, 4), 300.0, dtype=dtype))
    value = float(torch.tensor(300.0, dtype=dtype))
    assert statistics.means()["layer"].tolist() == [value] * 4
    assert statistics.second_moments()["layer"].tolist() == [value**2] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "square_overflows"])
def test_features_that_are_not_finite_count_for_nothing(bad: float) -> None:
    pair = bsdp.pair_from_layer(nn.Linear(4, 4))
    statistics = FeatureStatistics({"layer": pair})
    features = torch.randn(6, 4)
    broken = features.clone()
    broken[2, 1] = bad
    statistics.update("layer", broken)
    assert statistics.means() == statistics.second_moments() == {}
    statistics.update("layer", features)
    mean, second = direct(features, -1)
    assert relative_error(statistics.means()["layer"], mean) < 1e-6
    assert relative_error(statistics.second_moments()["layer"], second) < 1e-6


def test_statistics_state_round_trips_and_collection_goes_on() -> None:
    net = scored_net()
    whole, first = FeatureStatistics(named_pairs(net)), FeatureStatistics(named_pairs(net))
    for step in range(3):
        if step == 1:
            resumed = FeatureStatistics(named_pairs(net))
            resumed.load_state_dict(through_a_file(first.state_dict()))  # type: ignore[arg-type]
            first = resumed
        with whole.collecting(), first.collecting():
            net(make_input("conv", batch=step + 1))
    assert first.means().keys() == {"conv1", "conv2"}
    for name, value in whole.second_moments().items():
        assert torch.equal(first.second_moments()[name], value)
        assert torch.equal(first.means()[name], whole.means()[name])


def test_loading_statistics_replaces_what_was_there_and_allows_missing_layers() -> None:
    net = scored_net()
    source, target = FeatureStatistics({"conv2": net.conv2}), FeatureStatistics(named_pairs(net))
    for statistics in (source, target):
        with statistics.collecting():
            net(make_input("conv"))
    target.load_state_dict(source.state_dict())
    assert list(target.means()) == ["conv2"]
    assert torch.equal(target.means()["conv2"], source.means()["conv2"])


def test_statistics_of_another_rank_are_refused_and_unknown_layers_ignored() -> None:
    net = scored_net()
    statistics = FeatureStatistics(named_pairs(net))
    with statistics.collecting():
        net(make_input("conv"))
    state = statistics.state_dict()
    only = FeatureStatistics({"conv2": net.conv2})
    only.load_state_dict(state)
    assert list(only.means()) == ["conv2"]
    net.conv1.keep(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="another rank of layer 'conv1'"):
        statistics.load_state_dict(state)


# --- several processes


class Processes:
    """Averages over two processes: calls are recorded for one and replayed with the other's values."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def record(self, value: Tensor) -> Tensor:
        self.sent.append(value.clone())
        return value

    def average(self, value: Tensor) -> Tensor:
        other = self.sent.pop(0)
        assert other.shape == value.shape
        assert other.dtype == value.dtype
        return (value + other) / 2


def test_reduced_scores_are_those_of_all_minibatches_together() -> None:
    net = scored_net()
    pairs = named_pairs(net)
    ranks = [ScoreAccumulator(pairs), ScoreAccumulator(pairs)]
    both = ScoreAccumulator(pairs)
    for accumulator, steps in zip(ranks, (3, 1), strict=True):
        for _ in range(steps):
            backward(net, make_input("conv"))
            accumulator.update()
            both.update()
    processes = Processes()
    ranks[1].reduce(processes.record)
    ranks[0].reduce(processes.average)
    assert processes.sent == []
    for name, value in both.compute().items():
        assert relative_error(ranks[0].compute()[name], value) < 1e-6


def test_a_process_without_any_step_joins_the_reduction() -> None:
    net = scored_net()
    pairs = named_pairs(net)
    idle, busy = ScoreAccumulator(pairs), ScoreAccumulator(pairs)
    backward(net, make_input("conv"))
    busy.update()
    expected = busy.compute()
    processes = Processes()
    idle.reduce(processes.record)
    busy.reduce(processes.average)
    assert processes.sent == []
    assert torch.allclose(busy.compute()["conv1"], expected["conv1"])


def test_reduced_statistics_are_those_of_all_examples_together() -> None:
    net = scored_net(dtype=torch.float32)
    both, idle, busy = (FeatureStatistics(named_pairs(net)) for _ in range(3))
    for batch in (4, 1):  # uneven: a mean of means would be wrong
        with both.collecting(), (busy if batch == 4 else idle).collecting():
            net(make_input("conv", batch=batch, dtype=torch.float32) + batch)
    processes = Processes()
    idle.reduce(processes.record)
    busy.reduce(processes.average)
    assert processes.sent == []
    for name, value in both.means().items():
        assert relative_error(busy.means()[name], value) < 1e-5
        assert relative_error(busy.second_moments()[name], both.second_moments()[name]) < 1e-5


def test_a_process_that_saw_no_features_joins_the_reduction() -> None:
    net = scored_net(dtype=torch.float32)
    idle, busy = FeatureStatistics(named_pairs(net)), FeatureStatistics(named_pairs(net))
    with busy.collecting():
        net(make_input("conv", dtype=torch.float32))
    expected = busy.means()["conv1"]
    processes = Processes()
    idle.reduce(processes.record)
    busy.reduce(processes.average)
    assert processes.sent == []
    assert torch.allclose(busy.means()["conv1"], expected)


def test_the_term_is_what_the_loss_loses_as_a_basis_begins_to_shrink() -> None:
    net, inputs = scored_net("residual"), make_input("residual")
    backward(net, inputs)
    loss = net(inputs).square().mean().item()
    for name, terms in scale_terms(net).items():
        for k in (0, len(terms) - 1):
            shrunk = copy.deepcopy(net)
            delta = named_pairs(shrunk)[name].scaling.delta.data
            delta[k] = (1 + delta[k]) * (1 - 1e-6) - 1
            change = (shrunk(inputs).square().mean().item() - loss) / -1e-6
            assert change == pytest.approx(float(terms[k]), rel=1e-3, abs=1e-8)
