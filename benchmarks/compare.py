"""Compare methods on one task: the same network, data, epochs and seeds for all of them, one run after another.

    python benchmarks/compare.py --task fashion_mnist --methods basis,finetune+prune_tuned --seeds 0,1,2 --epochs 12
    python benchmarks/compare.py --task mnist --methods basis,tp_taylor --targets 0.5,0.7,0.8,0.9,0.95 --seeds 0,1,2
    python benchmarks/compare.py --show benchmarks/results/compare_*/results.json

A task is a file in benchmarks/tasks (or a path): network, data, epochs. A method is a file in configs/experiment or,
for other libraries, in benchmarks/methods (or a path), of which only the method is taken; `a+b` runs `b` on the weights
that `a` left, half of the epochs each. `finetune`, all weights trained and nothing removed, is always among them: the
unpruned network to compare with.

With --targets every method ends at every one of these sizes, whatever the accuracy: shares removed of the parameters,
or of what the method's `target_kind` says (`channels_tuned_macs`: of the multiply-adds).
The table then has the accuracy at each size, the smallest network of every method that is at most 1 point below the
unpruned one on validation images, and a verdict. A method that cannot run on the network is left out, with the reason.

Further options change the task for all methods alike, a value each:
  --data.NAME, --model.NAME, --trainer.NAME   as on the command line of the project: --data.samples_per_class 100
  --callbacks.CLASS.NAME                      of a callback, in the methods that have it:
                                              --callbacks.IterativeBasisPruning.target 0.5

Epochs are those on the task's data. What a method does before its fit comes on top: `conditional_source` pretrains on
source images, `cap` and the activation metric read training images once more. Minutes count all of it.

Before the first run every method is tried on one batch. The folder --output gets

  results.json   a row for every run; those in it are not repeated, failed ones are tried again
  table.md       mean and spread over the seeds
  pareto.png     accuracy against parameters and MACs kept
  configs/       the configuration of every method; other settings need another --output
  logs/          what the runs printed

and logs/compare/... the run folders. A comparison that was stopped goes on with the same command; the run that was
interrupted starts anew, in a fresh folder. Run the commands from anywhere; data sets are found through BSDP_DATA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

# As a script: modules are looked up from the root, and benchmarks/coverage.py must not hide the package `coverage`.
ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "benchmarks")]

from benchmarks import _runs  # noqa: E402
from benchmarks._methods import EXPERIMENTS, FINETUNE, PEERS, TASKS, Method, build_methods, read_task  # noqa: E402
from benchmarks._options import overrides_of, seeds_of, targets_of, task_name  # noqa: E402
from benchmarks._reports import report, write_report  # noqa: E402
from benchmarks._session import Display, alone_in  # noqa: E402
from benchmarks._tables import finished, read_rows, rows_of, skipped, write_rows, write_text  # noqa: E402

Key = tuple[str, float | None, int]
Show = Callable[[list[dict[str, Any]]], str]
Write = Callable[[list[dict[str, Any]], Path], None]


@dataclass(frozen=True)
class Comparison:
    """What is asked for.

    Attributes:
        task: Name of the task.
        methods: Fine-tuning first.
        seeds: Seeds of every method.
        folder: Where the results go.
        samples_per_class: Training images of each class; None for all.
        script: The file here that makes the comparison.
    """

    task: str
    methods: list[Method]
    seeds: list[int]
    folder: Path
    samples_per_class: int | None = None
    script: str = "compare"

    @property
    def results(self) -> Path:
        """File of the rows."""
        return self.folder / "results.json"

    @property
    def frontier(self) -> bool:
        """Whether methods are compared at several sizes."""
        return any(method.target is not None for method in self.methods)

    def configs(self, method: Method) -> tuple[Path, ...]:
        """Files of a method's stages."""
        label, stages = method.label, len(method.stages)
        names = [label] if stages == 1 else [f"{label}.{i}" for i in range(stages)]
        return tuple(self.folder / "configs" / f"{name}.yaml" for name in names)

    def missing(self) -> list[tuple[Method, int]]:
        """Runs that have no result yet, seed by seed, so that a part of the comparison is already one."""
        done = {key_of(row) for row in read_rows(self.results) if finished(row)}
        return [(m, seed) for seed in self.seeds for m in self.methods if (m.name, m.target, seed) not in done]

    def present(self) -> set[str]:
        """Labels of the methods that have results."""
        done = {key_of(row)[:2] for row in read_rows(self.results) if finished(row)}
        return {method.label for method in self.methods if (method.name, method.target) in done}


