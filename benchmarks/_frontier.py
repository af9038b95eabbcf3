"""Methods at several sizes: accuracy at each, the smallest network within a point, and who is ahead of whom.

The choice between the sizes of a method is made on validation images; the test figures of the chosen one are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._methods import FINETUNE
from benchmarks._tables import Row, below_baseline, failures, finished, spread

ALLOWED = 1.0  # points below the better baseline
GOAL = 2.0 / 3.0  # of the parameters and of the MACs of the best peer
SHARES = (("params_ratio", "parameters"), ("macs_ratio", "MACs"))
_LIBRARIES = ("tp_taylor", "tp_l1", "tp_fpgm", "lightning_model_pruning")
_PUBLISHED = (
    "paper",
    "sigma_truncation",
    "energy_truncation",
    "taylor_2016",
    "taylor_2019",
    "transtailor",
    "target_aware",
)
PEERS = frozenset((*_LIBRARIES, *_PUBLISHED, "channel_scaling"))


@dataclass(frozen=True, eq=False)
class Point:
    """One method at one size, over the seeds.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        target: Share it was to remove; None for the unpruned network.
        runs: Its rows, seeds ascending.
        below: Points below the better baseline on validation images, mean over the seeds; None if not known.
        below_test: The same on test images.
    """

    task: str
    method: str
    target: float | None
    runs: tuple[Row, ...]
    below: float | None
    below_test: float | None

    def mean(self, key: str) -> float:
        """Mean over the seeds."""
        return statistics.mean(float(run[key]) for run in self.runs)

    def has(self, key: str) -> bool:
        """Whether a value is there for every seed."""
        return all(run.get(key) is not None for run in self.runs)

    @property
    def label(self) -> str:
        """Method and target."""
        return self.method if self.target is None else f"{self.method}@{self.target:g}"


def points(rows: Sequence[Row]) -> list[Point]:
    """The finished rows by task, method and target, in order of appearance."""
    groups: dict[tuple[str, str, float | None], list[Row]] = {}
    for row in rows:
        if finished(row):
            groups.setdefault((row["task"], row["method"], row.get("target")), []).append(row)
    found = []
    for (task, method, target), runs in groups.items():
        below = [_mean([below_baseline(run, rows, of=of) for run in runs]) for of in ("validation", "accuracy")]
        ordered = tuple(sorted(runs, key=lambda run: int(run["seed"])))
        found.append(Point(task, method, target, ordered, *below))
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; None where one is missing, for a mean over other seeds would mislead."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def is_near(point: Point) -> bool:
    """Whether a network is within the allowed loss on validation images."""
    return point.below is not None and point.below <= ALLOWED + 1e-9


def smallest(found: Sequence[Point], key: str) -> Point | None:
    """Of one method's points, the smallest that is within the allowed loss on validation images; None if none is.

    Args:
        found: Points of one method on one task.
        key: ``params_ratio`` or ``macs_ratio``.
    """
    near = [p for p in found if is_near(p) and p.has(key)]
    return min(near, key=lambda point: point.mean(key), default=None)


def markdown(rows: Sequence[Row]) -> str:
    """Tables and verdict of every task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = [_task([row for row in rows if row["task"] == task]) for task in tasks]
    if len(tasks) > 1:
        met = sum(verdict(points([row for row in rows if row["task"] == task])).met for task in tasks)
        parts.append(f"The goal of at most {GOAL:.2f} of both is met on {met} of {len(tasks)} tasks.\n")
    return "\n".join(parts)


def _task(rows: Sequence[Row]) -> str:
    found = points(rows)
    if not found:
        return "\n".join([*failures(rows), ""])
    methods = list(dict.fromkeys(point.method for point in found))
    lines = [f"### {found[0].task}", "", *_sizes(found, methods), "", *_choices(found, methods), ""]
    lines.append(f"**{verdict(found).text}**")
    return "\n".join([*lines, *failures(rows), ""])


def _sizes(found: Sequence[Point], methods: Sequence[str]) -> list[str]:
    """Accuracy at each size."""
    targets = sorted({p.target for p in found if p.target is not None})
    lines = [
        "Accuracy on test images (parameters kept / MACs kept), mean (lowest to highest) over the seeds, by the share "
        "that was to go, of the parameters or of what the method counts (`_macs`: of the MACs):",
        "",
        f"| method | {' | '.join(f'{target:.0%} gone' for target in targets)} |",
        f"{'| --- ' * (len(targets) + 1)}|",
    ]
    for method in methods:
        if method == FINETUNE:
            continue
        cells = [next((p for p in found if (p.method, p.target) == (method, target)), None) for target in targets]
        lines.append(f"| {method} | {' | '.join('-' if cell is None else _cell(cell) for cell in cells)} |")
    tuned = next((p for p in found if p.method == FINETUNE), None)
    if tuned is not None:
        seeds = ", ".join(str(run["seed"]) for run in tuned.runs)
        accuracy = spread([run["accuracy"] for run in tuned.runs], "{:.2%}")
        lines += [
            "",
            f"Unpruned, all weights fine-tuned: {accuracy} (seeds {seeds}; {tuned.runs[0]['epochs']} epochs).",
        ]
    return lines


