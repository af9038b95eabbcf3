"""Choosing which bases to remove: one ranking of all layers, down to a share or a budget.

The unit of removal is, in every layer, the i-th weakest basis of all its groups together, so that groups keep equal
ranks. Costs follow the deployment rule of `bsdp.cost`: above a layer's break-even rank a removal saves nothing.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bsdp._checks import check_at_least, check_choice, check_share, check_whole
from bsdp.cost import BASIS_KINDS, LayerCost, ModelCost

RANKINGS = ("importance", "per_cost", "hull", "local", "isomorphic")

_ROUNDING = 1e-9  # 20 * (1 - 0.95) is a little more than 1; counts must not change for that


@dataclass(frozen=True)
class PruningPlan:
    """Which bases stay.

    Attributes:
        keep: Per layer the positions to keep among its ``groups * rank`` bases, ascending.
        ranks_before: Rank per group and layer when the plan was made.
        ranks: Rank per group and layer after it.
        reached: Whether the budget is met; False when the floor and the cap per round stood in the way.
    """

    keep: dict[str, Tensor]
    ranks_before: dict[str, int]
    ranks: dict[str, int]
    reached: bool

    @property
    def removed(self) -> int:
        """Units removed, a unit being one basis in each group of a layer."""
        return sum(self.ranks_before.values()) - sum(self.ranks.values())


@dataclass(frozen=True)
class _Units:
    """One layer's units, weakest first."""

    name: str
    cost: LayerCost
    order: Tensor  # [groups, rank] positions inside the group, weakest first
    importance: list[float]  # [rank], ascending
    stops: list[int]  # numbers of units that may be gone, ascending from 0

    @property
    def rank(self) -> int:
        return len(self.importance)

    @property
    def most(self) -> int:
        """How many may be removed."""
        return self.stops[-1]

    def keep(self, removed: int) -> Tensor:
        local = self.order[:, removed:].sort(1).values
        return (local + self.rank * torch.arange(self.order.shape[0])[:, None]).flatten()


@dataclass(frozen=True)
class _Step:
    """Removal of the next `count` units of a layer."""

    value: float
    layer: int
    count: int


def select(
    importance: Mapping[str, Tensor],
    cost: ModelCost,
    *,
    ratio: float | None = None,
    budget: float | None = None,
    kind: str = "params",
    ranking: str = "importance",
    min_rank: int = 1,
    max_layer_ratio: float = 0.95,
    rank_multiple: int = 1,
) -> PruningPlan:
    """Plan the removal of the weakest bases of a model.

    Args:
        importance: Non-negative scores of every layer in `cost`, ``[groups * rank]``; higher = keep.
        cost: The model's cost (see `measure_cost`).
        ratio: Share of the units alive now to remove, in (0, 1). Give this or `budget`.
        budget: Cost that may remain in the whole model, in units of `kind`. The plan removes no more than needed.
        kind: What `budget` counts: ``"params"``, ``"macs"``, ``"bases"`` or, by a latency table, ``"latency"``.
        ranking: ``"importance"`` removes the least important first; ``"per_cost"`` the least important per unit of
            cost; ``"hull"`` ranks segments of each layer's lower convex hull of (importance lost, cost saved), so that
            a layer is only cut when the cut gets below its break-even rank. With `ratio` every unit costs 1, and the
            three agree. ``"local"`` removes the same share of every layer, ``"isomorphic"`` the same share of every
            class of layers of the same shape (as Fang et al., arXiv 2407.04616, do with channels): for scores that
            say little about one layer against another.
        min_rank: Rank per group that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one plan may remove.
        rank_multiple: Ranks that a layer is cut to are multiples of it (or all that it has), as wide as the vectors of
            the hardware; 1 for any rank. The least rank is then the least multiple from `min_rank` on.

    Returns:
        The plan. Layers that lose nothing are in it with their full `keep`. Where the cost knows measured times, a
        layer that would be deployed as one layer anyway loses nothing.

    Raises:
        ValueError: If an argument is not allowed or scores are negative, NaN or infinite.
    """
    check_choice("kind", kind, BASIS_KINDS)
    check_choice("ranking", ranking, RANKINGS)
    check_whole("min_rank", min_rank, 1)
    check_whole("rank_multiple", rank_multiple, 1)
    check_share("max_layer_ratio", max_layer_ratio)
    if (ratio is None) == (budget is None):
        raise ValueError("give either `ratio` or `budget`.")
    if ratio is not None:
        check_share("ratio", ratio)
    if budget is not None:
        check_at_least("budget", budget, 0)
    _check_names(importance, cost)
    units = [
        _units(name, scores.detach().cpu().double(), cost.layers[name], min_rank, max_layer_ratio, rank_multiple)
        for name, scores in importance.items()
    ]
    available: float
    if ratio is not None:
        kind, available = "units", math.floor(sum(u.rank for u in units) * (1.0 - ratio) + _ROUNDING)
    else:
        assert budget is not None
        available = budget - cost.fixed(kind)
    tables = [_cost_table(unit, kind, cost.new_bias) for unit in units]
    places = _places(units, ranking) if ranking in ("local", "isomorphic") else None
    steps: list[_Step] = []
    for i, (unit, table) in enumerate(zip(units, tables, strict=True)):
        if ranking == "hull":
            steps += _hull_steps(i, unit, table)
        elif places is not None:
            steps += [_Step(places[i][end - 1], i, end - start) for start, end in itertools.pairwise(unit.stops)]
        else:
            steps += _single_steps(i, unit, ranking, kind)
    removed, reached = _remove(units, tables, steps, available)
    if kind not in ("units", "bases"):
        removed = [_worth_it(unit, count) for unit, count in zip(units, removed, strict=True)]
    return PruningPlan(
        keep={u.name: u.keep(n) for u, n in zip(units, removed, strict=True)},
        ranks_before={u.name: u.rank for u in units},
        ranks={u.name: u.rank - n for u, n in zip(units, removed, strict=True)},
        reached=reached,
    )


