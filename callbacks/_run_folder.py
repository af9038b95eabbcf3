"""Where a run's files go, and names there that destroy nothing."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger


def run_folder(trainer: Trainer) -> Path:
    """The folder of this run: that of the first `CSVLogger`, else ``trainer.log_dir``, else ``default_root_dir``.

    Call it on all ranks: ``trainer.log_dir`` talks to the others. The folder need not exist yet.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.log_dir or trainer.default_root_dir)


def unused_path(folder: Path, name: str, *, trainer: Trainer | None = None) -> Path:
    """A path in `folder` that no earlier run has written: ``name.ext``, else ``name-2.ext``, ``name-3.ext``, ...

    Args:
        folder: The run's folder.
        name: The file's usual name.
        trainer: When given and its fit continued a checkpoint from below `folder`, the file is this run's own, and the
            usual name is right although it exists.
    """
    path = folder / name
    if trainer is not None and trainer.ckpt_path is not None:
        if folder.resolve() in Path(trainer.ckpt_path).resolve().parents:
            return path
    number = 2
    while path.exists():
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
        number += 1
    return path
