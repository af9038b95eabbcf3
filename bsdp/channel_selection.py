"""Choosing which channels to remove: one ranking over all groups, down to a budget.

A layer between two groups shrinks on both sides, so what a channel saves depends on what went before it. `ChannelCost`
follows the widths of all layers; a pair costs the cheaper of its two forms at its rank, as in `bsdp.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_choice, check_share, check_whole
from bsdp.channel_criteria import kept_by_cumsum
from bsdp.channel_group import ChannelGroup
from bsdp.channel_latency import ChannelLatencyTable
from bsdp.cost import LayerCost, Positions, layer_cost
from bsdp.layers import BasisPair
from bsdp.plain_layers import layer_inputs, weight_of

CHANNEL_KINDS = ("params", "macs", "channels")
TIMED_CHANNEL_KINDS = (*CHANNEL_KINDS, "latency")
CHANNEL_RANKINGS = ("global", "per_cost", "local", "isomorphic", "priority")
NO_WIDTHS = (
    "latency by width was not measured: give a table (`bsdp.measure_channel_latency_table(network, example)` or "
    "`bsdp.ChannelLatencyTable.load(path)`)."
)


@dataclass(frozen=True)
class _Layer:
    """A convolution, linear layer or pair at some width."""

    cost: LayerCost
    inputs: int
    outputs: int
    rank: int | None  # None for a plain layer

    def at(self, inputs: int, outputs: int, *, kind: str, new_bias: bool, rank: int | None = None) -> int:
        """Cost with other numbers of inputs and outputs, and of a pair at another rank if one is given."""
        fan_in = self.cost.fan_in * inputs // self.inputs
        groups = self.cost.groups
        if self.depthwise:
            fan_in, groups = self.cost.fan_in, outputs
        full = max(1, min(fan_in, outputs // groups))
        cost = replace(self.cost, fan_in=fan_in, out_channels=outputs, groups=groups, full_rank=full)
        own = self.rank if rank is None or not self.cost.cuttable else rank
        rank = full if self.rank is None or own is None else min(own, full)
        return cost.deployed(rank, kind=kind, new_bias=new_bias and rank < full)

    @property
    def depthwise(self) -> bool:
        """Whether each channel passes on its own."""
        return self.cost.groups == self.inputs == self.outputs and self.cost.groups > 1


def makers_of(groups: Mapping[str, ChannelGroup]) -> list[str]:
    """The layers that make the channels of groups."""
    return [member.layer for group in groups.values() for member in group.sides("out")]


class ChannelCost:
    """What a network costs as a function of the units removed from its groups.

    Args:
        model: The network, plain or decomposed.
        groups: Its groups, from `channel_groups`.
        total: Cost of the folded network now, in units of `kind`; not needed for ``"channels"``.
        kind: ``"params"``, ``"macs"``, ``"channels"`` or, by a table, ``"latency"``.
        positions: Positions of the layers per example, for ``"macs"`` (see `measure_positions`). Batch norms count
            if they are among them.
        new_bias: Whether a pair below full rank has a bias that the original lacked.
        makers: For ``"channels"``: layers whose outputs count wherever they are members; None for those that make a
            group now. A grouped convolution that is down to one channel per group makes none any more.
        latency: For ``"latency"``: the times of the layers by width.

    Raises:
        ValueError: If the kind is not allowed, or its table is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, ChannelGroup],
        *,
        total: int = 0,
        kind: str = "params",
        positions: Mapping[str, Positions] | None = None,
        new_bias: bool = True,
        makers: Collection[str] | None = None,
        latency: ChannelLatencyTable | None = None,
    ) -> None:
        check_choice("kind", kind, TIMED_CHANNEL_KINDS)
        if kind == "latency" and latency is None:
            raise ValueError(NO_WIDTHS)
        self.latency = latency if kind == "latency" else None
        self.makers = makers_of(groups) if makers is None else makers
        self.kind, self.new_bias = kind, new_bias
        self.groups = dict(groups)
        self.layers: dict[str, _Layer] = {}
        self.extra: dict[str, float] = {}
        for group in groups.values():
            for member in group.members:
                module = model.get_submodule(member.layer)
                if member.weighted and member.layer not in self.layers:
                    self.layers[member.layer] = _layer(module, None if positions is None else positions[member.layer])
                if not member.weighted and self.latency is None:
                    more = _per_channel(module, kind, (positions or {}).get(member.layer)) * member.index.shape[1]
                    self.extra[group.name] = self.extra.get(group.name, 0.0) + more
        self.widths = {name: (layer.inputs, layer.outputs) for name, layer in self.layers.items()}
        self.total: float = sum(self._made(g) * g.size for g in groups.values()) if kind == "channels" else total

    def saved(self, group: str, units: int = 1) -> float:
        """What removing some more units of a group would save now."""
        if self.kind == "channels":
            return float(units * self._made(self.groups[group]))
        return units * self.extra.get(group, 0.0) - sum(
            after - before for _, _, before, after in self._step(group, units)
        )

    def rate(self, group: str, units: int) -> float:
        """What removing one of so many units of a group saves in the mean; times do not fall by the same for each."""
        return self.saved(group, units) / units if self.latency is not None and units else self.saved(group)

    def _made(self, group: ChannelGroup) -> int:
        """Output channels per unit, of all layers that make the group."""
        made = [*group.sides("out"), *group.sides("both")]
        return sum(member.index.shape[1] for member in made if member.layer in self.makers)

    def remove(self, group: str, units: int = 1) -> None:
        """Note that units were removed."""
        saved = self.saved(group, units)
        for name, widths, _, _ in self._step(group, units):
            self.widths[name] = widths
        self.total -= saved

    def with_ranks(self, ranks: Mapping[str, int]) -> float:
        """The total if the pairs among the layers had other ranks, for ``"params"`` and ``"macs"``."""
        total = self.total
        for name, rank in ranks.items():
            layer = self.layers.get(name)
            if layer is not None and layer.rank is not None:
                options: dict[str, Any] = {"kind": self.kind, "new_bias": self.new_bias}
                total += layer.at(*self.widths[name], rank=rank, **options) - layer.at(*self.widths[name], **options)
        return total

    def _at(self, name: str, inputs: int, outputs: int) -> int:
        if self.latency is not None:
            return self.latency.layers[name].at(inputs, outputs)
        return self.layers[name].at(inputs, outputs, kind=self.kind, new_bias=self.new_bias)

    def _step(self, group: str, units: int) -> list[tuple[str, tuple[int, int], int, int]]:
        if self.kind == "channels":
            return []
        lost: dict[str, list[int]] = {}
        for member in self.groups[group].members:
            if member.weighted:
                entry = lost.setdefault(member.layer, [0, 0])
                count = units * member.index.shape[1]
                if member.side != "out":
                    entry[0] += count
                if member.side != "in":
                    entry[1] += count
        steps = []
        for name, (fewer_inputs, fewer_outputs) in lost.items():
            inputs, outputs = self.widths[name]
            widths = (max(1, inputs - fewer_inputs), max(1, outputs - fewer_outputs))
            steps.append((name, widths, self._at(name, inputs, outputs), self._at(name, *widths)))
        return steps


