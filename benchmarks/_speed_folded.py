"""How fast folded networks of half the MACs are, by selection and by engine."""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bsdp
from benchmarks._speed_common import Row, build, milliseconds
from bsdp.channel_selection import ChannelCost
from bsdp.cost import ModelCost
from bsdp.stats import described_layers, measure_positions

NETWORKS = (
    ("bsdp:resnet56", 32),
    ("torchvision:vgg11", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:mobilenet_v2", 64),
)
ENGINES = ("eager", "channels_last", "compile", "onnxruntime")
SELECTIONS = (
    *("macs", "multiples", "latency", "channels", "channel_multiples", "uniform"),
    *("channel_latency", "channel_half_time"),
)
_CHANNELS: dict[str, dict[str, Any]] = {
    "channels": {"ranking": "per_cost"},
    "channel_multiples": {"ranking": "per_cost", "round_to": 8},
    "uniform": {"ranking": "local", "round_to": 16},
    "channel_latency": {"ranking": "per_cost"},
    "channel_half_time": {"ranking": "per_cost"},
}
_TIMED = ("channel_latency", "channel_half_time")
_SHARE = 0.5


def folded(options: argparse.Namespace) -> Iterator[Row]:
    """Speed-up over MAC reduction of networks cut to half of their MACs, with random weights.

    Of bases, by the sum of squared singular values that they keep:

      macs       half of the MACs, per_cost, any rank: the default of the pruner
      multiples  the same with ranks that are multiples of eight
      latency    as long a pass, by the latency table, as `macs` has, on the hull: keeps more in the same time

    Of channels, by the sum of the squared weights of the filters that make them (`energy_kept` is of those):

      channels            half of the MACs, per_cost: the default of the pruner
      channel_multiples   the same with widths that are multiples of eight
      uniform             the same share of every group, widths that are multiples of sixteen
      channel_latency     as long a pass, by the table of widths, as `channels` has: keeps more in the same time
      channel_half_time   half of the time, by the table

    Batch norms are folded in all networks, the original one included. Tables are measured in eager mode at the batch
    size of the row, with channels last for that engine.
    """
    for backbone, size, *_ in options.networks or NETWORKS:
        for batch in options.batch_sizes:
            for engine in options.engines:
                rows = list(_one(backbone, size, batch, engine, options))
                print(f"  {backbone} {engine} {batch}: " + "; ".join(_short(row) for row in rows), flush=True)
                yield from rows


def _short(row: Row) -> str:
    return f"{row['selection']} {row['speed_up']:.2f} / {row['mac_reduction']:.2f} = {row['speed_up_per_mac']:.2f}"


def _one(backbone: str, size: int, batch: int, engine: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.compiler.reset()  # all networks here share the code of `forward`, which is compiled a few times at most
    image = torch.randn(1, 3, size, size)
    network = build(backbone).eval()
    networks, kept = {"original": bsdp.fold_batch_norm(network, image).model}, {"original": 1.0}
    table: bsdp.LatencyTable | None = None
    widths: bsdp.ChannelLatencyTable | None = None
    for selection in options.selections:
        if selection in _CHANNELS:
            if selection in _TIMED and widths is None:
                widths = _width_table(networks["original"], image, batch, channels_last=engine == "channels_last")
            cut, kept[selection] = _cut_channels(network, image, selection, widths)
        else:
            if selection == "latency":
                table = _table(network, image, batch, channels_last=engine == "channels_last")
            cut, kept[selection] = _cut(network, image, selection, table)
        networks[selection] = bsdp.fold_batch_norm(bsdp.fold(cut), image).model
    macs = {name: bsdp.describe(module, image).macs or 0 for name, module in networks.items()}
    with tempfile.TemporaryDirectory() as folder:
        calls = {name: _call(module, image, batch, engine, Path(folder) / name) for name, module in networks.items()}
        with torch.inference_mode():
            times = milliseconds(calls, repeats=options.repeats if batch < 8 else max(3, options.repeats // 4))
    for name in options.selections:
        reduction, speed_up = macs["original"] / macs[name], times["original"] / times[name]
        yield {
            "part": "folded",
            "network": backbone,
            "image_size": size,
            "batch_size": batch,
            "engine": engine,
            "selection": name,
            "ms_original": times["original"],
            "ms_pruned": times[name],
            "mac_reduction": reduction,
            "speed_up": speed_up,
            "speed_up_per_mac": speed_up / reduction,
            "energy_kept": kept[name],
            "repeats": options.repeats,
        }


def _table(network: nn.Module, image: Tensor, batch: int, *, channels_last: bool) -> bsdp.LatencyTable:
    """Times of the layers beside folded batch norms, which is how they will run."""
    network = copy.deepcopy(network)
    bsdp.decompose(network, example_input=image)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    return bsdp.measure_latency_table(network, image, batch_size=batch, repeats=15 if batch < 8 else 3, warmup=1)


def _width_table(network: nn.Module, image: Tensor, batch: int, *, channels_last: bool) -> bsdp.ChannelLatencyTable:
    """Times of the layers of a network, by width."""
    if channels_last:
        network = copy.deepcopy(network).to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    return bsdp.measure_channel_latency_table(network, image, batch_size=batch, repeats=15 if batch < 8 else 5)


def _cut(network: nn.Module, image: Tensor, selection: str, table: bsdp.LatencyTable | None) -> tuple[nn.Module, float]:
    """A decomposed copy with the MACs halved, and the share of the squared singular values that it keeps."""
    network = copy.deepcopy(network)
    bsdp.decompose(network, example_input=image)
    scores = {name: pair.scaling.sigma.square() for name, pair in bsdp.named_pairs(network).items()}
    cost = bsdp.measure_cost(network, image)
    options: dict[str, Any] = {"budget": _SHARE * cost.original("macs"), "kind": "macs", "ranking": "per_cost"}
    options |= {"max_layer_ratio": 0.99, "rank_multiple": 8 if selection == "multiples" else 1}
    plan = bsdp.select(scores, cost, **options)
    if selection == "latency":
        assert table is not None
        budget = _time_of(cost.with_latency(table), plan.ranks)
        cost = bsdp.measure_cost(network, image, latency=table)
        plan = bsdp.select(scores, cost, **options | {"budget": budget, "kind": "latency", "ranking": "hull"})
    bsdp.prune(network, plan)
    left = sum(float(pair.scaling.sigma.square().sum()) for pair in bsdp.named_pairs(network).values())
    return network, left / sum(float(score.sum()) for score in scores.values())


def _cut_channels(
    network: nn.Module, image: Tensor, selection: str, table: bsdp.ChannelLatencyTable | None
) -> tuple[nn.Module, float]:
    """A copy that lost channels, and the share of the squared weights that it keeps."""
    network, whole = copy.deepcopy(network), network
    groups = bsdp.channel_groups(network, image)
    scores = {name: _filter_energy(network, group) for name, group in groups.items()}
    norms = {m.layer for group in groups.values() for m in group.members if m.batch_norm}
    layers = described_layers(network) | {name: network.get_submodule(name) for name in norms}
    macs = bsdp.describe(network, image).macs
    assert macs is not None
    total, budget, options = macs, _SHARE * macs, {"kind": "macs", "new_bias": False}
    if selection in _TIMED:
        assert table is not None
        total, options = table.original_ns, {"kind": "latency", "latency": table}
        same = selection == "channel_latency"
        budget = table.of(_cut_channels(whole, image, "channels", None)[0]) if same else _SHARE * total
    positions = measure_positions(network, layers, image)
    cost = ChannelCost(network, groups, total=total, positions=positions, **options)
    plan = bsdp.select_channels(scores, cost, budget=budget, **_CHANNELS[selection])
    bsdp.remove_channels(network, bsdp.plan_removal(network, image, groups, plan.remove))
    lost = sum(float(scores[name][units].sum()) for name, units in plan.remove.items())
    return network, 1 - lost / sum(float(score.sum()) for score in scores.values())


def _filter_energy(network: nn.Module, group: bsdp.ChannelGroup) -> Tensor:
    """The sum of the squared weights that make each unit of a group."""
    energy = torch.zeros(group.size)
    for member in group.sides("out"):
        weight = network.get_submodule(member.layer).weight
        assert isinstance(weight, Tensor)
        energy += weight.detach().flatten(1).square().sum(1)[member.index].sum(1)
    return energy


def _time_of(cost: ModelCost, ranks: Mapping[str, int]) -> int:
    """Time by the table of a network that deploys pairs wherever they have fewer weights."""
    total = cost.fixed("latency")
    for name, layer in cost.layers.items():
        times, rank = layer.latency, ranks[name]
        assert times is not None
        pair = replace(layer, pair_limit=None).kind(rank) == "pair"
        total += times.pair(rank) if pair and times.ranks else times.fused_ns
    return total


def _call(network: nn.Module, image: Tensor, batch: int, engine: str, path: Path) -> Callable[[], object]:
    """One forward pass in an engine."""
    images = image.repeat(batch, 1, 1, 1)
    if engine == "onnxruntime":
        return _onnx(network, images, path.with_suffix(".onnx"))
    if engine == "channels_last":
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if engine == "compile":
        network = torch.compile(network, dynamic=False)  # type: ignore[assignment]
        with torch.inference_mode():
            network(images)
    return lambda: network(images)


def _onnx(network: nn.Module, images: Tensor, path: Path) -> Callable[[], object]:
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bsdp.export(network, path, images, check=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def profile(options: argparse.Namespace) -> Iterator[Row]:
    """Where the time of the original and of the network with half of the MACs goes, layer by layer, in eager mode."""
    for backbone, size, *_ in options.networks or NETWORKS[:1]:
        for batch in options.batch_sizes:
            yield from _profile(backbone, size, batch)


def _profile(backbone: str, size: int, batch: int) -> Iterator[Row]:
    image, network = torch.randn(1, 3, size, size), build(backbone).eval()
    table = _table(network, image, batch, channels_last=False)
    cut, _ = _cut(network, image, "macs", None)
    cost = bsdp.measure_cost(cut, image).with_latency(table)
    total = table.original_ns
    shapes: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for name, layer in cost.layers.items():
        rank = bsdp.named_pairs(cut)[name].rank
        plain = cost.layers[name].latency
        assert plain is not None
        kind = bsdp.layer_cost(bsdp.named_pairs(cut)[name]).kind(rank)
        time = plain.pair(rank) if kind == "pair" and plain.ranks else plain.fused_ns
        key = (layer.fan_in, layer.out_channels, layer.positions)
        shapes.setdefault(key, []).append(
            (plain.fused_ns, time, layer.fused, rank * layer.per_rank, layer.pair_limit or 0)
        )
    for (fan_in, outputs, positions), entries in shapes.items():
        fused, time, weights, left, limit = (sum(values) for values in zip(*entries, strict=True))
        yield {
            "part": "profile",
            "network": backbone,
            "batch_size": batch,
            "fan_in": fan_in,
            "outputs": outputs,
            "positions": positions,
            "layers": len(entries),
            "share_of_original_time": fused / total,
            "time_kept": time / fused if fused else None,
            "macs_kept": min(left, weights) / weights,
            "break_even_rank": weights / len(entries) / (fan_in + outputs),
            "break_even_rank_measured": limit / len(entries),
        }
    yield {"part": "profile", "network": backbone, "batch_size": batch, "fan_in": "all else"} | {
        "share_of_original_time": table.fixed_ns / total
    }
