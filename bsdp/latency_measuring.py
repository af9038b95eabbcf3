"""Timing the layers of a decomposed network at several ranks, inside the network that they are part of."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_whole
from bsdp.compiling import uncompiled
from bsdp.cost import LayerCost
from bsdp.folding import empty_folded
from bsdp.latency import LatencyTable, LayerLatency
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import memory_format_of, weight_of
from bsdp.probing import as_inputs, evaluating
from bsdp.speed import using_threads
from bsdp.stats import measure_cost
from bsdp.stopwatches import Stopwatch, nothing, standing_in

_FUSED = 0  # the rank that stands for one layer


def measure_latency_table(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    batch_size: int = 1,
    multiple: int = 8,
    points: int = 6,
    repeats: int = 15,
    warmup: int = 2,
    threads: int | None = None,
) -> LatencyTable:
    """Time every decomposed layer as one layer and as a pair at several ranks.

    In each pass of the network all layers have about the same share of their rank, and every layer's time is taken
    inside the pass, so that caches and inputs are those of real use. Ranks take turns, medians count, and times that
    fall as the rank rises are averaged. The model is left as it is; its present ranks and values do not matter.

    Args:
        model: A decomposed model, on the device and in the memory layout (``model.to(memory_format=...)``) to measure.
        example_input: Input (or tuple of inputs) with one example, on that device.
        batch_size: Examples in the timed pass: that of later use.
        multiple: Times are taken at ranks that are multiples of it, as wide as the vectors of the hardware.
        points: Ranks to time per layer, at most; at least 2.
        repeats: Timed passes per rank.
        warmup: Passes before them.
        threads: Threads for torch; None for what is set. The setting is restored afterwards.

    Raises:
        ValueError: If an argument is not allowed or nothing is decomposed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
        >>> _ = bsdp.decompose(model)
        >>> table = bsdp.measure_latency_table(model, torch.zeros(1, 3, 8, 8), repeats=1)
        >>> table.layers["0"].ranks
        (1, 8, 10)
    """
    for name, value, least in (("batch_size", batch_size, 1), ("multiple", multiple, 1), ("points", points, 2)):
        check_whole(name, value, least)
    check_whole("repeats", repeats, 1)
    check_at_least("warmup", warmup, 0)
    if not named_pairs(model):
        raise ValueError("`model` has no decomposed layer: call `bsdp.decompose` first.")
    one = as_inputs(example_input)
    costs = measure_cost(model, one).layers
    inputs = repeated(one, batch_size)
    grids = {name: rank_grid(cost, multiple=multiple, points=points) for name, cost in costs.items()}
    pairs = {name: pair for name, pair in named_pairs(model).items() if not costs[name].whole}
    with torch.random.fork_rng():
        clocks = {name: _Clock(pair, grids[name]) for name, pair in pairs.items()}
    cuda = on_gpu(inputs)
    # Not in inference mode: what a network keeps of a pass must not hinder its training.
    with using_threads(threads), torch.no_grad():
        fixed = _run(model, inputs, clocks, points=points, repeats=repeats, warmup=warmup, cuda=cuda)
        used = torch.get_num_threads()
    layers = {name: _layer_latency(costs[name], clocks.get(name)) for name in costs}
    return LatencyTable(layers, fixed, **facts_of(one, batch_size=batch_size, multiple=multiple, threads=used))


def facts_of(inputs: tuple[Any, ...], *, batch_size: int, multiple: int, threads: int) -> dict[str, Any]:
    """What a table says of its measurement.

    Args:
        inputs: The network's inputs with one example.
        batch_size: Examples in the timed pass.
        multiple: What the timed sizes are multiples of.
        threads: Threads that torch ran on.
    """
    return {
        "batch_size": batch_size,
        "input_shapes": tuple(tuple(value.shape) for value in inputs if isinstance(value, Tensor)),
        "multiple": multiple,
        "threads": threads,
        "device": torch.cuda.get_device_name() if on_gpu(inputs) else "cpu",
        "torch_version": str(torch.__version__),
    }


def on_gpu(inputs: tuple[Any, ...]) -> bool:
    """Whether any of some inputs is on a GPU."""
    return any(isinstance(value, Tensor) and value.is_cuda for value in inputs)


def rank_grid(cost: LayerCost, *, multiple: int, points: int) -> tuple[int, ...]:
    """Ranks at which to time a layer: 1, multiples, and the largest at which a pair has fewer weights than one layer.

    Args:
        cost: Of the layer.
        multiple: What the ranks between are multiples of.
        points: How many ranks at most, at least 2.
    """
    top = LayerCost(**{**vars(cost), "pair_limit": None}).largest_useful_rank
    if top < 1:
        return ()
    return tuple(sorted({1, *spread(range(multiple, top, multiple), points - 2), top}))


def spread(sizes: Sequence[int], count: int) -> list[int]:
    """At most so many of some sizes, evenly spread."""
    count = min(len(sizes), count)
    return [sizes[(2 * i + 1) * len(sizes) // (2 * count)] for i in range(count)]


def rising(times: Iterable[float]) -> list[int]:
    """The nearest sequence (in squares) of whole numbers that never falls, by pooling neighbours that do."""
    pools: list[tuple[float, int]] = []
    for value in times:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            last, count = pools.pop()
            mean, size = (last * count + mean * size) / (count + size), size + count
        pools.append((mean, size))
    return [round(mean) for mean, size in pools for _ in range(size)]


@dataclass
class _Clock:
    """Stands in for a pair's forward pass and adds up how long it takes.

    Attributes:
        pair: The pair.
        ranks: Its grid.
        times: By rank, nanoseconds per pass of the network.
    """

    pair: BasisPair
    ranks: tuple[int, ...]
    times: dict[int, list[int]] = field(default_factory=dict)
    rank: int = _FUSED

    def __post_init__(self) -> None:
        self.forms = _forms(self.pair, self.ranks)
        self.watch = Stopwatch(nothing)

    def at(self, share: float) -> None:
        """Take the rank at a share of the grid; without a grid stay one layer."""
        self.rank = self.ranks[round(share * (len(self.ranks) - 1))] if self.ranks else _FUSED

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the pair's forward is while times are taken."""
        return self.watch.time(self.forms[self.rank], *arguments, **named)

    def take(self) -> int:
        """Note and return what was spent since the last call."""
        spent = self.watch.take()
        self.times.setdefault(self.rank, []).append(spent)
        return spent