@dataclass(frozen=True)
class ChannelPlan:
    """Which units of each group go.

    Attributes:
        remove: Units per group, ascending; groups that lose nothing are in it with an empty tensor.
        reached: Whether the budget is met.
        cost: What the network costs afterwards, by the reckoning of `ChannelCost`.
    """

    remove: dict[str, Tensor]
    reached: bool
    cost: float


def select_channels(
    importance: Mapping[str, Tensor],
    cost: ChannelCost,
    *,
    budget: float,
    ranking: str = "global",
    min_channels: int | Mapping[str, int] = 1,
    max_group_ratio: float = 0.95,
    round_to: int = 1,
    threshold: float | None = None,
    theta: float = 0.98,
) -> ChannelPlan:
    """Plan the removal of the weakest channels of a network.

    Args:
        importance: Non-negative scores per group, ``[units]``; higher = keep. Groups without scores stay whole.
        cost: The network's cost; afterwards it is that of the pruned network.
        budget: Cost that may remain in the whole network. The plan removes no more than needed.
        ranking: ``"global"`` removes the least important first, ``"per_cost"`` the least important per unit of cost,
            ``"local"`` the same share of every group, ``"isomorphic"`` the same share of every class of groups with
            the same layers (Fang et al., arXiv 2407.04616), ``"priority"`` cuts the group with the largest redundancy
            of its cumulative sum down to what holds the share `theta`, then the next (see `channel_importance`).
        min_channels: Units that every group keeps at least, or those of each group.
        max_group_ratio: Largest share of a group that one plan may remove.
        round_to: Groups keep multiples of so many channels, as far as removals have begun.
        threshold: Remove no unit of at least this importance.
        theta: Share of the cumulative sum that ``"priority"`` keeps.

    Raises:
        ValueError: If an argument is not allowed, or scores are negative, NaN, infinite or of another size.
    """
    check_choice("ranking", ranking, CHANNEL_RANKINGS)
    least = min_channels if isinstance(min_channels, Mapping) else dict.fromkeys(cost.groups, min_channels)
    for units in least.values():
        check_whole("min_channels", units, 1)
    check_whole("round_to", round_to, 1)
    check_share("max_group_ratio", max_group_ratio)
    check_share("theta", theta)
    check_at_least("budget", budget, 0)
    ordered = {name: _ordered(name, importance[name], cost) for name in cost.groups if name in importance}
    most = {n: _most(len(o.values), least[n], max_group_ratio, threshold, o.values) for n, o in ordered.items()}
    chunks = {n: _chunks(cost.groups[n], cost.groups[n].size, most[n], round_to) for n in ordered}
    removed = dict.fromkeys(cost.groups, 0)
    if ranking == "priority":
        _by_priority(ordered, chunks, cost, budget, removed, theta)
    else:
        for _, name, count in _steps(ordered, chunks, cost, ranking):
            if cost.total <= budget:
                break
            cost.remove(name, count)
            removed[name] += count
    remove = {
        name: ordered[name].indices[:count].sort().values if name in ordered else torch.empty(0, dtype=torch.long)
        for name, count in removed.items()
    }
    return ChannelPlan(remove, cost.total <= budget, cost.total)


