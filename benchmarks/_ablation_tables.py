"""What an ablation says: what each idea gives alone and beside the others, and the figures of every variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks._ideas import ALL, IDEAS, PLAIN, Idea, Variant, variants
from benchmarks._methods import FINETUNE
from benchmarks._tables import Row, failures, finished, spread

_FRAMES = {
    PLAIN: "Each idea alone, on top of plain basis pruning (`plain`):",
    ALL: "Each idea left out of all, or added to them (`all`):",
}
_TITLES = (
    *("method", "change", "seeds", "validation", "difference, points", "test"),
    *("parameters kept", "MACs kept", "minutes"),
)
NOTE = (
    "Mean (lowest to highest) over the seeds. Differences are between runs of the same seed, on validation images, in "
    "points; test images are read once per run, after the fit. Kept: pruned / original."
)
Runs = dict[str, list[Row]]


def markdown(rows: Sequence[Row]) -> str:
    """The tables of every task and target, and what failed."""
    known = {variant.name for variant in variants()}
    keys = dict.fromkeys((row["task"], row["target"]) for row in rows if row["method"] in known and finished(row))
    parts = [_ablation([r for r in rows if r["task"] == task], task, target) for task, target in keys]
    return (
        "\n".join([*parts, *failures(rows), ""])
        if parts
        else "\n".join(["No variant has finished.", *failures(rows), ""])
    )


def _ablation(rows: Sequence[Row], task: str, target: float) -> str:
    runs: Runs = {}
    for row in sorted((row for row in rows if finished(row)), key=lambda row: int(row["seed"])):
        if row.get("target") == target or row["method"] == FINETUNE:
            runs.setdefault(row["method"], []).append(row)
    lines = [f"### {task}, {target:.0%} of the parameters to go", "", *_summary(runs), ""]
    for frame, text in _FRAMES.items():
        shown = [variant for variant in variants() if variant.frame == frame and variant.name in runs]
        if shown:
            lines += [text, "", f"| {' | '.join(_TITLES)} |", f"{'| --- ' * len(_TITLES)}|"]
            lines += [*(_line(variant, runs) for variant in shown), ""]
    if FINETUNE in runs:
        validation, test = (_shown(runs[FINETUNE], key, "{:.2%}") for key in ("validation", "accuracy"))
        lines += [f"Unpruned, all weights fine-tuned for as long: validation {validation}, test {test}.", ""]
    return "\n".join([*lines, NOTE, ""])


def _summary(runs: Runs) -> list[str]:
    """One line for each idea: what it gives, alone and beside the others."""
    lines = ["What each idea gives, in points of validation accuracy; above 0 it helps:", ""]
    lines += ["| idea | what it is | alone | beside the others | that is |", "| --- | --- | --- | --- | --- |"]
    by_idea = {(v.frame, v.idea.name): v for v in variants() if v.idea is not None}
    for idea in IDEAS:
        alone, beside = by_idea[PLAIN, idea.name], by_idea[ALL, idea.name]
        if alone.name in runs or beside.name in runs:
            cells = [*(_points(gains(variant, runs)) for variant in (alone, beside)), _how(idea)]
            lines.append(f"| {idea.name} | {idea.text} | {' | '.join(cells)} |")
    return lines


def _how(idea: Idea) -> str:
    if idea.in_all:
        return "all - all without it"
    return f"instead of {', '.join(idea.instead_of)}" if idea.instead_of else "added to all"


def gains(variant: Variant, runs: Runs) -> list[float | None]:
    """Points of validation accuracy that the idea of a variant gives, for each seed; above 0 it helps.

    Where the idea was left out this is the frame minus the variant.

    Args:
        variant: With an idea.
        runs: Finished rows by method.
    """
    sign = -1.0 if variant.frame == ALL and variant.idea is not None and variant.idea.in_all else 1.0
    return [None if value is None else sign * value for value in differences(variant, runs)]


def differences(variant: Variant, runs: Runs) -> list[float | None]:
    """Points of validation accuracy between a variant and its frame for each of its seeds; None where one is missing.

    Args:
        variant: One of `variants`.
        runs: Finished rows by method.
    """
    frame = {row["seed"]: row.get("validation") for row in runs.get(variant.frame, [])}
    found: list[float | None] = []
    for row in runs.get(variant.name, []):
        own, other = row.get("validation"), frame.get(row["seed"])
        found.append(None if own is None or other is None else 100.0 * (own - other))
    return found


def _line(variant: Variant, runs: Runs) -> str:
    own = runs[variant.name]
    cells = [
        *(variant.name, variant.change or "the frame", ", ".join(str(row["seed"]) for row in own)),
        _shown(own, "validation", "{:.2%}"),
        _points(differences(variant, runs)) if variant.change else "",
        _shown(own, "accuracy", "{:.2%}"),
        *(_shown(own, key, "{:.1%}") for key in ("params_ratio", "macs_ratio")),
        _shown(own, "minutes", "{:.1f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _shown(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    return spread([row.get(key) for row in rows], form)


def _points(values: Sequence[float | None]) -> str:
    return spread(values, "{:+.2f}")