def key_of(row: dict[str, Any]) -> Key:
    """What a row is the result of."""
    return row["method"], row.get("target"), row["seed"]


def main(words: list[str] | None = None) -> int:
    """Parse the command line, then show or compare."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if options.show:
        print(report(rows_of(options.show)), end="")
        return 0
    return carry_out(lambda: _comparison(options, overrides_of(rest)))


def carry_out(make: Callable[[], Comparison], *, show: Show = report, write: Write = write_report) -> int:
    """Make a comparison, try its methods and run what is missing.

    Args:
        make: Gives the comparison; a ValueError says what was wrong with the command line.
        show: The tables of rows.
        write: Writes them into a folder.

    Returns:
        0; 1 if runs failed, 2 after a mistake on the command line, 130 after an interruption.
    """
    try:
        with alone_in((comparison := make()).folder) as handles:
            write_configs(comparison)
            return run_all(try_all(comparison, handles), handles, show=show, write=write)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    tasks, methods, peers = (
        ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) for folder in (TASKS, EXPERIMENTS, PEERS)
    )
    parser.add_argument("--task", help=f"one of {tasks}, or a path")
    parser.add_argument("--methods", default="", help=f"with commas between them; of {methods}, {peers}, or paths")
    parser.add_argument("--targets", default="", help="shares to remove, such as 0.5,0.7,0.9")
    parser.add_argument("--seeds", default="0,1,2", help="whole numbers with commas between them (default: 0,1,2)")
    parser.add_argument("--epochs", type=int, help="epochs of every run (default: those of the task)")
    parser.add_argument(
        "--output", type=Path, help="folder (default: benchmarks/results/compare_TASK or frontier_TASK)"
    )
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print the table of results, run nothing")
    return parser


def _comparison(options: argparse.Namespace, overrides: dict[str, Any]) -> Comparison:
    if not options.task:
        raise ValueError(f"`--task` is missing: one of {', '.join(sorted(p.stem for p in TASKS.glob('*.yaml')))}.")
    seeds = seeds_of(options.seeds)
    task = read_task(options.task, overrides, options.epochs)
    targets = targets_of(options.targets)
    methods = build_methods([name for name in options.methods.split(",") if name], task, targets)
    name = task_name(options.task, overrides)
    kind = "frontier" if targets else "compare"
    folder = options.output or ROOT / "benchmarks" / "results" / f"{kind}_{name}"
    samples = task["data"].get("init_args", {}).get("samples_per_class")
    return Comparison(name, methods, seeds, folder.resolve(), samples)


def write_configs(comparison: Comparison) -> None:
    """Write the methods' configurations; refuse others than those of the rows that are there already."""
    done = comparison.present()
    for method in comparison.methods:
        for path, stage in zip(comparison.configs(method), method.stages, strict=True):
            text = f"# Made by benchmarks/{comparison.script}.py: {method.label} on {comparison.task}.\n"
            text += yaml.safe_dump(stage, sort_keys=False)
            if path.is_file() and path.read_text(encoding="utf-8") != text and method.label in done:
                raise ValueError(
                    f"`--output`: {comparison.folder} has results of {method.label!r} with other settings (see "
                    f"{path}). Give another folder, or the settings of before: rows of one table must be comparable."
                )
            write_text(path, text)


