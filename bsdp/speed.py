"""How fast a pruned network is beside the original one."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_choice
from bsdp.stats import count_macs
from bsdp.timing import time_in_turn

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Speed:
    """Median times of both networks at one batch size and one memory layout.

    Attributes:
        batch_size: Images in a pass.
        layout: ``"contiguous"`` or ``"channels_last"``.
        original_ms: Milliseconds of one pass of the original network.
        pruned_ms: Milliseconds of one pass of the pruned network.
        repeats: Timed passes of each.
    """

    batch_size: int
    layout: str
    original_ms: float
    pruned_ms: float
    repeats: int


@dataclass(frozen=True)
class SpeedComparison:
    """How fast a pruned network is beside the original one.

    Attributes:
        speeds: One entry per batch size and layout.
        macs_original: Multiply-adds of the original network for one image.
        macs_pruned: Multiply-adds of the pruned network.
        threads: Threads that torch ran on.
        device: Name of the device.
    """

    speeds: tuple[Speed, ...]
    macs_original: int
    macs_pruned: int
    threads: int
    device: str

    @property
    def mac_reduction(self) -> float:
        """How many times fewer multiply-adds the pruned network needs."""
        return self.macs_original / max(self.macs_pruned, 1)

    def best(self, batch_size: int) -> tuple[Speed, Speed]:
        """The entries whose layouts suit the original and the pruned network best at a batch size."""
        entries = [speed for speed in self.speeds if speed.batch_size == batch_size]
        return min(entries, key=lambda s: s.original_ms), min(entries, key=lambda s: s.pruned_ms)

    def speed_up(self, batch_size: int) -> float:
        """How many times as fast the pruned network is at a batch size, each network in its better layout."""
        original, pruned = self.best(batch_size)
        return original.original_ms / pruned.pruned_ms

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Median of passes in turn on {self.device}, {self.threads} thread(s)")
        columns = ("batch", "layout", "passes", "original", "pruned", "original", "pruned", "speed-up")
        for column in columns:
            table.add_column(column, justify="right")
        for s in self.speeds:
            rates = (1000.0 * s.batch_size / ms for ms in (s.original_ms, s.pruned_ms))
            table.add_row(
                *(str(s.batch_size), s.layout, str(s.repeats), f"{s.original_ms:.2f} ms", f"{s.pruned_ms:.2f} ms"),
                *(f"{rate:,.0f}/s" for rate in rates),
                f"{s.original_ms / s.pruned_ms:.2f}x",
            )
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(table)
        lines = [
            capture.get().rstrip(),
            f"MACs: {self.macs_original:,} -> {self.macs_pruned:,} ({self.mac_reduction:.2f}x fewer)",
        ]
        for batch_size in dict.fromkeys(s.batch_size for s in self.speeds):
            original, pruned = self.best(batch_size)
            factor = self.speed_up(batch_size)
            lines.append(
                f"batch {batch_size}: {factor:.2f}x as fast, each in its better layout (original {original.layout}, "
                f"pruned {pruned.layout}); speed-up / MAC reduction: {factor / self.mac_reduction:.2f}"
            )
        return "\n".join(lines)


def compare_speed(
    original: nn.Module,
    pruned: nn.Module,
    image: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    layouts: Sequence[str] = ("contiguous", "channels_last"),
    threads: int | None = None,
    repeats: int = 30,
    warmup: int = 5,
    seconds: float | None = None,
) -> SpeedComparison:
    """Time two networks side by side in this process.

    Args:
        original: The unpruned network, on the device of `image`.
        pruned: The folded network, there, too.
        image: One image, ``[1, channels, height, width]``.
        batch_sizes: Images in a pass.
        layouts: Memory layouts to try: ``"contiguous"``, ``"channels_last"``; the networks are left in their own.
        threads: Threads for torch; None for what is set. The setting is restored afterwards.
        repeats: Timed passes of each network per batch size and layout.
        warmup: Passes before them.
        seconds: End the passes of one batch size after this time, but not before the fifth; None for no limit.

    Example:
        >>> nets = [nn.Conv2d(3, width, 3) for width in (8, 4)]
        >>> bsdp.compare_speed(*nets, torch.zeros(1, 3, 8, 8), batch_sizes=(1,), repeats=1).mac_reduction
        2.0
    """
    for name, values in (("batch_sizes", batch_sizes), ("layouts", layouts)):
        if not values:
            raise ValueError(f"`{name}` is empty: name at least one.")
    for size in batch_sizes:
        check_at_least("batch_sizes", size, 1)
    for layout in layouts:
        check_choice("layouts", layout, _FORMATS)
    networks = {"original": original, "pruned": pruned}
    macs = {name: count_macs(network, image) for name, network in networks.items()}
    copies = {(name, layout): _laid_out(networks[name], layout) for layout in layouts for name in networks}
    speeds: list[Speed] = []
    with using_threads(threads):
        for size in batch_sizes:
            batches = {layout: image.repeat(size, 1, 1, 1).to(memory_format=_FORMATS[layout]) for layout in layouts}
            calls = {key: partial(network, batches[key[1]]) for key, network in copies.items()}
            with torch.inference_mode():
                times = time_in_turn(calls, repeats=repeats, warmup=warmup, cuda=image.is_cuda, seconds=seconds)
            for layout in layouts:
                before, after = times["original", layout], times["pruned", layout]
                speeds.append(Speed(size, layout, statistics.median(before), statistics.median(after), len(after)))
        used = torch.get_num_threads()
    device = torch.cuda.get_device_name(image.device) if image.is_cuda else image.device.type
    return SpeedComparison(tuple(speeds), macs["original"], macs["pruned"], used, device)


def _laid_out(network: nn.Module, layout: str) -> nn.Module:
    """A copy in eval mode with its weights in a memory layout."""
    return copy.deepcopy(network).eval().to(memory_format=_FORMATS[layout])


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Set the number of threads and restore it."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            if not 1 <= count <= 1024:
                raise ValueError(f"`threads` must be between 1 and 1024, got {count}.")
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
