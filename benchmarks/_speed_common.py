"""What the parts of `benchmarks/speed.py` share: networks, taking turns, and tables."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bsdp.backbones import build_backbone
from bsdp.timing import time_in_turn

Row = dict[str, Any]
CLASSES = 10


def build(name: str) -> nn.Module:
    """A backbone with random weights and a head for ten classes.

    Batch norms get statistics of their own, so that folding them does something.
    """
    torch.manual_seed(0)
    network = build_backbone(name, num_classes=CLASSES, weights="none").network
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return network


def milliseconds(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2, wall: bool = False
) -> dict[str, float]:
    """Median time of each call, taken in turn.

    Args:
        calls: What to time, by name.
        repeats: Timed rounds.
        warmup: Rounds before them.
        wall: Wall-clock time instead of the processor time of this process, which other load disturbs less.
    """
    gc.collect()
    clock = time.perf_counter if wall else time.process_time
    times = time_in_turn(calls, repeats=repeats, warmup=warmup, clock=clock)
    return {name: statistics.median(values) for name, values in times.items()}


def facts() -> Row:
    """Where and with what something was measured."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def markdown(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return "nothing was measured"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
