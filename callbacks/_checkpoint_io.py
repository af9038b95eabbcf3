"""Checkpoints that are on disk whole or not at all, and fit modules that lost channels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bsdp.structure import set_shape


class WholeFileIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, then move it there, so that a process killed meanwhile spoils nothing.

    Lightning writes into the folder for temporary files and moves from there, which is a copy, and can be interrupted,
    where that folder is on another file system; the older checkpoint of that name is lost then, too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; what is not a local path is left to Lightning."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def write_whole_checkpoints(trainer: Trainer) -> None:
    """Let a trainer use `WholeFileIO`, unless it was given something of its own or shards its checkpoints."""
    try:
        present = trainer.strategy.checkpoint_io
    except (AttributeError, NotImplementedError):  # strategies that write folders of shards have none
        return
    if type(present) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileIO()


def load_shape_first(trainer: Trainer) -> None:
    """Let a trainer give its module the widths of a checkpoint before the weights load.

    Pairs follow the ranks of the incoming weights by themselves, but layers that lost channels need to be told, and of
    Lightning's hooks only the module's own run early enough.
    """
    strategy = trainer.strategy
    if "load_model_state_dict" in vars(strategy):  # another callback, or another fit, has done it
        return
    load = strategy.load_model_state_dict

    def load_model_state_dict(checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        assert strategy.lightning_module is not None
        set_shape(strategy.lightning_module, checkpoint.get("bsdp", {}))
        load(checkpoint, *args, **kwargs)

    strategy.load_model_state_dict = load_model_state_dict  # type: ignore[method-assign]
