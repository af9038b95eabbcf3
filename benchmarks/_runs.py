"""One run of a comparison: the fits on the command line of the project, and the row of what they gave."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._methods import ROOT

Row = dict[str, Any]
_QUANTITIES = (("params", "params"), ("macs", "macs"), ("latency", "latency_ms"))
Tick = Callable[[str], None]


class RunFailed(Exception):
    """A run ended without a result; the text says why."""


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        seed: Seed of the run.
        configs: Configuration file of every stage.
        name: Name of the run folders, below ``logs``.
        log: File that gets what the commands print.
        prunes: A summary is expected; else the best checkpoint is tested.
        target: Share to remove, where methods are compared at several.
        samples_per_class: Training images of each class; None for all.
    """

    task: str
    method: str
    seed: int
    configs: tuple[Path, ...]
    name: str
    log: Path
    prunes: bool
    target: float | None = None
    samples_per_class: int | None = None


def execute(run: Run, *, tick: Tick = lambda _line: None, handles: Sequence[int] = ()) -> Row:
    """Run all stages in fresh run folders and give the row, with ``failed`` and the reason if there is no result.

    Args:
        run: What to run.
        tick: Called every second with the newest line of the log.
        handles: File descriptors that the processes keep open.
    """
    start, commands = time.monotonic(), []
    row: Row = {"task": run.task, "method": run.method, "target": run.target, "seed": run.seed, "epochs": 0}
    row["samples_per_class"] = run.samples_per_class
    values: Row = dict.fromkeys(("accuracy_reference", "accuracy", "params_ratio", "macs_ratio", "latency_ratio"))
    before: list[str] = []
    folders: list[Path] = []
    try:
        for config in run.configs:
            words = ["fit", "--config", shown(config), "--seed_everything", str(run.seed), "--name", run.name, *before]
            commands.append(f"python train.py {' '.join(words)}")
            folder = run_folder(call(words, run.log, tick=tick, handles=handles))
            row["epochs"] += epochs_of(folder)
            folders.append(folder)
            pruned, last = folder / "pruned.safetensors", folder / "checkpoints" / "last.ckpt"
            before = ["--model.weights", shown(pruned if pruned.is_file() else last), "--model.head", "pretrained"]
        minutes = time.monotonic() - start
        values |= (
            pruned_values(folder, earlier=folders[:-1])
            if run.prunes
            else unpruned_values(folder, run, tick=tick, handles=handles)
        )
        values["folder"] = shown(folder)
    except RunFailed as error:
        minutes = time.monotonic() - start
        values["failed"] = str(error)
    return {
        **row,
        **values,
        "minutes": round(minutes / 60, 2),
        "commit": commit(),
        "command": " && ".join(commands),
        "log": shown(run.log),
    }


def pruned_values(folder: Path, *, earlier: Sequence[Path] = ()) -> Row:
    """Values of a pruned run, from the summary that `PruningReport` wrote after the fit.

    Args:
        folder: The run's folder.
        earlier: Folders of the stages before it; what they removed counts, too.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise RunFailed("the fit wrote no summary.json: nothing was pruned")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary.get("accuracy_pruned") is None:
        raise RunFailed(f"summary.json has no accuracy: {'; '.join(summary.get('notes', [])) or 'no reason given'}")
    ratios = {f"{row}_ratio": ratio(summary, key) for row, key in _QUANTITIES}
    sizes = {key: summary.get(key) for key in ("params_original", "macs_original")}
    for before in reversed(earlier):
        if (before / "summary.json").is_file():
            first = json.loads((before / "summary.json").read_text(encoding="utf-8"))
            shares = {f"{row}_ratio": ratio(first, key) for row, key in _QUANTITIES}
            ratios = {key: _product(value, shares[key]) for key, value in ratios.items()}
            sizes = {key: first.get(key) for key in sizes}
    return {
        "accuracy_reference": summary.get("accuracy_reference"),
        "accuracy": summary["accuracy_pruned"],
        "validation_reference": summary.get("validation_reference"),
        "validation": summary.get("validation_pruned"),
        **ratios,
        **sizes,
        **{key: summary[key] for key in ("nonzero_ratio",) if key in summary},
    }


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def ratio(summary: Row, key: str) -> float | None:
    """Pruned / original of a summary's entry; None where one of them was not measured."""
    pruned, original = summary.get(f"{key}_pruned"), summary.get(f"{key}_original")
    return None if pruned is None or not original else float(pruned) / float(original)


def unpruned_values(folder: Path, run: Run, *, tick: Tick, handles: Sequence[int]) -> Row:
    """Test accuracy of the best validation epoch of a run that removed nothing."""
    best = [path for path in sorted((folder / "checkpoints").glob("*.ckpt")) if not path.stem.startswith("last")]
    if not best:
        raise RunFailed(
            "the fit left no checkpoint of its best epoch: add a ModelCheckpoint that monitors val_accuracy"
        )
    words = ["test", "--config", shown(folder / "config.yaml"), "--ckpt_path", shown(best[-1]), "--name", run.name]
    call(words, run.log, tick=tick, handles=handles)
    written = max(folder.parent.glob("test/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    values = [row["test_accuracy"] for row in read_csv(written) if row.get("test_accuracy")]
    seen = [float(row["val_accuracy"]) for row in read_csv(folder / "metrics.csv") if row.get("val_accuracy")]
    ratios = dict.fromkeys(("params_ratio", "macs_ratio", "latency_ratio"), 1.0)
    return {"accuracy": float(values[-1]), "validation": max(seen, default=None), **ratios}


def try_out(config: Path, log: Path, *, tick: Tick = lambda _line: None, handles: Sequence[int] = ()) -> str | None:
    """One batch of a fit and of a validation, nothing kept: the reason why this configuration cannot run, or None."""
    try:
        call(["fit", "--config", shown(config), "--trainer.fast_dev_run", "true"], log, tick=tick, handles=handles)
    except RunFailed as error:
        return str(error)
    return None


def call(words: list[str], log: Path, *, tick: Tick, handles: Sequence[int] = ()) -> str:
    """Run the command line of the project, add what it prints to `log`, and return that.

    Raises:
        RunFailed: If it ends with an error. An exception here, such as an interruption, ends the process first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        start = file.tell()
        file.write(f"$ python train.py {' '.join(words)}\n".encode())
        file.flush()
        command = [sys.executable, "-u", "train.py", *words]  # a killed run has said all it knew
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, pass_fds=handles)
        try:
            while process.poll() is None:
                tick(last_line(log))
                wait(process)
        finally:
            end(process)
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    if process.returncode:
        signalled = f"ended by signal {-process.returncode}; " if process.returncode < 0 else ""
        raise RunFailed(f"{signalled}{last_line(log)}"[:600])
    return text


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process, a second at most."""
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_folder(text: str) -> Path:
    """The folder that a fit named at its end."""
    named = [line.removeprefix("Run folder: ").strip() for line in text.splitlines() if line.startswith("Run folder: ")]
    if not named:
        raise RunFailed("the fit did not say where its results are")
    return ROOT / named[-1]


def epochs_of(folder: Path) -> int:
    """Epochs that were run."""
    path = folder / "metrics.csv"
    rows = read_csv(path) if path.is_file() else []
    return 1 + max((int(float(row["epoch"])) for row in rows if row.get("epoch")), default=-1)


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows of a file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shown(path: Path) -> str:
    """A path below the repository as seen from there, others as they are."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def commit() -> str:
    """Commit of the working tree, with ``-dirty`` where files differ from it; ``unknown`` without git."""
    words = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"
