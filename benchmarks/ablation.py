"""What every idea of basis pruning is worth: each alone, and each left out of all of them.

    python benchmarks/ablation.py --task fashion_mnist --epochs 20 --data.samples_per_class 50 --target 0.7
    python benchmarks/ablation.py --show benchmarks/results/ablation_*/results.json

All variants prune the same network to the same share of its parameters, whatever the accuracy, on the same data, in as
many epochs, with the same rounds. They are compared by validation accuracy, which is what a default may be chosen by.

  plain        the frame without any idea: orthonormal bases; scaling factors, batch norms and head train
  alone_NAME   plain with one idea
  all          the frame with all ideas that go together
  without_NAME all but one
  with_NAME    all and one more; where two exclude each other, it stands instead of the other one
  finetune     nothing removed, all weights trained

Three tenths of the epochs come before the first cut, then up to six rounds of one epoch each; the rest trains the final
structure. `--callbacks.IterativeBasisPruning.rounds 4` and the like, `--data.NAME`, `--model.NAME` and `--trainer.NAME`
change the task for all variants alike.

The folder --output gets results.json, table.md, configs/ and logs/, as with benchmarks/compare.py: finished runs are
not repeated, and the same command goes on where it was stopped. The runs go seed by seed, so that the first seed has a
table of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "benchmarks")]

from benchmarks._ablation_tables import markdown  # noqa: E402
from benchmarks._ideas import ablation_methods, variants  # noqa: E402
from benchmarks._methods import TASKS, read_task  # noqa: E402
from benchmarks._options import overrides_of, seeds_of, task_name  # noqa: E402
from benchmarks._tables import rows_of, write_text  # noqa: E402
from benchmarks.compare import Comparison, carry_out  # noqa: E402


def main(words: list[str] | None = None) -> int:
    """Parse the command line, then show or run."""
    options, rest = _parser().parse_known_args(words)
    if options.show:
        print(markdown(rows_of(options.show)), end="")
        return 0
    return carry_out(lambda: _comparison(options, overrides_of(rest)), show=markdown, write=_write)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    tasks = ", ".join(sorted(path.stem for path in TASKS.glob("*.yaml")))
    names = ", ".join(variant.name for variant in variants())
    parser.add_argument("--task", help=f"one of {tasks}, or a path")
    parser.add_argument(
        "--methods", default="", help=f"some of {names}, with commas; the frames are always there (default: all)"
    )
    parser.add_argument("--target", type=float, default=0.7, help="share of the parameters to remove (default: 0.7)")
    parser.add_argument("--seeds", default="0,1,2", help="whole numbers with commas between them (default: 0,1,2)")
    parser.add_argument("--epochs", type=int, help="epochs of every run (default: those of the task)")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/ablation_TASK)")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print the tables of results, run nothing")
    return parser


def _comparison(options: argparse.Namespace, overrides: dict[str, Any]) -> Comparison:
    if not options.task:
        raise ValueError(f"`--task` is missing: one of {', '.join(sorted(p.stem for p in TASKS.glob('*.yaml')))}.")
    if not 0.0 < options.target < 1.0:
        raise ValueError(f"`--target` must be a share between 0 and 1, such as 0.7, got {options.target}.")
    seeds = seeds_of(options.seeds)
    task = read_task(options.task, overrides, options.epochs)
    names = [name for name in options.methods.split(",") if name]
    methods = ablation_methods(task, target=options.target, names=names)
    name = task_name(options.task, overrides)
    folder = options.output or ROOT / "benchmarks" / "results" / f"ablation_{name}"
    samples = task["data"].get("init_args", {}).get("samples_per_class")
    return Comparison(name, methods, seeds, folder.resolve(), samples, script="ablation")


def _write(rows: list[dict[str, Any]], folder: Path) -> None:
    write_text(folder / "table.md", markdown(rows))


if __name__ == "__main__":
    sys.exit(main())
