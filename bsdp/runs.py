"""Run folders: one for every run, ``<root>/<name>/version_N``, continued on request and never overwritten."""

import csv
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from bsdp.artifacts import CONFIG_FILE as CONFIG_FILE
from bsdp.artifacts import PRUNED_CHECKPOINT as PRUNED_CHECKPOINT
from bsdp.artifacts import run_folder_of as run_folder_of
from bsdp.resume import STATE
from bsdp.structure import read_checkpoint


def find_checkpoint(ckpt_path: str, *, root: Path, name: str | None = None) -> Path:
    """Find the checkpoint that ``--ckpt_path`` means.

    Args:
        ckpt_path: A file, or ``last`` for the ``last.ckpt`` of the run below `root` that has the most recent one. Where
            that file is damaged, the newest whole checkpoint of the same run is taken, with a warning.
        root: Folder of all runs.
        name: Look at the runs of this name only; None for all.

    Raises:
        FileNotFoundError: If there is none; the message says where it was looked for.
        ValueError: If the run has damaged checkpoints only.
    """
    if ckpt_path != "last":
        path = Path(ckpt_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`ckpt_path`: no file {str(path.absolute())!r}. Give a checkpoint, or `last`.")
        return path
    pattern = f"{name or '**'}/version_*/checkpoints/last*.ckpt"
    found = _by_age(root.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"`ckpt_path: last`: no checkpoint fits {str(root.absolute() / pattern)!r}. Give the path of a checkpoint, "
            "or leave `ckpt_path` out to start a new run."
        )
    if name is not None:
        _refuse_newer_run(found[-1])
    return _newest_whole(found[-1].parent)


def _refuse_newer_run(newest: Path) -> None:
    """Refuse to go on with a run while a later one of the same name was stopped before its first checkpoint."""
    folder = newest.parents[1]
    for config in _by_age(folder.parent.glob(f"version_*/{CONFIG_FILE}")):
        later = config.stat().st_mtime > newest.stat().st_mtime
        if later and not any((config.parent / "checkpoints").glob("*.ckpt")):
            raise FileNotFoundError(
                f"`ckpt_path: last`: the last run, {str(config.parent)!r}, ended before its first checkpoint. Leave "
                f"`ckpt_path` out to start a new run, or continue an earlier one by its path: {str(newest)!r}."
            )


def _newest_whole(folder: Path) -> Path:
    """The newest checkpoint of a folder that can be read, ``last.ckpt`` first."""
    last = _by_age(folder.glob("last*.ckpt"))
    others = [path for path in _by_age(folder.glob("*.ckpt")) if path not in last]
    damaged = []
    for path in reversed(others + last):
        try:
            read_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"`ckpt_path: last`: {message}. The run goes on from {str(path)!r}.", stacklevel=2)
        return path
    raise ValueError(f"`ckpt_path: last`: no checkpoint in {str(folder)!r} is whole: {'; '.join(damaged)}")


def _by_age(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def free_config_name(folder: Path) -> str:
    """Name a configuration file that is not in a run folder yet: ``config.yaml``, then ``config.resume-N.yaml``."""
    if not (folder / CONFIG_FILE).exists():
        return CONFIG_FILE
    count = 1
    while (folder / f"config.resume-{count}.yaml").exists():
        count += 1
    return f"config.resume-{count}.yaml"


def new_logger(root: Path, name: str) -> CSVLogger:
    """Make the logger of a new run; its ``log_dir`` is the run folder.

    The path is absolute: checkpoints hold it, and a resumed run must find the same one from wherever it is started.
    """
    return CSVLogger(root.absolute(), name=name, flush_logs_every_n_steps=1)


def reopen_logger(folder: Path, *, checkpoint: dict[str, Any]) -> CSVLogger:
    """Make a logger that goes on in the folder of an earlier run, with the rows that it had at the checkpoint.

    Args:
        folder: Run folder.
        checkpoint: What is resumed. Rows that were written after it are dropped, for they come again.
    """
    for state in checkpoint.get("callbacks", {}).values():
        dirpath = state.get("dirpath") if isinstance(state, dict) else None
        if dirpath and Path(dirpath).absolute().parent == folder:
            folder = Path(dirpath).parent  # in the very form that `ModelCheckpoint` will compare with
    header, rows = _rows_of(checkpoint, folder)
    logger = CSVLogger(folder.parent.parent, name=folder.parent.name, version=folder.name, flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty")
        experiment: Any = logger.experiment  # deletes metrics.csv
    if rows and isinstance(experiment.metrics_keys, list):  # on rank zero only; elsewhere it is a dummy
        experiment.metrics_keys = list(header)
        with (folder / experiment.NAME_METRICS_FILE).open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=header)
            writer.writeheader()
            writer.writerows(rows)
    return logger


def _rows_of(checkpoint: dict[str, Any], folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Header and rows of ``metrics.csv`` at a checkpoint, with the row that its epoch was about to write."""
    state = checkpoint.get(STATE, {})
    text = state.get("metrics")
    if text is None:  # written by another program
        text = (folder / "metrics.csv").read_text(encoding="utf-8") if (folder / "metrics.csv").is_file() else ""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: list[dict[str, Any]] = list(reader)
    if state.get("row"):
        rows.append(state["row"])
    header = sorted({*(reader.fieldnames or []), *(state.get("row") or {})})
    return header, rows
