"""Choosing channels: the analytic cost against the measured one, rankings, bounds and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bsdp
from bsdp.channel_graph import channel_groups
from bsdp.channel_selection import ChannelCost, select_channels, signature
from bsdp.cost import Positions
from bsdp.stats import described_layers, measure_positions
from tests.helpers.channel_nets import channel_net, groups_of
from tests.helpers.channel_removal import TRACEABLE, cut, random_units, traceable_batch, traceable_net
from tests.helpers.compare import decomposed, half_ranks, keep_ranks
from tests.helpers.marks import slow_but


def measured(net: nn.Module, example: Tensor, kind: str) -> int:
    cost = bsdp.measure_cost(net, example, new_bias=False)
    return cost.deployed({name: pair.rank for name, pair in bsdp.named_pairs(net).items()}, kind)


def positions_of(net: nn.Module, example: Tensor) -> dict[str, Positions]:
    norms = {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    return measure_positions(net, described_layers(net) | norms, example)


# Reference: the real thing, removed and measured
FORMS = [(form, name) for name in TRACEABLE for form in ("plain", "half rank", "full rank")]


@pytest.mark.parametrize(("form", "name"), slow_but([f for f in FORMS if f[0] != "full rank"], FORMS))
def test_the_reckoning_is_what_the_removal_leaves(name: str, form: str) -> None:
    net, example = traceable_net(name), traceable_batch(name, batch=1)
    net = net if form == "plain" else decomposed(net)
    keep_ranks(net, half_ranks(net) if form == "half rank" else {n: p.rank for n, p in bsdp.named_pairs(net).items()})
    groups, positions = channel_groups(net, example), positions_of(net, example)
    options: dict[str, Any] = {"positions": positions, "new_bias": False}
    costs = {
        k: ChannelCost(net, groups, total=measured(net, example, k), kind=k, **options) for k in ("params", "macs")
    }
    remove = random_units(groups)
    for group, units in remove.items():
        for cost in costs.values():
            before, saved = cost.total, cost.saved(group, len(units))
            cost.remove(group, len(units))
            assert cost.total == before - saved
    cut(net, example, remove)
    assert costs["params"].total == measured(net, example, "params")
    macs = measured(net, example, "macs")
    assert macs <= costs["macs"].total <= 1.04 * macs  # pooling is not reckoned


def test_channels_count_every_layer_that_makes_them() -> None:
    cost = ChannelCost(channel_net("residual"), groups_of("residual"), kind="channels")
    assert cost.total == sum(group.channels * len(list(group.sides("out"))) for group in groups_of("residual").values())
    assert cost.saved("conv1", 3) == 3 * len(list(groups_of("residual")["conv1"].sides("out")))


def test_what_a_channel_saves_depends_on_what_went_before() -> None:
    cost = ChannelCost(channel_net("flatten"), groups_of("flatten"), total=1000)
    alone = cost.saved("hidden")
    assert alone == 24 + 1 + 3  # its row, its bias, its column in the head
    cost.remove("conv", 3)
    assert cost.saved("hidden") == 12 + 1 + 3


# --- plans


def plan(name: str = "flatten", *, kind: str = "channels", share: float = 0.5, **options: Any) -> Any:
    net, groups = channel_net(name), groups_of(name)
    cost = ChannelCost(net, groups, total=sum(p.numel() for p in net.parameters()), kind=kind)
    total = cost.total
    importance = options.pop("importance", None) or {
        n: torch.arange(1.0, 1.0 + g.size) * (1 + i) for i, (n, g) in enumerate(groups.items())
    }
    return select_channels(importance, cost, budget=share * total, **options)


def counts(made: Any) -> dict[str, int]:
    return {name: len(units) for name, units in made.remove.items()}


def test_a_budget_that_is_met_already_removes_nothing() -> None:
    made = plan(share=1.0)
    assert (set(counts(made).values()), made.reached) == ({0}, True)


def test_the_global_ranking_removes_the_least_important_first() -> None:
    scores = {"conv": torch.tensor([5.0, 0.3, 9.0, 0.1, 8.0, 7.0]), "hidden": torch.tensor([0.2, 6.0, 0.4, 3.0, 4.0])}
    made = plan(share=7 / 11, importance=scores)
    assert {name: units.tolist() for name, units in made.remove.items()} == {"conv": [1, 3], "hidden": [0, 2]}
    assert made.cost == 7
    assert made.reached


def test_per_cost_prefers_what_saves_more() -> None:
    equal = {"conv": torch.full((6,), 1.0), "hidden": torch.full((5,), 1.0)}
    # A channel of `conv` saves 27 + 1 + 2 and four columns of `hidden`: 50; one of `hidden` 28.
    assert counts(plan(kind="params", share=0.9, importance=equal, ranking="per_cost")) == {"conv": 1, "hidden": 0}
    dear = {"conv": torch.full((6,), 1.5), "hidden": torch.full((5,), 1.0)}
    assert counts(plan(kind="params", share=0.9, importance=dear, ranking="per_cost")) == {"conv": 1, "hidden": 0}
    assert counts(plan(kind="params", share=0.9, importance=dear, ranking="global"))["hidden"] > 0


def test_the_local_ranking_takes_the_same_share_everywhere() -> None:
    made = counts(plan("residual", share=0.5, ranking="local"))
    assert {name: made[name] / group.size for name, group in groups_of("residual").items()} == dict.fromkeys(made, 0.5)


def test_the_isomorphic_ranking_compares_within_classes_only() -> None:
    groups = groups_of("residual")
    cost = ChannelCost(channel_net("residual"), groups, kind="channels")
    inner = {name for name in groups if signature(groups[name], cost) == signature(groups["layer1.0.conv1"], cost)}
    assert inner == {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}
    scores = {n: torch.arange(1.0, 1.0 + g.size) * (1e6 if n in inner else 1.0) for n, g in groups.items()}
    made = counts(plan("residual", share=0.5, ranking="isomorphic", importance=scores))
    share = sum(made[name] for name in inner) / sum(groups[name].size for name in inner)
    assert share == pytest.approx(0.5, abs=0.05)  # the global ranking would take none of them
    assert sum(counts(plan("residual", share=0.5, importance=scores))[name] for name in inner) == 0


def test_the_priority_ranking_cuts_the_most_redundant_group_first() -> None:
    scores = {"conv": torch.tensor([100.0, 0, 0, 0, 0, 1.0]), "hidden": torch.tensor([1.0, 1, 1, 1, 0])}
    made = plan(share=0.7, importance=scores, ranking="priority")
    assert counts(made) == {"conv": 4, "hidden": 0}
    far = plan(share=0.1, importance=scores, ranking="priority")
    assert counts(far) == {"conv": 5, "hidden": 1}  # no further than `theta` of the sum
    assert not far.reached


@pytest.mark.parametrize("ranking", ["global", "per_cost", "local", "isomorphic"])
def test_bounds_per_group(ranking: str) -> None:
    assert counts(plan(share=0.0, ranking=ranking, max_group_ratio=0.999, min_channels=2)) == {"conv": 4, "hidden": 3}
    assert counts(plan(share=0.0, ranking=ranking, max_group_ratio=0.5)) == {"conv": 3, "hidden": 2}
    assert counts(plan(share=0.0, ranking=ranking, min_channels=9)) == {"conv": 0, "hidden": 0}
    rounded = counts(plan(share=0.0, ranking=ranking, max_group_ratio=0.999, round_to=4))
    assert rounded == {"conv": 2, "hidden": 1}


def test_no_ratio_leaves_a_layer_empty() -> None:
    made = plan(share=0.0, max_group_ratio=0.999)
    assert {name: group.size - counts(made)[name] for name, group in groups_of("flatten").items()} == {
        "conv": 1,
        "hidden": 1,
    }
    assert not made.reached


def test_a_threshold_spares_what_is_at_least_as_important() -> None:
    scores = {"conv": torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), "hidden": torch.full((5,), 9.0)}
    assert counts(plan(share=0.0, importance=scores, threshold=0.3)) == {"conv": 3, "hidden": 0}
    assert counts(plan(share=0.0, importance=scores, threshold=0.0)) == {"conv": 0, "hidden": 0}


def test_rounding_counts_channels_of_a_grouped_unit() -> None:
    made = counts(plan("grouped", share=0.0, max_group_ratio=0.999, round_to=4))
    left = {name: (group.size - made[name]) * group.units.shape[1] for name, group in groups_of("grouped").items()}
    assert left == {"stem": 4, "depthwise": 4}


def test_groups_without_scores_stay_whole_and_ties_go_by_position() -> None:
    made = plan(share=0.0, importance={"conv": torch.ones(6)}, max_group_ratio=0.5)
    assert (made.remove["conv"].tolist(), made.remove["hidden"].tolist()) == ([0, 1, 2], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "best"}, "`ranking`"),
        ({"min_channels": 0}, "`min_channels`"),
        ({"round_to": 1.5}, "`round_to`"),
        ({"max_group_ratio": 1.5}, "`max_group_ratio`"),
        ({"theta": 0.0}, "`theta`"),
        ({"share": -1.0}, "`budget`"),
        ({"importance": {"conv": torch.ones(5)}}, "`importance` of group 'conv' must have 6 values"),
        ({"importance": {"conv": torch.tensor([1, 2, 3, 4, 5, float("nan")])}}, "'conv' must be finite and non-neg"),
        ({"importance": {"conv": torch.tensor([1, 2, 3, 4, 5, -1.0])}}, "'conv' must be finite and non-negative"),
        ({"kind": "flops"}, "`kind`"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**options)


# --- properties


def importances(**sizes: int) -> st.SearchStrategy[dict[str, list[float]]]:
    value = st.floats(0, 10, allow_nan=False, width=32)
    return st.fixed_dictionaries({name: st.lists(value, min_size=n, max_size=n) for name, n in sizes.items()})


@settings(max_examples=50, deadline=None)
@given(
    scores=importances(depthwise=8, project=4),
    share=st.floats(0.0, 1.0),
    ranking=st.sampled_from(["global", "per_cost", "local", "isomorphic"]),
    kind=st.sampled_from(["params", "channels"]),
    minimum=st.integers(1, 4),
    round_to=st.sampled_from([1, 2, 4]),
)
def test_budgets_are_met_with_no_more_than_needed(
    scores: dict[str, list[float]], share: float, ranking: str, kind: str, minimum: int, round_to: int
) -> None:
    groups = groups_of("depthwise")
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    options: dict[str, Any] = {"ranking": ranking, "min_channels": minimum, "round_to": round_to}
    made = plan("depthwise", kind=kind, share=share, importance=tensors, **options)
    total = plan("depthwise", kind=kind, share=1.0, importance=tensors).cost
    assert made.reached == (made.cost <= share * total)
    for name, units in made.remove.items():
        left = groups[name].size - len(units)
        assert left >= min(minimum, groups[name].size)
        assert not len(units) or left % round_to == 0
        kept = torch.ones(groups[name].size, dtype=torch.bool)
        kept[units] = False
        assert not len(units) or tensors[name][units].max() <= tensors[name][kept].min()
    bigger = plan("depthwise", kind=kind, share=min(1.0, share + 0.2), importance=tensors, **options)
    assert all(set(bigger.remove[n].tolist()) <= set(made.remove[n].tolist()) for n in groups)
