"""The picture of methods at several sizes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks._frontier import ALLOWED, Point, is_peer, points
from benchmarks._methods import FINETUNE
from benchmarks._tables import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against parameters and against MACs kept: a line through the means of every method.

    Raises:
        ValueError: If no run has finished or the rows are of several tasks.
    """
    from bsdp.plots import new_figure

    found = points(rows)
    tasks = {point.task for point in found}
    if len(tasks) != 1:
        raise ValueError(f"a picture shows the finished runs of one task, got those of {sorted(tasks) or 'none'}.")
    drawn = new_figure(14.0, 5.8)
    panels = drawn.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("params", "macs"), strict=True):
        _draw(axes, found, kind)
    panels[0].set_ylabel("accuracy on test images (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    drawn.suptitle(f"{tasks.pop()}: means over the seeds, bars from the lowest to the highest", fontsize=12)
    return drawn


def _draw(axes: Axes, found: Sequence[Point], kind: str) -> None:
    from matplotlib import colormaps

    from bsdp.plots import kept_axis

    methods = list(dict.fromkeys(point.method for point in found))
    colors: Any = colormaps["tab20" if len(methods) > 10 else "tab10"]
    markers, kept, key = "oDs^vP*X<>", [100.0], f"{kind}_ratio"
    for i, method in enumerate(methods):
        own = sorted((p for p in found if p.method == method and p.has(key)), key=lambda point: point.mean(key))
        shares = [100.0 * point.mean(key) for point in own]
        accuracies = [[100.0 * run["accuracy"] for run in point.runs] for point in own]
        means = [statistics.mean(values) for values in accuracies]
        bars = [[m - min(v) for m, v in zip(means, accuracies, strict=True)]]
        bars.append([max(v) - m for m, v in zip(means, accuracies, strict=True)])
        look: dict[str, Any] = {"color": colors(i), "marker": markers[i % len(markers)], "markersize": 6, "capsize": 2}
        axes.errorbar(shares, means, yerr=bars, linestyle="--" if is_peer(method) else "-", label=method, **look)
        kept += shares
        if method == FINETUNE and means:
            low = means[0] - ALLOWED
            axes.axhspan(low, means[0], color=colors(i), alpha=0.12, linewidth=0, label=f"{ALLOWED:g} point below it")
    kept_axis(axes, kept, kind=kind)
