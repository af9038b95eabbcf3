"""Run folders: one for every run, ``<root>/<name>/version_N``, continued on request and never overwritten."""

import csv
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

CONFIG_FILE = "config.yaml"
PRUNED_CHECKPOINT = "pruned.ckpt"


def find_checkpoint(ckpt_path: str, *, root: Path, name: str | None = None) -> Path:
    """Find the checkpoint that ``--ckpt_path`` means.

    Args:
        ckpt_path: A file, or ``last`` for the most recent ``last.ckpt`` of the runs below `root`.
        root: Folder of all runs.
        name: Look at the runs of this name only; None for all.

    Raises:
        FileNotFoundError: If there is none; the message says where it was looked for.
    """
    if ckpt_path != "last":
        path = Path(ckpt_path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`ckpt_path`: no file {str(path.absolute())!r}. Give a checkpoint, or `last`.")
        return path
    pattern = f"{name or '**'}/version_*/checkpoints/last*.ckpt"
    found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"`ckpt_path: last`: no checkpoint fits {str(root.absolute() / pattern)!r}. Give the path of a checkpoint, "
            "or leave `ckpt_path` out to start a new run."
        )
    return found[-1]


def run_folder_of(checkpoint: Path) -> Path | None:
    """Find the folder of the run that wrote a checkpoint: the next one above it that holds ``config.yaml``."""
    parents = list(checkpoint.absolute().parents)[:3]
    return next((folder for folder in parents if (folder / CONFIG_FILE).is_file()), None)


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
    """Make a logger that goes on in the folder of an earlier run and keeps its rows.

    Args:
        folder: Run folder.
        checkpoint: What is resumed. Rows that were written after it are dropped, for they come again.
    """
    for state in checkpoint.get("callbacks", {}).values():
        dirpath = state.get("dirpath") if isinstance(state, dict) else None
        if dirpath and Path(dirpath).absolute().parent == folder:
            folder = Path(dirpath).parent  # in the very form that `ModelCheckpoint` will compare with
    global_step = int(checkpoint.get("global_step", 0))
    metrics = folder / "metrics.csv"
    rows, header = _rows_before(metrics, global_step=global_step)
    logger = CSVLogger(folder.parent.parent, name=folder.parent.name, version=folder.name, flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exists and is not empty")
        experiment: Any = logger.experiment  # deletes metrics.csv
    if rows and isinstance(experiment.metrics_keys, list):  # on rank zero only; elsewhere it is a dummy
        experiment.metrics_keys = list(header)
        with metrics.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=header)
            writer.writeheader()
            writer.writerows(rows)
    return logger


def _rows_before(metrics: Path, *, global_step: int) -> tuple[list[dict[str, str]], list[str]]:
    if not metrics.is_file():
        return [], []
    with metrics.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if int(float(row.get("step") or 0)) < global_step]
        return rows, list(reader.fieldnames or [])