def select_ranks(importance: Mapping[str, Tensor], cost: ModelCost, ranks: Mapping[str, int]) -> PruningPlan:
    """Plan the removal of each layer's weakest bases down to given ranks.

    Args:
        importance: Non-negative scores of every layer in `cost`, ``[groups * rank]``; higher = keep.
        cost: The model's cost.
        ranks: Rank per group that each layer shall keep, no more than it has; layers where cuts cannot pay keep all.

    Returns:
        The plan; it is always reached.
    """
    _check_names(importance, cost)
    units = [
        _units(name, scores.detach().cpu().double(), cost.layers[name], ranks[name], 1.0)
        for name, scores in importance.items()
    ]
    return PruningPlan(
        keep={u.name: u.keep(u.most) for u in units},
        ranks_before={u.name: u.rank for u in units},
        ranks={u.name: u.rank - u.most for u in units},
        reached=True,
    )


def _check_names(importance: Mapping[str, Tensor], cost: ModelCost) -> None:
    odd = sorted(importance.keys() ^ cost.layers.keys())
    if odd:
        raise ValueError(f"`importance` and `cost` must be of the same layers; only one of them has {odd[0]!r}.")


def least_rank(min_rank: int, multiple: int) -> int:
    """The least rank that a plan leaves, given `min_rank` and `rank_multiple` of `select`."""
    return -(-min_rank // multiple) * multiple


def reachable_rank(
    rank: int, *, rounds: int, min_rank: int = 1, max_layer_ratio: float = 0.95, rank_multiple: int = 1
) -> int:
    """The least rank that a number of plans can leave of a layer.

    Args:
        rank: Its rank now.
        rounds: Plans that follow each other.
        min_rank: See `select`.
        max_layer_ratio: See `select`.
        rank_multiple: See `select`.
    """
    while rounds > 0 and (most := _stops(rank, min_rank, max_layer_ratio, rank_multiple)[-1]):
        rank, rounds = rank - most, rounds - 1
    return rank


def _stops(rank: int, min_rank: int, max_layer_ratio: float, multiple: int) -> list[int]:
    """Numbers of units that one plan can remove from a rank, ascending from 0."""
    floor = max(min(min_rank, rank), math.ceil(rank * (1.0 - max_layer_ratio) - _ROUNDING), 1)
    return [0, *(rank - kept for kept in range(rank - 1, floor - 1, -1) if kept % multiple == 0)]


def _units(
    name: str, scores: Tensor, cost: LayerCost, min_rank: int, max_layer_ratio: float, multiple: int = 1
) -> _Units:
    size, groups = scores.numel(), cost.groups
    if scores.dim() != 1 or size % groups or not 1 <= size // groups <= cost.full_rank:
        raise ValueError(
            f"`importance` of layer {name!r} must be a vector of {cost.groups} groups times a rank of at most "
            f"{cost.full_rank}, got the shape {tuple(scores.shape)}."
        )
    if not (scores.isfinite() & (scores >= 0)).all():
        raise ValueError(f"`importance` of layer {name!r} must be finite and non-negative.")
    ordered = scores.view(cost.groups, -1).sort(dim=1, stable=True)
    rank = ordered.values.shape[1]
    stops = _stops(rank, min_rank, max_layer_ratio, multiple) if cost.cuttable else [0]
    return _Units(name, cost, ordered.indices, ordered.values.sum(0).tolist(), stops)


def _worth_it(unit: _Units, removed: int) -> int:
    """How many units go: none where, by measured times, the layer stays one layer all the same."""
    fused = unit.rank - removed > unit.cost.largest_useful_rank
    return 0 if fused and unit.cost.pair_limit is not None else removed


def _cost_table(unit: _Units, kind: str, new_bias: bool) -> list[float]:
    """Deployed cost of a layer by rank, index 0 unused."""
    if kind == "units":
        return [float(rank) for rank in range(unit.rank + 1)]
    return [float(unit.cost.deployed(max(rank, 1), kind=kind, new_bias=new_bias)) for rank in range(unit.rank + 1)]


def _remove(
    units: list[_Units], tables: list[list[float]], steps: list[_Step], budget: float
) -> tuple[list[int], bool]:
    removed = [0] * len(units)
    total = sum(table[unit.rank] for unit, table in zip(units, tables, strict=True))
    # Python's sort is stable, so a layer's own units stay in their order and ties do not depend on the platform.
    for step in sorted(steps, key=lambda s: s.value):
        if total <= budget:
            break
        unit, table = units[step.layer], tables[step.layer]
        rank = unit.rank - removed[step.layer]
        removed[step.layer] += step.count
        total += table[rank - step.count] - table[rank]
    return removed, total <= budget


def _single_steps(layer: int, unit: _Units, ranking: str, kind: str) -> Iterator[_Step]:
    divisor = 1.0
    if ranking == "per_cost":
        divisor = 1.0 if kind == "units" else float(unit.cost.slope(kind))  # the slope below break-even
    for start, end in itertools.pairwise(unit.stops):
        yield _Step(sum(unit.importance[start:end]) / (end - start) / divisor, layer, end - start)


def _places(units: list[_Units], ranking: str) -> list[list[float]]:
    """Place of each unit, weakest first, in its layer or among all units of its class, as a share in (0, 1]."""
    if ranking == "local":
        return [[(i + 1) / unit.rank for i in range(unit.rank)] for unit in units]
    classes: dict[tuple[int, ...], list[float]] = {}
    shapes = [(unit.cost.fan_in, unit.cost.out_channels, unit.cost.groups) for unit in units]
    for unit, shape in zip(units, shapes, strict=True):
        if unit.cost.cuttable:
            classes.setdefault(shape, []).extend(unit.importance)
    ordered = {shape: sorted(values) for shape, values in classes.items()}
    places = []
    for unit, shape in zip(units, shapes, strict=True):
        values = ordered.get(shape, [])
        places.append([bisect.bisect_right(values, value) / max(1, len(values)) for value in unit.importance])
    return places


def _hull_steps(layer: int, unit: _Units, table: list[float]) -> Iterator[_Step]:
    """Segments of the lower convex hull of (cost saved, importance lost), by rising slope."""
    lost = [0.0]
    for value in unit.importance[: unit.most]:
        lost.append(lost[-1] + value)
    saved = [table[unit.rank] - table[unit.rank - k] for k in range(unit.most + 1)]
    hull = [0]
    for k in unit.stops[1:]:
        if saved[k] <= saved[hull[-1]] and len(hull) == 1:
            continue  # still above break-even: nothing saved
        while len(hull) > 1 and _slope(saved, lost, hull[-2], hull[-1]) > _slope(saved, lost, hull[-2], k):
            hull.pop()
        hull.append(k)
    value = 0.0
    for start, end in itertools.pairwise(hull):
        value = max(value, _slope(saved, lost, start, end))  # rounding must not swap two segments of a layer
        yield _Step(value, layer, end - start)


def _slope(saved: list[float], lost: list[float], start: int, end: int) -> float:
    gain = saved[end] - saved[start]
    return (lost[end] - lost[start]) / gain if gain > 0 else math.inf