def _cell(point: Point) -> str:
    kept = " / ".join(f"{point.mean(key):.1%}" if point.has(key) else "-" for key in ("params_ratio", "macs_ratio"))
    seeds = f", {len(point.runs)} seed{'s' * (len(point.runs) > 1)}"
    return f"{spread([run['accuracy'] for run in point.runs], '{:.2%}')} ({kept}{seeds})"


def _choices(found: Sequence[Point], methods: Sequence[str]) -> list[str]:
    """The smallest networks of every method."""
    lines = [
        f"Smallest network whose validation accuracy is at most {ALLOWED:g} point below the better of the method's own "
        "reference and the fine-tuned network (means over the seeds); test figures of that network:",
        "",
        "| method | by | target | accuracy | points below, validation | points below, test | parameters kept "
        "| MACs kept | latency ratio | not zero | minutes |",
        f"{'| --- ' * 11}|",
    ]
    for method in methods:
        own = [p for p in found if p.method == method]
        if method == FINETUNE:
            continue
        chosen = {key: smallest(own, key) for key in ("params_ratio", "macs_ratio")}
        if chosen["params_ratio"] is None:
            lines.append(f"| {method} | - | none {'| - ' * 8}|")
        elif chosen["params_ratio"] is chosen["macs_ratio"]:
            lines.append(_choice(chosen["params_ratio"], "both"))
        else:
            lines += [_choice(point, what) for key, what in SHARES if (point := chosen[key]) is not None]
    return lines


def _choice(point: Point, by: str) -> str:
    def show(key: str, form: str) -> str:
        return spread([run.get(key) for run in point.runs], form)

    cells = [
        *(point.method, by, f"{point.target:g}", show("accuracy", "{:.2%}")),
        *("-" if below is None else f"{below:+.2f}" for below in (point.below, point.below_test)),
        *(show("params_ratio", "{:.1%}"), show("macs_ratio", "{:.1%}"), show("latency_ratio", "{:.2f}")),
        *(show("nonzero_ratio", "{:.1%}"), show("minutes", "{:.1f}")),
    ]
    return f"| {' | '.join(cells)} |"


def is_peer(method: str) -> bool:
    """Whether a method is somebody else's, or a variant of one (``tp_l1_long``); of several stages the last counts."""
    last = method.rsplit("+", 1)[-1]
    return last in PEERS or last.startswith(tuple(f"{name}_" for name in PEERS))


@dataclass(frozen=True)
class Verdict:
    """Ours against the best peers of one task.

    Attributes:
        text: In words.
        met: Whether the goal is met.
        params: Parameters of our network / those of the best peer's; None where no network of ours is near enough.
        macs: The same of the MACs.
    """

    text: str
    met: bool
    params: float | None
    macs: float | None


def verdict(found: Sequence[Point]) -> Verdict:
    """Compare the smallest networks of ours within the allowed loss with the smallest of all peers.

    Parameters and MACs are those of one network of ours; the best peer may be another one for each of the two.

    Args:
        found: Points of one task.
    """
    near = [p for p in found if p.method != FINETUNE and is_near(p) and all(p.has(key) for key, _ in SHARES)]
    ours = [p for p in near if not is_peer(p.method)]
    if not ours:
        return Verdict(f"No network of ours is within {ALLOWED:g} point.", False, None, None)
    shares, names = [], []
    for key, what in SHARES:
        best = min((p for p in near if is_peer(p.method)), key=lambda point: point.mean(key), default=None)
        # The unpruned network is the peer where no other is within a point.
        shares.append(1.0 if best is None else best.mean(key))
        names.append(f"{shares[-1]:.1%} of the {what} ({'unpruned' if best is None else best.label})")
    ratios = {p: [p.mean(key) / share for (key, _), share in zip(SHARES, shares, strict=True)] for p in ours}
    own = min(ours, key=lambda point: max(ratios[point]))
    met = max(ratios[own]) <= GOAL + 1e-9
    kept = " and ".join(f"{own.mean(key):.1%} of the {what}" for key, what in SHARES)
    text = (
        f"Best of ours, {own.label}, keeps {kept}; the best peers keep {' and '.join(names)}: ratios "
        f"{ratios[own][0]:.2f} and {ratios[own][1]:.2f}, the goal of at most {GOAL:.2f} for both is "
        f"{'met' if met else 'missed'} ({len(own.runs)} seeds)."
    )
    return Verdict(text, met, *ratios[own])
