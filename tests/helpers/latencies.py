"""Latency tables that nobody measured."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

import bsdp
from bsdp.cost import LayerCost
from bsdp.plain_layers import layer_groups, layer_inputs, layer_outputs, weight_of


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


def widths_of(network: nn.Module, example: Tensor, *, fixed: int = 1000) -> bsdp.ChannelLatencyTable:
    """One nanosecond per weight of every layer whose channels can go, timed at one channel and at all.

    Args:
        network: A plain network.
        example: Its input.
        fixed: Nanoseconds of the rest.
    """
    members = (member for group in bsdp.channel_groups(network, example).values() for member in group.members)
    names = dict.fromkeys(member.layer for member in members if member.weighted)
    layers = {name: _layer_widths(network.get_submodule(name)) for name in names}
    return bsdp.ChannelLatencyTable(layers, fixed, batch_size=2, input_shapes=(tuple(example.shape),))


def _layer_widths(layer: nn.Module) -> bsdp.LayerWidths:
    inputs, outputs, weight = layer_inputs(layer), layer_outputs(layer), weight_of(layer)
    kernel = weight[0, 0].numel()
    if layer_groups(layer) == inputs > 1:
        return bsdp.LayerWidths((1, inputs), (), ((kernel,), (inputs * kernel,)))
    sizes, makes = ((1, size) if size > 1 else (1,) for size in (inputs, outputs))
    return bsdp.LayerWidths(sizes, makes, tuple(tuple(i * o * kernel for o in makes) for i in sizes))
