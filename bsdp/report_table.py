"""Printing a summary: a table of what was gained, and how the removal was spread over the layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_BAR_WIDTH = 20
_MAX_LAYER_ROWS = 36
_WIDTH = 100


def print_summary(summary: Mapping[str, Any], *, console: Console | None = None) -> None:
    """Print a summary for people.

    Args:
        summary: From `bsdp.report.summarize`.
        console: Where to; default: standard output, at most 100 columns wide.
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        console = Console(highlight=False, width=min(console.width, _WIDTH) if console.is_terminal else _WIDTH)
    ascii_only = not console.encoding.lower().startswith("utf")
    console.print()
    console.print(_gains(summary))
    for line in _explanations(summary):
        console.print(Text(line))  # as `Text`, because notes may hold brackets, which are markup in a string
    console.print()
    console.print(_spread(summary, ascii_only=ascii_only))
    console.print()


def format_summary(summary: Mapping[str, Any], *, width: int = _WIDTH) -> str:
    """The text that `print_summary` prints, without colours."""
    from rich.console import Console

    console = Console(width=width, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        print_summary(summary, console=console)
    return capture.get()


def grouped_layers(layers: Sequence[Mapping[str, Any]], limit: int = _MAX_LAYER_ROWS) -> list[dict[str, Any]]:
    """Merge layers until at most `limit` rows are left, in model order.

    Layers of one block come together first, as long as that leaves a detailed picture; else equal runs of neighbours.

    Args:
        layers: The entry ``layers`` of a summary.
        limit: Largest number of rows.

    Returns:
        Rows with the keys ``name, count, forms, rank, full_rank, params, params_original``.
    """
    groups = [(str(layer["name"]), [layer]) for layer in layers]
    depth = max((name.count(".") for name, _ in groups), default=0)
    while len(groups) > limit and depth > 0:
        blocks: dict[str, list[Mapping[str, Any]]] = {}
        for layer in layers:
            blocks.setdefault(".".join(str(layer["name"]).split(".")[:depth]), []).append(layer)
        if len(blocks) < limit / 3:
            break
        groups = [(name if len(rows) > 1 else str(rows[0]["name"]), rows) for name, rows in blocks.items()]
        depth -= 1
    size = math.ceil(len(groups) / limit)
    runs = [groups[i : i + size] for i in range(0, len(groups), max(size, 1))]
    return [
        _row(run[0][0] if len(run) == 1 else f"{run[0][0]} to {run[-1][0]}", [row for _, rows in run for row in rows])
        for run in runs
    ]


def _row(name: str, members: list[Mapping[str, Any]]) -> dict[str, Any]:
    forms = Counter(str(layer["kind"]) for layer in members)
    keys = ["rank", "full_rank", "params", "params_original"]
    keys += [key for key in ("channels", "channels_original") if key in members[0]]
    sums = {key: sum(layer[key] for layer in members) for key in keys}
    return {"name": name, "count": len(members), "forms": dict(sorted(forms.items())), **sums}


def _gains(summary: Mapping[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="What pruning gained", title_justify="left")
    table.add_column("")
    for column in ("original", "pruned", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*_metric_row(summary))
    for label, key, words in (
        ("parameters", "params", ("fewer", "more")),
        ("MACs", "macs", ("fewer", "more")),
        ("file size", "file_bytes", ("smaller", "larger")),
        ("latency", "latency_ms", ("faster", "slower")),
    ):
        original, pruned = summary[f"{key}_original"], summary[f"{key}_pruned"]
        if original is None and pruned is None and key in ("file_bytes", "latency_ms"):
            continue  # not measured at all
        table.add_row(label, _quantity(key, original), _quantity(key, pruned), _ratio(original, pruned, words))
    return table


def _metric_row(summary: Mapping[str, Any]) -> tuple[str, str, str, str]:
    name, original, pruned = summary["test_metric"], summary["accuracy_reference"], summary["accuracy_pruned"]
    if original is None and pruned is None:
        name, original, pruned = summary["monitor"], summary["validation_reference"], summary["validation_pruned"]
    name = name or "accuracy"
    share = _is_share(name, summary["mode"], original, pruned)
    change = "-"
    if original is not None and pruned is not None:
        difference = pruned - original
        change = f"{100 * difference:+.2f} points" if share else f"{difference:+.4g}"
    return name.replace("_", " "), _value(original, share), _value(pruned, share), change


def _is_share(name: str, mode: str, *values: float | None) -> bool:
    return mode == "max" and "acc" in name.lower() and all(v is None or 0 <= v <= 1 for v in values)


def _value(value: float | None, share: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if share else f"{value:.4g}"


def _quantity(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "latency_ms":
        return f"{value:.3g} ms"
    if key == "file_bytes":
        return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"
    return f"{value:,}"


def _ratio(original: float | None, pruned: float | None, words: tuple[str, str]) -> str:
    if not original or pruned is None:
        return "-"
    ratio = pruned / original
    factor = original / pruned if 0 < pruned <= original else ratio
    return f"{100 * ratio:.1f} % ({factor:.3g}x {words[0] if ratio <= 1 else words[1]})"


def _explanations(summary: Mapping[str, Any]) -> list[str]:
    shapes = " and ".join("x".join(map(str, shape[1:])) for shape in summary["input_shapes"])
    lines = [
        "original: the unpruned transferred model at its best epoch before the first cut, new head included.",
        f"pruned: {_which(summary)}.",
    ]
    if "compression" in summary:
        lines = ["original: the network with all its layers whole; pruned: compressed without training."]
    lines += _validation(summary)
    if summary["macs_original"] is not None:
        lines.append(f"MACs: multiply-adds for one example{f' of {shapes}' if shapes else ''}.")
    if summary["latency_ms_original"] is not None:
        threads = summary["latency_threads"]
        lines.append(
            f"Latency: batch size {summary['latency_batch_size']}, {threads} thread{'' if threads == 1 else 's'}, "
            f"{summary['latency_device']}, both networks in turn."
        )
    if summary["latency_kept"] is not None:
        lines.append(f"By the latency table of the run {100 * summary['latency_kept']:.1f} % of the time is kept.")
    return lines + [f"Note: {note}" for note in summary["notes"]]


def _which(summary: Mapping[str, Any]) -> str:
    last = len(summary["rounds"]) - 1
    if summary["chosen_round"] == 0:
        failed = last > 0 and summary["tolerance"] is not None
        return f"the same model, {'no smaller one met the tolerance' if failed else 'nothing was removed'}"
    met = ", the smallest within the tolerance" if summary["met_tolerance"] and summary["chosen_round"] < last else ""
    return f"round {summary['chosen_round']} of {last}{met}"


def _validation(summary: Mapping[str, Any]) -> list[str]:
    name, original, pruned = summary["monitor"], summary["validation_reference"], summary["validation_pruned"]
    kept, words = (
        summary[f"{summary['target_kind']}_kept"],
        {"params": "parameters", "macs": "MACs", "latency": "latency", "bases": "bases", "channels": "channels"},
    )
    goal = "target: none but the tolerance"
    if summary["target"] is not None:
        goal = f"target: {100 * summary['target']:.3g} % of the {words[summary['target_kind']]} gone"
    lines = [f"{goal}." if kept is None else f"{goal}; reached: {100 * (1 - kept):.1f} %."]
    if original is not None and pruned is not None:
        share = _is_share(name, summary["mode"], original, pruned)
        line = f"chosen on {name}: {_value(pruned, share)} against {_value(original, share)}"
        if summary["tolerance"] is not None:
            allowed = 100 * summary["tolerance"] if share else summary["tolerance"]
            unit = "" if not share else " point" if allowed == 1 else " points"
            line += f", tolerance {allowed:.3g}{unit}: {'met' if summary['met_tolerance'] else 'NOT met'}"
        lines.append(f"{line}.")
    return lines


def _spread(summary: Mapping[str, Any], *, ascii_only: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    layers = summary["layers"]
    filled, empty = ("#", ".") if ascii_only else ("\u2588", "\u2591")
    title = f"How the removal was spread over {len(layers)} layers"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("form", no_wrap=True)
    channels = any("channels" in layer for layer in layers)
    if channels:
        table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("rank left", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("kept", justify="right", no_wrap=True)
    for row in grouped_layers(layers):
        bar = round(_BAR_WIDTH * row["rank"] / row["full_rank"])
        bar = min(max(bar, 1), _BAR_WIDTH - (row["rank"] < row["full_rank"]))
        table.add_row(
            Text(row["name"]),
            ", ".join(form if row["count"] == 1 else f"{n} {form}" for form, n in row["forms"].items()),
            *([f"{row['channels']} / {row['channels_original']}"] if channels else []),
            f"{row['rank']} / {row['full_rank']}",
            filled * bar + empty * (_BAR_WIDTH - bar),
            f"{row['params']:,}",
            f"{100 * row['params'] / row['params_original']:.1f} %",
        )
    inside, left = (sum(layer[key] for layer in layers) for key in ("params_original", "params"))
    outside, rest = summary["params_original"] - inside, summary["params_pruned"] - left
    share = f"{100 * rest / outside:.1f} %" if outside else "-"
    table.add_row("the rest, head too", "plain", *([""] if channels else []), "", "", f"{rest:,}", share)
    return table