def least_units(
    group: ChannelGroup,
    *,
    min_channels: int = 1,
    max_group_ratio: float = 0.95,
    round_to: int = 1,
    rounds: int | None = None,
) -> int:
    """The least number of units that plans of `select_channels` which follow each other leave of a group.

    Args:
        group: The group.
        min_channels: See `select_channels`.
        max_group_ratio: See there.
        round_to: See there.
        rounds: Number of plans; None: `max_group_ratio` does not count.
    """
    size, ratio = group.size, 1.0 if rounds is None else max_group_ratio
    rounds = 1 if rounds is None else rounds
    while rounds > 0 and (removed := sum(_chunks(group, size, _most(size, min_channels, ratio, None, []), round_to))):
        size, rounds = size - removed, rounds - 1
    return size


def signature(group: ChannelGroup, cost: ChannelCost) -> tuple[object, ...]:
    """What makes two groups isomorphic: the same kinds of layers on the same sides, whatever their widths."""
    parts = []
    for member in group.members:
        layer = cost.layers.get(member.layer)
        kernel = 0 if layer is None else layer.cost.fan_in * layer.cost.groups // max(1, layer.inputs)
        parts.append((member.side, member.weighted, member.batch_norm, kernel))
    return tuple(sorted(parts))


def _layer(module: nn.Module, positions: Positions | None) -> _Layer:
    cost = layer_cost(module, positions=positions)
    inputs = layer_inputs(module)
    if isinstance(module, BasisPair):
        return _Layer(cost, inputs, cost.out_channels, module.rank)
    assert weight_of(module) is not None
    return _Layer(replace(cost, whole=True), inputs, cost.out_channels, None)


