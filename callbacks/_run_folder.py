"""Where a run's files go, and names there that destroy nothing."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

_OF_TUNERS = (".scale_batch_size_", ".lr_find_")  # what these restore is no earlier run


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: that of the first `CSVLogger`, else ``trainer.log_dir``, else ``default_root_dir``.

    Call it on all ranks: ``trainer.log_dir`` talks to the others. The folder need not exist yet.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.log_dir or trainer.default_root_dir)


def unused_path(path: Path, *, trainer: Trainer | None = None) -> Path:
    """The path itself, or one with a number (``name-v1.ext``, ...) where an earlier run has left a file.

    Args:
        path: The file's usual path.
        trainer: When its fit continued a checkpoint of the file's own folder (or one below it), the file is of this
            very run and the usual path is right although it exists.
    """
    resumed = None if trainer is None or trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
    of_tuner = resumed is not None and resumed.name.startswith(_OF_TUNERS)
    if resumed is not None and not of_tuner and path.resolve().parent in resumed.parents:
        return path
    free, number = path, 1
    while free.exists():
        free = path.with_name(f"{path.stem}-v{number}{path.suffix}")
        number += 1
    return free
