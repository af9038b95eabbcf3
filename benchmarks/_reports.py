"""What a comparison says in the end: tables and a picture, for methods at one size or at several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import _frontier, _tables
from benchmarks._frontier_plot import figure as frontier_figure
from benchmarks._tables import finished, write_text


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of rows of one or of several comparisons."""
    at_sizes = {row["task"] for row in rows if row.get("target") is not None}
    parts = [
        _tables.markdown([row for row in rows if row["task"] not in at_sizes])
        if {r["task"] for r in rows} > at_sizes
        else "",
        _frontier.markdown([row for row in rows if row["task"] in at_sizes]) if at_sizes else "",
    ]
    return "\n".join(part for part in parts if part)


def write_report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write ``table.md`` and, once a run has finished, ``pareto.png`` from the rows."""
    from bsdp.plots import save_figure

    write_text(folder / "table.md", report(rows))
    if any(finished(row) for row in rows):
        at_sizes = any(row.get("target") is not None for row in rows)
        figure = frontier_figure(rows) if at_sizes else _tables.pareto_figure(rows)
        save_figure(figure, folder / "pareto.png")
