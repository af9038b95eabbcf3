"""Rows of a comparison: kept in a file, as a Markdown table, as a picture."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._methods import FINETUNE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
TITLES = (
    *("task", "method", "seeds", "epochs", "accuracy", "own reference", "points below the better baseline"),
    *("parameters kept", "MACs kept", "latency ratio", "minutes"),
)
NOTE = (
    "Mean (lowest to highest) over the seeds. Accuracy: test images, read once per run, after the fit. Own reference: "
    "the run's network before its first cut, at its best validation. The better baseline of a seed is the higher of "
    "that and of the unpruned network with all weights fine-tuned for as many epochs. Kept: pruned / original."
)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; none if it is not there."""
    if not path.is_file():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace the rows of a file."""
    write_text(path, json.dumps(rows, indent=1) + "\n")


def finished(row: Row) -> bool:
    """Whether a row has a result."""
    return row.get("accuracy") is not None


def skipped(row: Row) -> bool:
    """Whether a row says that its method cannot run on this network."""
    return row.get("skipped") is not None


def below_baseline(row: Row, rows: Sequence[Row], *, of: str = "accuracy") -> float | None:
    """Points below the higher of the reference and the fine-tuned network of the same task and seed.

    None for fine-tuning itself, and where the fine-tuned network is not there: against half of the bar nothing is said.

    Args:
        row: A finished row.
        rows: All rows.
        of: ``accuracy`` on test images or ``validation``.
    """
    same = [other for other in rows if (other["task"], other["seed"]) == (row["task"], row["seed"]) and finished(other)]
    tuned = [other[of] for other in same if other["method"] == FINETUNE and other.get(of) is not None]
    if row["method"] == FINETUNE or not tuned or row.get(of) is None:
        return None
    reference = row.get(f"{of}_reference")
    bar = max([*tuned, *([] if reference is None else [reference])])
    return 100.0 * float(bar - row[of])


def markdown(rows: Sequence[Row]) -> str:
    """The table, what it says about 1 point, and what failed."""
    lines = [f"| {' | '.join(TITLES)} |", f"{'| --- ' * len(TITLES)}|"]
    near = []
    for (task, method), runs in _groups(rows).items():
        lines.append(_line(task, method, runs, rows))
        losses = [below_baseline(run, rows) for run in runs]
        if all(loss is not None and loss < 1.0 for loss in losses):
            near.append(f"{method} ({task}, {len(runs)} {'seed' if len(runs) == 1 else 'seeds'})")
    lines += ["", NOTE, "", f"Under 1 point below the better baseline in every seed: {', '.join(near) or 'none'}."]
    lines += failures(rows)
    return "\n".join(lines) + "\n"


def failures(rows: Sequence[Row]) -> list[str]:
    """Lines on the runs without a result, and on the methods that were left out."""
    lines: list[str] = []
    failed = [row for row in rows if not finished(row) and not skipped(row)]
    if failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {row['task']}, {label(row)}, seed {row['seed']}: {row['failed']}" for row in failed]
    left_out = [row for row in rows if skipped(row)]
    if left_out:
        lines += ["", "Left out, as they cannot run on this network:", ""]
        lines += [f"- {row['task']}, {row['method']}: {row['skipped']}" for row in left_out]
    return lines


def label(row: Row) -> str:
    """Name of a row's method, with the target where it stands at several."""
    return str(row["method"]) if row.get("target") is None else f"{row['method']}@{row['target']:g}"


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Finished rows by task and method, in order of appearance, seeds ascending."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if finished(row):
            groups.setdefault((row["task"], label(row)), []).append(row)
    return {key: sorted(runs, key=lambda run: int(run["seed"])) for key, runs in groups.items()}


def _line(task: str, method: str, runs: list[Row], rows: Sequence[Row]) -> str:
    cells = [
        *(task, method, ", ".join(str(run["seed"]) for run in runs), spread([run["epochs"] for run in runs], "{:.3g}")),
        spread([run["accuracy"] for run in runs], "{:.2%}"),
        spread([run["accuracy_reference"] for run in runs], "{:.2%}"),
        spread([below_baseline(run, rows) for run in runs], "{:+.2f}"),
        *(spread([run[key] for run in runs], "{:.1%}") for key in ("params_ratio", "macs_ratio")),
        spread([run["latency_ratio"] for run in runs], "{:.2f}"),
        spread([run["minutes"] for run in runs], "{:.1f}"),
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean and range; a dash where a value is missing, for a mean over other seeds would mislead."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    low, high = form.format(min(known)), form.format(max(known))
    return form.format(statistics.mean(known)) + ("" if low == high else f" ({low} to {high})")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (kept, accuracy) that no other one beats by keeping as little at a higher accuracy, ascending."""
    front: list[tuple[float, float]] = []
    for kept, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((kept, accuracy))
    return front


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against parameters and against MACs kept: every run, the mean of every method and their front.

    Raises:
        ValueError: If no run has finished or the rows are of several tasks.
    """
    from bsdp.plots import new_figure

    groups = _groups(rows)
    tasks = {task for task, _ in groups}
    if len(tasks) != 1:
        raise ValueError(f"a picture shows the finished runs of one task, got those of {sorted(tasks) or 'none'}.")
    figure = new_figure(13.0, 5.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("params", "macs"), strict=True):
        _draw(axes, {method: runs for (_, method), runs in groups.items()}, kind)
    panels[0].set_ylabel("accuracy on test images (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(f"{tasks.pop()}: small markers are runs, large ones means over the seeds", fontsize=12)
    return figure


def _draw(axes: Axes, methods: dict[str, list[Row]], kind: str) -> None:
    from matplotlib import colormaps

    from bsdp.plots import kept_axis

    colors: Callable[[int], Any] = colormaps["tab20" if len(methods) > 10 else "tab10"]
    markers, shares, means = "oDs^vP*X<>", [100.0], []
    for i, (method, runs) in enumerate(methods.items()):
        points = [(100.0 * run[f"{kind}_ratio"], 100.0 * run["accuracy"]) for run in runs if run[f"{kind}_ratio"]]
        look: dict[str, Any] = {"color": colors(i), "marker": markers[i % len(markers)], "linestyle": "none"}
        axes.plot(*_columns(points), markersize=4, alpha=0.5, **look)
        mean = [tuple(statistics.mean(column) for column in zip(*points, strict=True))] if points else []
        axes.plot(*_columns(mean), markersize=9, markeredgecolor="white", zorder=4, label=method, **look)
        shares += [kept for kept, _ in points]
        means += mean
        if method == FINETUNE and mean:
            axes.axhspan(mean[0][1] - 1, mean[0][1], color=colors(i), alpha=0.12, linewidth=0, label="1 point below it")
    axes.plot(*_columns(pareto_front(means)), color="#444444", linewidth=1, linestyle="--", zorder=2, label="front")
    kept_axis(axes, shares, kind=kind)


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def rows_of(paths: Sequence[Path]) -> list[Row]:
    """The rows of some files."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        sys.exit(f"error: `--show`: there is no file {missing[0]!r}.")
    return [row for path in paths for row in read_rows(path)]
