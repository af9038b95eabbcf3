"""Timing the layers of a network at several widths."""

from __future__ import annotations

import copy
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_whole
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_latency import ChannelLatencyTable, LayerWidths
from bsdp.channel_selection import ChannelCost, select_channels
from bsdp.channel_surgery import remove_channels
from bsdp.compiling import uncompiled
from bsdp.folding import refuse_pairs
from bsdp.latency_measuring import facts_of, give_values, on_gpu, repeated, rising, spread
from bsdp.plain_layers import (
    GEOMETRY,
    is_depthwise,
    layer_groups,
    layer_inputs,
    layer_outputs,
    memory_format_of,
    new_layer,
    spatial_dims,
    weight_of,
)
from bsdp.probing import as_inputs, evaluating
from bsdp.scale_hooks import drop_scales, scales_of
from bsdp.speed import using_threads
from bsdp.stopwatches import Stopwatch, nothing, standing_in
from bsdp.timing import time_in_turn

_SECONDS = 3.0  # timed passes of the forms of one layer, if more than five

Call = tuple[tuple[int, ...], torch.dtype, torch.memory_format]


def measure_channel_latency_table(
    network: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    batch_size: int = 1,
    multiple: int = 8,
    points: int = 5,
    repeats: int = 15,
    warmup: int = 2,
    threads: int | None = None,
    exclude: Iterable[str] = (),
) -> ChannelLatencyTable:
    """Time every layer whose channels can go at several numbers of inputs and outputs.

    Widths of one layer take turns, by themselves, on inputs such as they get in the network; medians count, and times
    that fall as a width rises are averaged. All are then scaled to what the original layer takes inside a pass of the
    network. What is not in these layers (norms, activations, sums) shrinks with their outputs, too: by how much, a
    pass of a copy says that lost half of its channels. In the end all is scaled to a pass without
    stopwatches. The network is left as it is.

    Args:
        network: A plain network on the device and in the memory layout (``network.to(memory_format=...)``) to measure;
            its present widths are the original ones of the table. Fold batch norms first where that is how it will run.
        example_input: Input (or tuple of inputs) with one example, on that device.
        batch_size: Examples in the timed pass: that of later use.
        multiple: Times are taken at widths that are multiples of it, as wide as the vectors of the hardware.
        points: Widths to time per side of a layer, at most; at least 2.
        repeats: Timed passes per width; fewer, but five, where they take seconds.
        warmup: Passes before them.
        threads: Threads for torch; None for what is set. The setting is restored afterwards.
        exclude: Names of layers whose channels must stay, see `channel_groups`.

    Raises:
        UntraceableError: If the dependencies between channels cannot be found.
        ValueError: If an argument is not allowed, or the network is decomposed.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("multiple", multiple, 1), ("points", points, 2)):
        check_whole(name, value, least)
    check_whole("repeats", repeats, 1)
    check_at_least("warmup", warmup, 0)
    refuse_pairs(network)
    one = as_inputs(example_input)
    if any(scales_of(part) is not None for part in network.modules()):
        network = copy.deepcopy(network)
        drop_scales(network)  # which fold away
    exclude = tuple(exclude)
    groups = channel_groups(network, one, exclude=exclude)
    layers = {m.layer: network.get_submodule(m.layer) for g in groups.values() for m in g.members if m.weighted}
    rounds: dict[str, Any] = {"repeats": repeats, "warmup": warmup, "cuda": on_gpu(one)}
    inputs = repeated(one, batch_size)
    halved = _halved(network, one, multiple=multiple, exclude=exclude)
    # Not in inference mode: what a network keeps of a pass must not hinder its training.
    with using_threads(threads), torch.no_grad(), torch.random.fork_rng(), _every_layer_called():
        watched, rest, half, plain = _run(network, halved, layers, inputs, **rounds)
        grids = _grids(watched, multiple=multiple, points=points, **rounds)
        used = torch.get_num_threads()
    facts = facts_of(one, batch_size=batch_size, multiple=multiple, threads=used)
    inside = sum(statistics.median(watch.times) for watch in watched.values())
    scale = plain / max(1.0, inside + rest)
    times = {name: _layer(watch, grids[watch.key], scale) for name, watch in watched.items()}
    table = ChannelLatencyTable(times, round(rest * scale), **facts)
    return _with_rest(table, watched, halved, (rest - half) * scale)


def width_grid(size: int, *, step: int, multiple: int, points: int) -> tuple[int, ...]:
    """Widths at which to time a layer: the smallest, multiples, and the original one.

    Args:
        size: The original width.
        step: What every width is a multiple of: the groups of a grouped convolution, else 1.
        multiple: What the widths between are multiples of.
        points: How many widths at most, at least 2.
    """
    apart = math.lcm(step, multiple)
    return tuple(sorted({min(step, size), *spread(range(apart, size, apart), points - 2), size}))


@dataclass
class _Watched:
    """A layer that is timed inside the network's passes.

    Attributes:
        layer: The layer.
        watch: Its stopwatch.
        times: Nanoseconds per pass.
        calls: What it was given in one pass, and how often.
        elements: Numbers that it puts out in a pass per output channel.
        timing: Whether passes are timed by layer now.
    """

    layer: nn.Module
    watch: Stopwatch
    times: list[int] = field(default_factory=list)
    calls: Counter[Call] = field(default_factory=Counter)
    elements: float = 0.0
    timing: bool = True

    def forward(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the layer's forward is while times are taken."""
        return self.watch.time(call, *arguments, **named) if self.timing else call(*arguments, **named)

    def look(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What it is in the first pass."""
        outputs = call(*arguments, **named)
        given = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        self.calls[(tuple(given.shape), given.dtype, memory_format_of(given))] += 1
        self.elements += outputs.numel() / layer_outputs(self.layer)
        return outputs

    @property
    def key(self) -> tuple[Any, ...]:
        """Layers with the same key take the same time."""
        geometry = tuple(str(getattr(self.layer, name, None)) for name in GEOMETRY)
        weight = weight_of(self.layer)
        facts = (type(self.layer), weight.dtype, memory_format_of(weight), self.layer.bias is None)
        return (*geometry, *facts, *sorted(self.calls.items(), key=str))


def _halved(network: nn.Module, example: tuple[Any, ...], *, multiple: int, exclude: tuple[str, ...]) -> nn.Module:
    """A copy without about half of its channels, the same share of every group."""
    halved = copy.deepcopy(network)
    groups = channel_groups(halved, example, exclude=exclude, check=False)
    cost = ChannelCost(halved, groups, kind="channels")
    scores = {name: torch.arange(1.0, 1.0 + group.size) for name, group in groups.items()}
    limits: dict[str, Any] = {"ranking": "local", "max_group_ratio": 0.5, "round_to": multiple}
    plan = select_channels(scores, cost, budget=0.5 * cost.total, **limits)
    if any(units.numel() for units in plan.remove.values()):
        remove_channels(halved, plan_removal(halved, example, groups, plan.remove))
    return halved


def _run(
    network: nn.Module,
    halved: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    *,
    repeats: int,
    warmup: int,
    cuda: bool,
) -> tuple[dict[str, _Watched], float, float, float]:
    """Time passes of both networks: by layer, the rest of both, and whole passes of the first without stopwatches."""
    synchronize = torch.cuda.synchronize if cuda else nothing
    watched = {name: _Watched(layer, Stopwatch(synchronize)) for name, layer in layers.items()}
    less = [_Watched(halved.get_submodule(name), Stopwatch(synchronize)) for name in layers]
    first = _Passes(network, inputs, list(watched.values()), Stopwatch(synchronize))
    second = _Passes(halved, inputs, less, Stopwatch(synchronize))
    with ExitStack() as stack:
        for each in (network, halved):
            stack.enter_context(evaluating(each))
            stack.enter_context(uncompiled(each))
        with standing_in({w.layer: partial(w.look, w.layer.forward) for w in watched.values()}):
            network(*inputs)
        both = [*watched.values(), *less]
        with standing_in({w.layer: partial(w.forward, w.layer.forward) for w in both}):
            calls = {"whole": first.timed, "halved": second.timed, "plain": first.plain}
            times = time_in_turn(calls, repeats=repeats, warmup=warmup, cuda=cuda)
    for watch in watched.values():
        del watch.times[:warmup]
    rests = [statistics.median(passes.rest[warmup:]) for passes in (first, second)]
    return watched, rests[0], rests[1], 1e6 * statistics.median(times["plain"])


@dataclass
class _Passes:
    """Passes of a network whose layers have stopwatches.

    Attributes:
        network: The network.
        inputs: Its inputs.
        watched: The layers.
        whole: The stopwatch of a pass.
        rest: Nanoseconds per pass outside of the layers.
    """

    network: nn.Module
    inputs: tuple[Any, ...]
    watched: list[_Watched]
    whole: Stopwatch
    rest: list[int] = field(default_factory=list)

    def timed(self) -> None:
        """Note the time of every layer, and of the rest."""
        self.whole.time(self.network, *self.inputs)
        for watch in self.watched:
            watch.times.append(watch.watch.take())
        self.rest.append(max(0, self.whole.take() - sum(watch.times[-1] for watch in self.watched)))

    def plain(self) -> None:
        """Look at no stopwatch."""
        for watch in self.watched:
            watch.timing = False
        self.network(*self.inputs)
        for watch in self.watched:
            watch.timing = True


@contextmanager
def _every_layer_called() -> Iterator[None]:
    """Let no fused operation stand for the layers of a transformer in eval mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _grids(watched: Mapping[str, _Watched], *, multiple: int, points: int, **rounds: Any) -> dict[Any, LayerWidths]:
    """Times of all distinct layers at all their widths, by themselves."""
    grids: dict[Any, LayerWidths] = {}
    for watch in watched.values():
        if watch.key not in grids:
            grids[watch.key] = _grid(watch, multiple=multiple, points=points, **rounds)
    return grids


def _grid(watch: _Watched, *, multiple: int, points: int, **rounds: Any) -> LayerWidths:
    layer, groups = watch.layer, layer_groups(watch.layer)
    inputs, outputs = layer_inputs(layer), layer_outputs(layer)
    if not watch.calls:
        return LayerWidths((inputs,), () if is_depthwise(watch.layer) else (outputs,), ((0,),))
    step = 1 if is_depthwise(watch.layer) else groups
    first = width_grid(inputs, step=step, multiple=multiple, points=points)
    second = () if is_depthwise(watch.layer) else width_grid(outputs, step=step, multiple=multiple, points=points)
    calls = _Forms(watch).calls(first, second)
    times = time_in_turn(calls, seconds=_SECONDS, **rounds)
    medians = {widths: 1e6 * statistics.median(values) for widths, values in times.items()}
    rows = [rising(medians[i, o] for o in second or (0,)) for i in first]
    columns = [rising(column) for column in zip(*rows, strict=True)]
    return LayerWidths(first, second, tuple(zip(*columns, strict=True)))


class _Forms:
    """Plain layers of other widths with inputs for them; all weights share one memory."""

    def __init__(self, watch: _Watched) -> None:
        self.watch, self.layer = watch, watch.layer
        weight = weight_of(self.layer)
        self.memory = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)

    def calls(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[tuple[int, int], Callable[[], object]]:
        """What the layer does in a pass of the network, by its widths; 0 outputs where they follow the inputs."""
        forms = {(i, o): self._form(i, o) for i in inputs for o in outputs or (0,)}
        give_values(forms[max(forms)])
        given = {i: [(self._input(call, i), count) for call, count in self.watch.calls.items()] for i in inputs}
        return {widths: partial(_call, form, given[widths[0]]) for widths, form in forms.items()}

    def _form(self, inputs: int, outputs: int) -> nn.Module:
        layer, weight = self.layer, weight_of(self.layer)
        name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
        sizes: dict[str, Any] = {name: inputs}
        if is_depthwise(self.layer):
            sizes["groups"], outputs = inputs, inputs
        options: dict[str, Any] = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
        form = new_layer(layer, outputs, **options, **sizes)
        own = weight_of(form)
        own.data = self.memory.as_strided(own.shape, own.stride())
        if isinstance(form.bias, Tensor):
            form.bias.data.zero_()
        return form.requires_grad_(False).eval()

    def _input(self, call: Call, inputs: int) -> Tensor:
        (shape, dtype, layout), weight = call, weight_of(self.layer)
        axis = len(shape) - 1 - max(0, spatial_dims(self.layer))
        given = torch.rand((*shape[:axis], inputs, *shape[axis + 1 :]), device=weight.device).to(dtype)
        return given.contiguous(memory_format=layout)


def _call(form: nn.Module, given: list[tuple[Tensor, int]]) -> None:
    for tensor, count in given:
        for _ in range(count):
            form(tensor)


def _layer(watch: _Watched, alone: LayerWidths, scale: float) -> LayerWidths:
    """The times of a layer by itself, scaled to those inside the network, and these to what they are untimed."""
    scale *= statistics.median(watch.times) / max(1, alone.original_ns)
    return LayerWidths(alone.inputs, alone.outputs, tuple(tuple(round(ns * scale) for ns in row) for row in alone.ns))


def _with_rest(
    table: ChannelLatencyTable, watched: Mapping[str, _Watched], halved: nn.Module, saved: float
) -> ChannelLatencyTable:
    """Let the layers have the part of the rest that goes with their outputs.

    Args:
        table: By the layers alone.
        watched: The layers.
        halved: The network without half of its channels.
        saved: What its rest takes less.
    """
    whole = sum(watch.elements * layer_outputs(watch.layer) for watch in watched.values())
    left = sum(watch.elements * layer_outputs(halved.get_submodule(name)) for name, watch in watched.items())
    if left >= whole:
        return table
    # Of the rest no larger share can go than went of the outputs.
    saved = min(max(0.0, saved), table.fixed_ns * (1 - left / whole))
    slope = saved / (whole - left)
    layers = {name: _slower(table.layers[name], watch, slope * watch.elements) for name, watch in watched.items()}
    moved = sum(layer.original_ns - table.layers[name].original_ns for name, layer in layers.items())
    return replace(table, layers=layers, fixed_ns=max(0, table.fixed_ns - moved))


def _slower(layer: LayerWidths, watch: _Watched, per_output: float) -> LayerWidths:
    """The times of a layer with something added per output."""
    if is_depthwise(watch.layer):
        rows = [[ns + per_output * i for ns in row] for i, row in zip(layer.inputs, layer.ns, strict=True)]
    else:
        rows = [[ns + per_output * o for ns, o in zip(row, layer.outputs, strict=True)] for row in layer.ns]
    return replace(layer, ns=tuple(tuple(map(round, row)) for row in rows))