def _per_channel(module: nn.Module, kind: str, positions: Positions | None) -> float:
    """What one channel of a batch norm or the like costs."""
    sizes = [p.numel() for p in module.parameters(recurse=False)]
    if kind == "macs":  # as fvcore counts a batch norm in eval mode; of other layers little is known
        return 0.0 if positions is None else positions.weights * (2.0 if sizes else 1.0)
    channels = max((p.shape[0] for p in module.parameters(recurse=False) if p.dim()), default=1)
    return sum(sizes) / max(1, channels)


@dataclass(frozen=True)
class _Ordered:
    values: list[float]  # ascending
    indices: Tensor


def _ordered(name: str, scores: Tensor, cost: ChannelCost) -> _Ordered:
    size = cost.groups[name].size
    scores = scores.detach().cpu().double()
    if scores.shape != (size,):
        raise ValueError(
            f"`importance` of group {name!r} must have {size} values, got the shape {tuple(scores.shape)}."
        )
    if not (scores.isfinite() & (scores >= 0)).all():
        raise ValueError(f"`importance` of group {name!r} must be finite and non-negative.")
    result = scores.sort(stable=True)
    return _Ordered(result.values.tolist(), result.indices)


def _most(size: int, minimum: int, ratio: float, threshold: float | None, values: list[float]) -> int:
    most = min(size - min(minimum, size), math.floor(size * ratio + 1e-9))
    if threshold is not None:
        most = min(most, sum(value < threshold for value in values))
    return max(0, most)


def _chunks(group: ChannelGroup, size: int, most: int, round_to: int) -> list[int]:
    """Numbers of units to remove at a time of so many, so that the channels left are always a multiple."""
    per_unit = group.units.shape[1]
    step = round_to // math.gcd(round_to, per_unit)
    if step == 1:
        return [1] * most
    first = size % step or step
    chunks = [first] if first <= most else []
    while chunks and sum(chunks) + step <= most:
        chunks.append(step)
    return chunks


def _steps(
    ordered: Mapping[str, _Ordered], chunks: Mapping[str, list[int]], cost: ChannelCost, ranking: str
) -> list[tuple[float, str, int]]:
    """Removals with what they are ranked by, in order."""
    steps: list[tuple[float, str, int]] = []
    ranks = _isomorphic_ranks(ordered, cost) if ranking == "isomorphic" else {}
    for name, entry in ordered.items():
        start, highest = 0, 0.0
        saved = max(cost.rate(name, sum(chunks[name])), 1e-12) if ranking == "per_cost" else 1.0
        for count in chunks[name]:
            end = start + count
            if ranking == "local":
                value = end / len(entry.values)
            elif ranking == "isomorphic":
                value = ranks[name][end - 1]
            else:
                value = sum(entry.values[start:end]) / count / saved
            highest = max(highest, value)  # a later chunk of the same group never goes first
            steps.append((highest, name, count))
            start = end
    return sorted(steps, key=lambda step: step[0])


def _isomorphic_ranks(ordered: Mapping[str, _Ordered], cost: ChannelCost) -> dict[str, list[float]]:
    """Place of each unit (ascending) among all units of the groups with the same signature, as a share."""
    classes: dict[tuple[object, ...], list[str]] = {}
    for name in ordered:
        classes.setdefault(signature(cost.groups[name], cost), []).append(name)
    ranks: dict[str, list[float]] = {}
    for names in classes.values():
        values = torch.tensor(sorted(value for name in names for value in ordered[name].values), dtype=torch.float64)
        for name in names:
            places = torch.searchsorted(values, torch.tensor(ordered[name].values, dtype=torch.float64), right=True)
            ranks[name] = (places / len(values)).tolist()
    return ranks


def _by_priority(
    ordered: Mapping[str, _Ordered],
    chunks: Mapping[str, list[int]],
    cost: ChannelCost,
    budget: float,
    removed: dict[str, int],
    theta: float,
) -> None:
    """Cut the most redundant group first, each down to what holds the share `theta` of its sum."""
    room = {name: len(entry.values) - kept_by_cumsum(entry.values, theta) for name, entry in ordered.items()}
    for name in sorted(room, key=lambda n: -room[n] / len(ordered[n].values)):
        for count in chunks[name]:
            if cost.total <= budget or removed[name] + count > room[name]:
                break
            cost.remove(name, count)
            removed[name] += count