def try_all(comparison: Comparison, handles: tuple[int, ...]) -> Comparison:
    """Try every method that has no result yet on one batch, so that nothing starts that cannot run.

    Returns:
        The comparison; one at several sizes without the methods that cannot run, which have rows that say why.

    Raises:
        ValueError: With the reason of every method that cannot, if it is not at several sizes or fine-tuning is one.
    """
    present = comparison.present()
    done = {method.name for method in comparison.methods if method.label in present}
    todo: dict[str, Method] = {}
    for method, _ in comparison.missing():
        if method.name not in done:
            todo.setdefault(method.name, method)  # at the first of its targets; another one may be out of reach
    reasons: dict[str, str] = {}
    display = Display(sys.stdout)
    for method in todo.values():
        for config in comparison.configs(method):
            log = comparison.folder / "logs" / f"{config.stem}_trial.log"
            reason = _runs.try_out(config, log, tick=display.tick, handles=handles)
            if reason is not None:
                reasons[method.name] = f"{reason} (log: {_runs.shown(log)})"
    display.clear()
    if reasons and (FINETUNE in reasons or not comparison.frontier):
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"`--methods`: these cannot run with the task {comparison.task!r}; leave them out:\n  {listed}"
        )
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}", flush=True)
    tried = {method.name for method in comparison.methods}
    rows = [row for row in read_rows(comparison.results) if not (skipped(row) and row["method"] in tried)]
    missing = {"seed": None, "accuracy": None, "commit": _runs.commit()}
    rows += [{"task": comparison.task, "method": name, **missing, "skipped": why} for name, why in reasons.items()]
    write_rows(comparison.results, rows)
    return replace(comparison, methods=[method for method in comparison.methods if method.name not in reasons])


def run_all(
    comparison: Comparison, handles: tuple[int, ...], *, show: Show = report, write: Write = write_report
) -> int:
    """Run what is missing, write rows, table and picture after each run, and print the table."""
    missing = comparison.missing()
    minutes: list[float] = []
    total = len(comparison.methods) * len(comparison.seeds)
    for i, (method, seed) in enumerate(missing):
        left = f", about {sum(minutes) / i * (len(missing) - i):.0f} min left" if i else ""
        print(f"[{total - len(missing) + i + 1}/{total}] {method.label}, seed {seed}{left}", flush=True)
        row = _run(comparison, method, seed, handles)
        minutes.append(row["minutes"])
        # Rows of other methods stay; a failed one of this run is replaced, its log is not.
        rows = [r for r in read_rows(comparison.results) if key_of(r) != (method.name, method.target, seed)]
        write_rows(comparison.results, [*rows, row])
        print(f"  {_said(row)}", flush=True)
        write([*rows, row], comparison.folder)
    rows = read_rows(comparison.results)
    write(rows, comparison.folder)
    print(f"\n{show(rows)}\nwritten: {comparison.folder}")
    return 0 if all(finished(row) or skipped(row) for row in rows) else 1


def _run(comparison: Comparison, method: Method, seed: int, handles: tuple[int, ...]) -> dict[str, Any]:
    display = Display(sys.stdout)
    run = _runs.Run(
        task=comparison.task,
        method=method.name,
        seed=seed,
        configs=comparison.configs(method),
        name=f"{comparison.script}/{comparison.folder.name}/{method.label}",
        log=comparison.folder / "logs" / f"{method.label}_seed{seed}.log",
        prunes=method.prunes,
        target=method.target,
        samples_per_class=comparison.samples_per_class,
    )
    row = _runs.execute(run, tick=display.tick, handles=handles)
    display.clear()
    return row


def _said(row: dict[str, Any]) -> str:
    if not finished(row):
        return f"failed after {row['minutes']} min: {row['failed']} (log: {row['log']})"
    kept = row["params_ratio"]
    return f"accuracy {row['accuracy']:.2%}, parameters kept {kept:.1%}, {row['minutes']} min"


if __name__ == "__main__":
    sys.exit(main())
