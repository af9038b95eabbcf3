"""Scores of channels: both ways against gates that are really multiplied in, formulas against slow ones, and state."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bsdp import channel_criteria as criteria
from bsdp.channel_importance import CRITERIA, ChannelScores
from bsdp.channel_watching import by_example
from bsdp.importance import NoScoresError
from tests.helpers.channel_nets import CHANNEL_NETS, channel_batch, channel_net, groups_of
from tests.helpers.compare import decomposed

SCORED = [name for name in CRITERIA if name != "channel_scaling"]
COLLECTED = ("taylor_2016", "taylor_2019", "activation_cumsum")


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    """Mean over the examples of something that every output matters for."""
    return net(batch).square().sum(1).mean()


def step(net: nn.Module, scores: ChannelScores, batch: Tensor, *, watch: bool = True, scale: float = 1.0) -> None:
    """One optimizer step without a change of weights."""
    net.zero_grad()
    if watch:
        with scores.collecting(scale):
            (scale * loss_of(net, batch)).backward()
    else:
        loss_of(net, batch).backward()
    scores.update()


def freeze_weights(net: nn.Module) -> None:
    """Leave no weight a gradient."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)


def gate_terms(net: nn.Module, name: str, batch: Tensor) -> dict[str, Tensor]:
    """Gradient of a gate per example and unit that is multiplied into every reader's input, ``[examples, units]``."""
    result = {}
    for group_name, group in groups_of(name).items():
        gate = torch.ones(len(batch), group.size, dtype=torch.float64, requires_grad=True)

        def hook(layer: nn.Module, arguments: tuple[Any, ...], gate: Tensor = gate, members: Any = group) -> Any:
            (inputs,) = arguments
            member = next(m for m in members.sides("in") if net.get_submodule(m.layer) is layer)
            factor = torch.ones(inputs.shape[:2], dtype=torch.float64)
            for unit, positions in enumerate(member.index.tolist()):
                for position in positions:
                    factor[:, position] = gate[:, unit]
            return (inputs * factor.view(*inputs.shape[:2], *(1,) * (inputs.dim() - 2)),)

        handles = [net.get_submodule(m.layer).register_forward_pre_hook(hook) for m in group.sides("in")]
        (result[group_name],) = torch.autograd.grad(loss_of(net, batch), gate)
        for handle in handles:
            handle.remove()
    return result


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same groups with the same scores, to float32."""
    assert one.keys() == other.keys()
    for name, expected in other.items():
        torch.testing.assert_close(one[name], expected.float(), rtol=1e-5, atol=1e-9)


# --- Taylor scores against gates


@pytest.mark.parametrize("way", ["weights", "hooks", "pairs"])
@pytest.mark.parametrize("name", CHANNEL_NETS)
def test_taylor_2019_is_the_squared_gradient_of_a_gate_that_all_readers_share(name: str, way: str) -> None:
    net = channel_net(name)
    batches = [channel_batch(name), channel_batch(name)]
    squares = [{n: t.sum(0).square() for n, t in gate_terms(net, name, batch).items()} for batch in batches]
    if way == "hooks":
        freeze_weights(net)
    net = decomposed(net) if way == "pairs" else net
    scores = ChannelScores(net, groups_of(name), criterion="taylor_2019")
    assert scores.needs_hooks == (way != "weights")
    for batch in batches:
        step(net, scores, batch, watch=way != "weights")
    assert_close(scores.compute(), {n: (squares[0][n] + squares[1][n]) / 2 for n in squares[0]})


def test_taylor_2016_is_the_absolute_gradient_per_example() -> None:
    net, batch = channel_net("residual"), channel_batch("residual")
    scores = ChannelScores(net, groups_of("residual"), criterion="taylor_2016", normalize="none")
    step(net, scores, batch)
    maps = {"layer1.0.conv1": 64, "layer2.0.conv1": 16, "layer3.0.conv1": 4}  # positions of their one reader's input
    terms = gate_terms(net, "residual", batch)
    result = scores.compute()
    assert_close({n: result[n] for n in maps}, {n: (terms[n] / m).abs().sum(0) for n, m in maps.items()})


def test_l2_normalized_scores_have_unit_norm() -> None:
    net = channel_net("concat")
    scores = ChannelScores(net, groups_of("concat"), criterion="taylor_2016")
    step(net, scores, channel_batch("concat"))
    for score in scores.compute().values():
        assert float(score.norm()) == pytest.approx(1.0)


def test_absolute_terms_per_example_are_at_least_that_of_their_mean() -> None:
    terms = torch.randn(7, 5)
    assert (criteria.taylor_2016(terms) >= terms.sum(0).abs()).all()
    assert criteria.taylor_2016(torch.tensor([[1.0], [-1.0]])) == 2.0


@pytest.mark.parametrize("criterion", ["taylor_2016", "taylor_2019"])
def test_an_empty_batch_counts_for_nothing(criterion: str) -> None:
    net = channel_net("flatten")
    freeze_weights(net)  # so that both watch
    scores = ChannelScores(net, groups_of("flatten"), criterion=criterion)
    step(net, scores, channel_batch("flatten"))
    expected = scores.compute()
    with scores.collecting():
        net(channel_batch("flatten")[:0]).sum().backward()
    assert_close(scores.compute(), expected)


@pytest.mark.parametrize("criterion", ["taylor_2016", "taylor_2019"])
def test_a_map_that_is_multiplied_by_zero_downstream_scores_zero(criterion: str) -> None:
    net = channel_net("flatten")
    with torch.no_grad():
        net.get_submodule("hidden").weight[:, 8:12] = 0.0  # type: ignore[index]
    scores = ChannelScores(net, groups_of("flatten"), criterion=criterion)
    step(net, scores, channel_batch("flatten"))
    result = scores.compute()["conv"]
    assert result[2] == 0.0
    assert result.argmin() == 2
    assert (result > 0).sum() > 1


def test_a_group_with_one_frozen_reader_is_hooked_and_the_others_are_not() -> None:
    net, batch = channel_net("concat"), channel_batch("concat")
    expected = {n: t.sum(0).square() for n, t in gate_terms(net, "concat", batch).items()}
    net.get_submodule("conv1").requires_grad_(False)  # reads the group "stem" only
    scores = ChannelScores(net, groups_of("concat"), criterion="taylor_2019")
    step(net, scores, batch, watch=True)
    step(net, scores, batch, watch=False)  # counts for the groups without hooks only
    assert_close(scores.compute(), expected)


# --- steps that count


def test_steps_that_saw_nothing_or_no_finite_term_count_for_nothing() -> None:
    net, batch = channel_net("depthwise"), channel_batch("depthwise")
    freeze_weights(net)
    scores = ChannelScores(net, groups_of("depthwise"), criterion="taylor_2019")
    step(net, scores, batch)
    expected = scores.compute()
    scores.update()
    step(net, scores, batch * float("nan"))
    assert_close(scores.compute(), expected)


@pytest.mark.parametrize("criterion", ["taylor_2016", "taylor_2019"])
def test_gradients_are_divided_by_the_loss_scale_and_the_model_is_left_as_found(criterion: str) -> None:
    net, batch = channel_net("depthwise"), channel_batch("depthwise")
    freeze_weights(net)
    one, other = (ChannelScores(net, groups_of("depthwise"), criterion=criterion, normalize="none") for _ in "ab")
    step(net, one, batch)
    step(net, other, batch, scale=1024.0)
    assert_close(one.compute(), other.compute())
    assert not any(module._forward_pre_hooks for module in net.modules())


# --- criteria without gradients


SLOW: dict[str, Callable[[Tensor, int], Tensor]] = {
    "l1": lambda f, k: f[k].abs().sum(),
    "l2": lambda f, k: f[k].square().sum().sqrt(),
    "fpgm": lambda f, k: torch.stack([(f[k] - other).norm() for other in f]).sum(),
}


@pytest.mark.parametrize("criterion", SLOW)
def test_norms_of_the_filters_of_all_makers(criterion: str) -> None:
    net = channel_net("residual")
    makers = [net.get_submodule(n).weight for n in ("conv1", "layer1.0.conv2")]
    filters = torch.cat([w.detach().flatten(1) for w in makers], 1)  # type: ignore[union-attr, operator]
    expected = torch.stack([SLOW[criterion](filters, k) for k in range(16)])
    for model in (net, decomposed(net)):
        scores = ChannelScores(model, groups_of("residual"), criterion=criterion, normalize="none").compute()
        torch.testing.assert_close(scores["conv1"], expected.float(), rtol=1e-4, atol=1e-5)


def test_bn_scale_is_the_mean_absolute_scale_of_the_groups_batch_norms() -> None:
    net = channel_net("residual")
    norms = [net.get_submodule(n) for n in ("bn1", "layer1.0.bn2")]
    for norm in norms:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    scores = ChannelScores(net, groups_of("residual"), criterion="bn_scale").compute()
    expected = sum(n.weight.detach().abs() for n in norms) / 2  # type: ignore[operator, union-attr]
    torch.testing.assert_close(scores["conv1"], expected.float())


def test_groups_without_batch_norm_have_no_bn_scale_and_a_net_without_any_is_refused() -> None:
    scores = ChannelScores(channel_net("flatten"), groups_of("flatten"), criterion="bn_scale").compute()
    assert list(scores) == ["conv"]
    with pytest.raises(ValueError, match=r"needs batch norm.*choose l1 or taylor_2019"):
        ChannelScores(channel_net("transposed"), groups_of("transposed"), criterion="bn_scale")


def test_activation_cumsum_is_the_mean_activation_that_readers_see() -> None:
    net = channel_net("flatten")
    scores = ChannelScores(net, groups_of("flatten"), criterion="activation_cumsum")
    batches = [channel_batch("flatten"), channel_batch("flatten", batch=2)]
    seen: list[Tensor] = []
    handle = net.get_submodule("hidden").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with scores.collecting(), torch.no_grad():
        for batch in batches:
            net(batch)
    handle.remove()
    with scores.collecting(), torch.no_grad():
        net(batches[0] * float("nan"))
    expected = torch.cat(seen).relu().view(6, 6, 4).mean((0, 2))
    torch.testing.assert_close(scores.compute()["conv"], expected.float())


# --- the cumulative sum


@pytest.mark.parametrize("theta", [0.1, 0.5, 0.8, 0.95, 1.0])
def test_uniform_statistics_have_the_redundancy_one_minus_theta(theta: float) -> None:
    assert criteria.redundancy(torch.full((100,), 0.3), theta) == pytest.approx(1.0 - theta, abs=0.011)


def test_a_dead_filter_is_never_kept_and_more_theta_keeps_more() -> None:
    statistics = torch.rand(50)
    statistics[::5] = 0.0
    kept = [criteria.kept_by_cumsum(statistics, theta) for theta in (0.01, 0.3, 0.6, 0.9, 1.0)]
    assert kept == sorted(kept)
    assert 1 == kept[0] < kept[-1] <= 40
    assert criteria.kept_by_cumsum(torch.zeros(3), 0.9) == 1
    assert criteria.kept_by_cumsum([3.0, 1.0], 0.75) == 1


@pytest.mark.parametrize(("statistics", "theta"), [([1.0], 0.0), ([1.0], 1.1), ([-1.0], 0.5), ([float("nan")], 0.5)])
def test_statistics_and_theta_are_checked(statistics: list[float], theta: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        criteria.kept_by_cumsum(statistics, theta)


# --- state


@pytest.mark.parametrize("criterion", SCORED)
def test_a_state_dict_continues(criterion: str) -> None:
    net, groups = channel_net("flatten"), groups_of("flatten")
    batches = [channel_batch("flatten") for _ in range(2)]
    whole, first, second = (ChannelScores(net, groups, criterion=criterion, seed=s) for s in (3, 3, 4))
    for batch in batches:
        step(net, whole, batch)
    step(net, first, batches[0])
    whole.compute(), first.compute()  # a draw, for "random"
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    step(net, second, batches[1])
    assert_close(second.compute(), whole.compute())


def test_a_state_of_another_criterion_or_model_is_refused() -> None:
    net, groups = channel_net("flatten"), groups_of("flatten")
    state = ChannelScores(net, groups, criterion="l1").state_dict()
    with pytest.raises(ValueError, match="criterion 'l1'"):
        ChannelScores(net, groups, criterion="l2").load_state_dict(state)
    with pytest.raises(ValueError, match="other groups"):
        ChannelScores(channel_net("concat"), groups_of("concat"), criterion="l1").load_state_dict(state)


@pytest.mark.parametrize("criterion", COLLECTED)
def test_reduce_joins_processes_with_as_many_calls_also_without_any_step(criterion: str) -> None:
    net, groups = channel_net("flatten"), groups_of("flatten")
    busy, idle = (ChannelScores(net, groups, criterion=criterion) for _ in "ab")
    step(net, busy, channel_batch("flatten"))
    expected, gathered = busy.compute(), [[], []]  # type: ignore[var-annotated]
    busy.reduce(lambda t: (gathered[0].append(t), t / 2)[1])
    idle.reduce(lambda t: (gathered[1].append(t), gathered[0][len(gathered[1]) - 1] / 2)[1])
    assert [t.shape for t in gathered[0]] == [t.shape for t in gathered[1]]
    assert_close(busy.compute(), expected)
    assert_close(idle.compute(), expected)


# --- refusals


@pytest.mark.parametrize("criterion", COLLECTED)
def test_without_any_data_there_are_no_scores(criterion: str) -> None:
    net = channel_net("flatten")
    scores = ChannelScores(net, groups_of("flatten"), criterion=criterion)
    with pytest.raises(NoScoresError, match="no finite"):
        scores.compute()
    step(net, scores, channel_batch("flatten"))
    scores.rebind(groups_of("flatten"))
    with pytest.raises(NoScoresError, match="no finite"):
        scores.compute()


def test_choices_are_checked() -> None:
    net, groups = channel_net("flatten"), groups_of("flatten")
    for criterion in ("taylor", "channel_scaling"):
        with pytest.raises(ValueError, match="`criterion` must be one of"):
            ChannelScores(net, groups, criterion=criterion)
    with pytest.raises(ValueError, match="`normalize` must be one of"):
        ChannelScores(net, groups, criterion="l1", normalize="max")


def test_nan_weights_give_no_scores() -> None:
    net = channel_net("flatten")
    nn.init.constant_(net.get_submodule("conv").weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(NoScoresError, match="'conv'"):
        ChannelScores(net, groups_of("flatten"), criterion="l1").compute()


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 1, 1), nn.Conv1d(3, 1, 1), nn.Linear(3, 1)])
@pytest.mark.parametrize("mean", [True, False])
def test_positions_are_reduced_where_channels_are_of_the_layer_with_and_without_examples(
    layer: nn.Module, mean: bool
) -> None:
    positions = {nn.Conv2d: (4, 5), nn.Conv1d: (6,)}.get(type(layer), ())
    values = torch.randn(2, 3, *positions)
    expected = torch.stack([(v.flatten(1).mean(1) if mean else v.flatten(1).sum(1)) for v in values[..., None]])
    torch.testing.assert_close(by_example(layer, values, mean=mean), expected)
    torch.testing.assert_close(by_example(layer, values[0], mean=mean), expected[:1])
    if not positions:  # tokens of a linear layer
        torch.testing.assert_close(
            by_example(layer, values[None], mean=mean), values.mean(0)[None] if mean else values.sum(0)[None]
        )
