"""The picture of a pruning run: accuracy against what is kept, and the ranks per layer over the rounds.

`new_figure`, `save_figure` and `kept_axis` are for other pictures of that sort, too.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsdp.record import PruningRecord, RoundRecord
from bsdp.report import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINE, _CHOSEN, _REFERENCE, _TARGET = "#1f5fa8", "#d1495b", "#444444", "#8d6a9f"
_MAX_LABELS = 56
_MAX_NUMBERED = (26, 16)  # layers and rounds up to which each cell shows its rank
_NAMES = {"params": "parameters", "macs": "MACs", "bases": "bases", "channels": "channels"}


def plot_pruning_curves(record: PruningRecord, path: str | os.PathLike[str]) -> Path:
    """Draw `pruning_figure` into a file.

    Args:
        record: The history of a run, finished or not.
        path: Target; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``). An existing file is replaced.
    """
    return save_figure(pruning_figure(record), path)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, whole or not at all.

    Args:
        figure: For example of `new_figure`.
        path: Target; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``). An existing file is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure that belongs to no window and changes nothing in the caller's matplotlib.

    Args:
        width: Inches.
        height: Inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pruning_figure(record: PruningRecord) -> Figure:
    """Draw the best value of every round against parameters and MACs kept, and the ranks per layer over the rounds.

    Args:
        record: The history of a run, finished or not, with at least one round.
    """
    if not record.rounds:
        raise ValueError("`record` has no rounds: there is nothing to draw.")
    rows = len(_widest(record)[1])
    height = min(max(7.0, 2.6 + 0.17 * min(rows, _MAX_LABELS)), 12.0)
    figure = new_figure(14.0, height)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.0, 1.25))
    left = [figure.add_subplot(grid[0, 0])]
    left.append(figure.add_subplot(grid[1, 0], sharey=left[0]))
    for axes, kind in zip(left, ("params", "macs"), strict=True):
        _draw_curve(axes, record, kind)
    _draw_ranks(figure, figure.add_subplot(grid[:, 1]), record)
    figure.suptitle(_title(record), fontsize=13, fontweight="bold")
    return figure


def _draw_curve(axes: Axes, record: PruningRecord, kind: str) -> None:
    points = [
        (100 * kept, r.accuracy_best, r)
        for r in record.rounds
        if (kept := record.kept(r, kind)) is not None and r.accuracy_best is not None
    ]
    if not points:
        measured = record.kept(record.rounds[0], kind) is not None
        missing = "no validation values" if measured else f"{_NAMES[kind]} were not measured"
        axes.text(0.5, 0.5, missing, transform=axes.transAxes, ha="center", va="center", color=_REFERENCE)
        axes.set_axis_off()
        return
    axes.set_ylabel(f"{record.monitor.replace('_', ' ')}{' (%)' if _in_percent(record) else ''}, best of a round")
    factor = 100.0 if _in_percent(record) else 1.0
    _draw_reference(axes, record, factor)
    axes.plot([x for x, _, _ in points], [factor * y for _, y, _ in points], "-o", color=_LINE, markersize=5, zorder=3)
    marks = [x for x, _, _ in points]
    if kind == record.target_kind:
        marks.append(100 * (1 - record.target))
        axes.axvline(marks[-1], color=_TARGET, linestyle=":", linewidth=1.6, label=f"target {marks[-1]:.3g} % kept")
    chosen = _chosen(record)
    for x, y, entry in points:
        if entry is chosen:
            star: dict[str, Any] = {"marker": "*", "markersize": 19, "linestyle": "none", "label": "chosen"}
            axes.plot([x], [factor * y], color=_CHOSEN, zorder=4, **star)
            _annotate(axes, x, factor * y, f"{x:.3g} % kept\n{_shown(record, y)}", above=record.mode == "min")
    kept_axis(axes, marks, kind=kind)
    axes.margins(y=0.14)
    if _in_percent(record):
        low_end, high_end = axes.get_ylim()
        axes.set_ylim(max(low_end, -2.0), min(high_end, 102.0))  # a wide tolerance must not take the axis below zero
    axes.legend(loc="best", fontsize=8, markerscale=0.55, frameon=True, framealpha=0.9, edgecolor="none")


def _draw_reference(axes: Axes, record: PruningRecord, factor: float) -> None:
    if record.reference is None:
        return
    reference = factor * record.reference
    label = f"reference {_shown(record, record.reference)}"
    axes.axhline(reference, color=_REFERENCE, linestyle="--", linewidth=1.1, label=label)
    if record.tolerance:
        edge = reference - factor * record.tolerance * (1 if record.mode == "max" else -1)
        label = f"tolerance {_tolerance(record)}"
        axes.axhspan(min(edge, reference), max(edge, reference), color="#2a9d8f", alpha=0.15, linewidth=0, label=label)


def _annotate(axes: Axes, x: float, y: float, text: str, *, above: bool) -> None:
    """Label a point on the side where the curve is not: to its left the curve falls, or rises if less is better."""
    at_the_right = x > 60.0
    axes.annotate(
        text,
        (x, y),
        xytext=(-14 if at_the_right else 14, 16 if above else -34),
        textcoords="offset points",
        ha="right" if at_the_right else "left",
        fontsize=9,
        fontweight="bold",
        color=_CHOSEN,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )


def kept_axis(axes: Axes, values: list[float], *, kind: str) -> None:
    """Make the x axis one of shares kept: logarithmic, from the smallest to 100 %, with plain numbers on it.

    Args:
        axes: Where the points are; gets a grid, too.
        values: All x values, in percent.
        kind: ``params``, ``macs`` or ``bases``.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes.set_xlabel(f"{_NAMES[kind]} kept (% of the original, log scale)")
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low = min(min(values), 99.0)
    axes.set_xlim(low * 0.85, 112.0)  # first, for a logarithmic axis warns of points that are all at one place
    axes.set_xscale("log")
    steps = (1, 2, 5) if low < 4 else (1, 2, 3, 5, 7) if low < 25 else tuple(range(1, 10))
    decades = range(math.floor(math.log10(low * 0.85)), 3)
    ticks = [s * 10.0**d for d in decades for s in steps if low * 0.85 <= s * 10.0**d <= 100.0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_ranks(figure: Figure, axes: Axes, record: PruningRecord) -> None:
    rounds = record.rounds
    unit, full, numbers = _widest(record)
    axes.set_title(f"{unit} / original per layer" if unit == "channels" else "rank / full rank per layer", fontsize=11)
    axes.set_xlabel("round (0 = unpruned; the framed round was chosen)")
    if not full:
        axes.text(0.5, 0.5, "no decomposed layers", transform=axes.transAxes, ha="center", va="center")
        return
    shares = [[row[name] / most for row in numbers] for name, most in full.items()]
    image = axes.imshow(shares, aspect="auto", cmap="YlGnBu", vmin=0.0, vmax=1.0, interpolation="nearest")
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="share kept")
    columns = range(0, len(rounds), math.ceil(len(rounds) / 20))
    axes.set_xticks(list(columns), [str(rounds[i].round) for i in columns])
    short = short_names(record)
    shown = [short.get(name, name) for name in full]
    stride = math.ceil(len(shown) / _MAX_LABELS)
    size = 9 if len(shown) <= 24 else 7 if len(shown) <= 40 else 6
    axes.set_yticks(range(0, len(shown), stride), [_shortened(name) for name in shown[::stride]], fontsize=size)
    if len(shown) <= _MAX_NUMBERED[0] and len(rounds) <= _MAX_NUMBERED[1]:
        _number_cells(axes, [[row[name] for row in numbers] for name in full], shares)
    _frame(axes, rounds.index(_chosen(record)), len(shown))


