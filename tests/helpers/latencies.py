"""Latency tables that nobody measured."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

import bsdp
from bsdp.cost import LayerCost


def table_of(
    model: nn.Module,
    *,
    speed: float = 1.0,
    slow: tuple[str, ...] = (),
    fixed: int = 1000,
    example: Tensor | None = None,
) -> bsdp.LatencyTable:
    """One nanosecond per weight, and a hundred more per pair, for inputs of any size.

    Args:
        model: A decomposed model.
        speed: Of all pairs against the layers they stand for.
        slow: Layers whose pairs are slower than one layer at any rank.
        fixed: Nanoseconds of the rest.
        example: The model's input, where it must be run to know which layers stay whole.
    """
    costs = bsdp.measure_cost(model, example).layers
    layers = {name: latency_of(cost, speed=speed, slow=name in slow) for name, cost in costs.items()}
    return bsdp.LatencyTable(layers, fixed, batch_size=2, input_shapes=(), multiple=4)


def latency_of(cost: LayerCost, *, speed: float = 1.0, slow: bool = False) -> bsdp.LayerLatency:
    """Times of one layer, at rank 1 and at the break-even rank."""
    cost = replace(cost, pair_limit=None)  # of an earlier table
    ranks = (1, cost.largest_useful_rank)
    times = tuple(int((100 + rank * cost.per_rank) / speed) + slow * cost.fused for rank in ranks)
    return bsdp.LayerLatency(cost.fan_in, cost.out_channels, cost.groups, cost.fused, ranks, times)