def _forms(pair: BasisPair, ranks: tuple[int, ...]) -> dict[int, nn.Module]:
    """The folded forms of a pair by rank, in the memory layout of the pair; the bases share one weight."""
    basis = weight_of(pair.basis)
    channels_last = basis.dim() == 4 and basis.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not basis.is_contiguous() else torch.preserve_format
    forms: dict[int, nn.Module] = {}
    largest: nn.Parameter | None = None
    for rank in sorted((_FUSED, *ranks), reverse=True):
        form = empty_folded(pair, kind="pair" if rank else "fused", rank=rank or pair.full_rank, bias=True)
        form.requires_grad_(False).eval().to(memory_format=layout)
        if isinstance(form, nn.Sequential) and not pair.transposed:
            largest = nn.Parameter(weight_of(form[0]), requires_grad=False) if largest is None else largest
            form[0].weight = nn.Parameter(largest[: pair.groups * rank], requires_grad=False)
        forms[rank] = form
    for form in forms.values():
        give_values(form)
    return forms


@torch.no_grad()
def give_values(layer: nn.Module) -> None:
    """Fill a layer: unwritten memory, and features that fade away, hold numbers on which processors are slow."""
    for parameter in layer.parameters():
        bound = math.sqrt(6.0 / max(1, parameter.numel() // parameter.shape[0]))
        parameter.uniform_(-bound, bound)


def _run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    clocks: Mapping[str, _Clock],
    *,
    points: int,
    repeats: int,
    warmup: int,
    cuda: bool,
) -> int:
    """Time all passes; return the median time that the layers have no part in."""
    synchronize = torch.cuda.synchronize if cuda else nothing
    for clock in clocks.values():
        clock.watch.synchronize = synchronize
    rest: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(uncompiled(model))
        stack.enter_context(standing_in({clock.pair: clock.forward for clock in clocks.values()}))
        for turn in range(warmup + repeats):
            if turn == warmup:
                for clock in clocks.values():
                    clock.times.clear()
            for level in range(points + 1):
                for clock in clocks.values():
                    clock.rank = _FUSED
                    if level:
                        clock.at((level - 1) / (points - 1))
                synchronize()
                start = time.perf_counter_ns()
                model(*inputs)
                synchronize()
                whole = time.perf_counter_ns() - start
                inside = sum([clock.take() for clock in clocks.values()])
                if turn >= warmup:
                    rest.append(max(0, whole - inside))
    return round(statistics.median(rest))


def _layer_latency(cost: LayerCost, clock: _Clock | None) -> LayerLatency:
    geometry = (cost.fan_in, cost.out_channels, cost.groups)
    if clock is None or not any(clock.times[_FUSED]):
        return LayerLatency(*geometry, fused_ns=0)
    medians = {rank: statistics.median(times) for rank, times in clock.times.items()}
    pair = rising(medians[rank] for rank in clock.ranks)
    return LayerLatency(*geometry, round(medians[_FUSED]), clock.ranks, tuple(pair))


def repeated(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Inputs with one example as those with so many, in the same memory layout."""
    return tuple(_repeated(value, count) if isinstance(value, Tensor) and value.dim() else value for value in inputs)


def _repeated(value: Tensor, count: int) -> Tensor:
    many = value.repeat(count, *(1,) * (value.dim() - 1))
    return many.contiguous(memory_format=memory_format_of(value))