def _widest(record: PruningRecord) -> tuple[str, dict[str, int], list[dict[str, int]]]:
    """What the heat map shows: ranks, or channels where no layer is decomposed; the most per layer, and all rounds."""
    if record.cost.layers or not record.rounds[0].channels:
        return "rank", {n: c.full_rank for n, c in record.cost.layers.items()}, [r.ranks for r in record.rounds]
    return "channels", record.rounds[0].channels, [r.channels for r in record.rounds]


def _number_cells(axes: Axes, numbers: list[list[int]], shares: list[list[float]]) -> None:
    for row, values in enumerate(numbers):
        for column, value in enumerate(values):
            color = "white" if shares[row][column] > 0.55 else "#222222"
            axes.text(column, row, str(value), ha="center", va="center", fontsize=7.5, color=color)


def _frame(axes: Axes, column: int, rows: int) -> None:
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"fill": False, "edgecolor": _CHOSEN, "linewidth": 2.2, "clip_on": False, "zorder": 5}
    axes.add_patch(Rectangle((column - 0.5, -0.5), 1, rows, **look))


def _title(record: PruningRecord) -> str:
    chosen = _chosen(record)
    parts = []
    for kind in ("params", "macs"):
        kept = record.kept(chosen, kind)
        if kept is not None:
            parts.append(f"{100 * (1 - kept):.1f} % of the {_NAMES[kind]}")
    if chosen.round == 0:
        return "Nothing removed: the unpruned model was kept"
    title = f"{' and '.join(parts)} gone"
    if chosen.accuracy_best is not None:
        title += f" at {record.monitor} {_shown(record, chosen.accuracy_best)}"
        if record.reference is not None:
            title += f" (reference {_shown(record, record.reference)})"
    return title


def _chosen(record: PruningRecord) -> RoundRecord:
    return record.rounds[-1 if record.chosen is None else record.chosen]


def _in_percent(record: PruningRecord) -> bool:
    values: list[Any] = [r.accuracy_best for r in record.rounds if r.accuracy_best is not None]
    return record.mode == "max" and "acc" in record.monitor.lower() and all(0 <= v <= 1 for v in values)


def _shown(record: PruningRecord, value: float) -> str:
    return f"{100 * value:.2f} %" if _in_percent(record) else f"{value:.4g}"


def _tolerance(record: PruningRecord) -> str:
    assert record.tolerance is not None
    if not _in_percent(record):
        return f"{record.tolerance:.3g}"
    points = 100 * record.tolerance
    return f"{points:.3g} point{'' if points == 1 else 's'}"


def _shortened(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"\u2026{name[1 - limit :]}"
