"""The real runs of RESULTS.md: each experiment pruned, and fine-tuned without pruning, for the same epochs and seeds.

Methods: ``bsdp`` prunes the pretrained network while it is transferred, ``tuned`` fine-tunes all weights for half of
the epochs and prunes in the other half, ``finetune`` fine-tunes all weights for all epochs.

    BSDP_DATA=<folder> python benchmarks/transfer.py run --experiment mnist_resnet56 --seeds 0 1
    python benchmarks/transfer.py table

Rows are kept in ``benchmarks/results/transfer_<experiment>.json``; runs that are there already are not repeated. The
test images are read once per run, after the fit, on the model that validation images chose.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXPERIMENTS = ("mnist_resnet56", "fashion_mnist_resnet56", "cifar10_resnet56", "caltech20_mobilenet_v2")
METHODS = ("bsdp", "tuned", "finetune")


def main() -> None:
    """Parse the command line and run, or print what was run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run what is missing")
    run.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    run.add_argument("--method", nargs="+", choices=METHODS, default=["bsdp", "finetune"])
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    run.set_defaults(action=run_missing)
    commands.add_parser("table", help="print the results as Markdown").set_defaults(action=print_table)
    options = parser.parse_args()
    options.action(options)


def run_missing(options: argparse.Namespace) -> None:
    """Run every experiment, seed and method that has no row yet, one after another."""
    if not os.environ.get("BSDP_DATA"):
        sys.exit("error: set BSDP_DATA to the folder with the data sets and weights (see the README).")
    todo = [(e, s, m) for e in options.experiment for s in options.seeds for m in options.method]
    for i, (experiment, seed, method) in enumerate(todo, start=1):
        if any(row["seed"] == seed and row["method"] == method for row in read_rows(experiment)):
            continue
        print(f"[{i}/{len(todo)}] {experiment}, {method}, seed {seed}", flush=True)
        row = run_one(experiment, seed, method)
        write_rows(experiment, [*read_rows(experiment), row])
        print(json.dumps(row), flush=True)


def run_one(experiment: str, seed: int, method: str) -> dict[str, Any]:
    """One fit on the command line, and what it reported."""
    start, name = time.monotonic(), f"benchmarks/{experiment}_{method}"
    common = ["--config", f"configs/experiment/{experiment}.yaml", "--seed_everything", str(seed), "--name", name]
    finetune = ["fit", *common, "--config", "configs/experiment/finetune.yaml"]
    words, epochs = ["fit", *common], 0
    if method == "finetune":
        words = finetune
    elif method == "tuned":
        first = Path(line_after(call([*finetune, "--trainer.max_epochs", "12"]), "Run folder: "))
        words += ["--config", "configs/experiment/prune_tuned.yaml"]
        words += [
            "--model.weights",
            f"{first.relative_to(ROOT) if first.is_absolute() else first}/checkpoints/last.ckpt",
        ]
        epochs = epochs_of(first)
    folder = Path(line_after(call(words), "Run folder: "))
    minutes = (time.monotonic() - start) / 60
    row = {"task": experiment, "method": method, "seed": seed, "epochs": epochs + epochs_of(folder)}
    row |= finetuned_values(folder, name) if method == "finetune" else pruned_values(folder)
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return row | {
        "minutes": round(minutes, 1),
        "commit": asked.stdout.strip(),
        "command": f"python train.py {' '.join(words)}",
    }


def pruned_values(folder: Path) -> dict[str, Any]:
    """Values of a pruned run, from its summary."""
    summary = json.loads((ROOT / folder / "summary.json").read_text())
    return {
        "accuracy_reference": summary["accuracy_reference"],
        "accuracy": summary["accuracy_pruned"],
        "params_ratio": summary["params_pruned"] / summary["params_original"],
        "macs_ratio": summary["macs_pruned"] / summary["macs_original"],
        "latency_ratio": summary["latency_ms_pruned"] / summary["latency_ms_original"],
        "params_original": summary["params_original"],
    }


def finetuned_values(folder: Path, name: str) -> dict[str, Any]:
    """Test accuracy of the best validation epoch of an unpruned run."""
    best = next(path for path in (ROOT / folder / "checkpoints").glob("*.ckpt") if path.stem != "last")
    call(["test", "--config", f"{folder}/config.yaml", "--ckpt_path", str(best.relative_to(ROOT)), "--name", name])
    written = max((ROOT / folder).parent.glob("test/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    with written.open() as file:
        accuracy = float(next(row for row in csv.DictReader(file) if row.get("test_accuracy"))["test_accuracy"])
    ratios = dict.fromkeys(("params_ratio", "macs_ratio", "latency_ratio"), 1.0)
    return {"accuracy_reference": None, "accuracy": accuracy, **ratios}


def epochs_of(folder: Path) -> int:
    """Epochs that were run."""
    with (ROOT / folder / "metrics.csv").open() as file:
        return 1 + max(int(float(row["epoch"])) for row in csv.DictReader(file) if row.get("epoch"))


def call(words: list[str]) -> str:
    """Run the command line of the project and return what it printed."""
    done = subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: `train.py {' '.join(words)}` failed with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


def line_after(text: str, start: str) -> str:
    """The rest of the line that starts so."""
    return next(line.removeprefix(start).strip() for line in text.splitlines() if line.startswith(start))


def read_rows(experiment: str) -> list[dict[str, Any]]:
    """The rows of one experiment so far."""
    path = RESULTS / f"transfer_{experiment}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    return rows


def write_rows(experiment: str, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of one experiment at once."""
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f".transfer_{experiment}.json"
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(RESULTS / f"transfer_{experiment}.json")


def print_table(_options: argparse.Namespace) -> None:
    """One Markdown row per experiment: means, and the spread as lowest to highest over seeds."""
    titles = ("experiment", "method", "seeds", "fine-tuned, unpruned", "reference", "pruned", "parameters gone")
    print(f"| {' | '.join(titles)} | MACs gone | latency ratio |\n{'| --- ' * (len(titles) + 2)}|")
    for experiment in EXPERIMENTS:
        rows = read_rows(experiment)
        finetuned = [row["accuracy"] for row in rows if row["method"] == "finetune"]
        for method in ("bsdp", "tuned"):
            pruned = [row for row in rows if row["method"] == method]
            if not pruned:
                continue
            gone = [[1.0 - row[key] for row in pruned] for key in ("params_ratio", "macs_ratio")]
            cells = [finetuned, *([row[key] for row in pruned] for key in ("accuracy_reference", "accuracy")), *gone]
            seeds = ", ".join(str(row["seed"]) for row in pruned)
            latency = spread([row["latency_ratio"] for row in pruned], "{:.2f}")
            print(
                f"| {experiment} | {method} | {seeds} | {' | '.join(spread(c, '{:.1%}') for c in cells)} | {latency} |"
            )


def spread(values: list[float], form: str) -> str:
    """Mean and range."""
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.mean(values)) + ("" if low == high else f" ({low} to {high})")


if __name__ == "__main__":
    main()
