"""The two files that a pruning run leaves: ``pruned.ckpt`` and ``pruned.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

import bsdp
from bsdp.callbacks._run_folder import run_folder, unused_path


def write_pruned(trainer: Trainer, pl_module: LightningModule, network: nn.Module) -> tuple[Path, Path]:
    """Write the Lightning checkpoint of a module and the folded network inside it; call it on all processes.

    Returns:
        The path of the checkpoint, and that of the weights.
    """
    folder = run_folder(trainer)
    names = ("pruned.ckpt", "pruned.safetensors")
    # The first process decides: another one may look when the file is already there.
    checkpoint, weights = trainer.strategy.broadcast(tuple(unused_path(folder / n, trainer=trainer) for n in names))
    trainer.save_checkpoint(checkpoint, weights_only=False)
    if trainer.is_global_zero:
        bsdp.save(network, weights, metadata=_metadata(trainer, pl_module))
        rank_zero_info(f"bsdp: wrote {checkpoint.name} and {weights.name} to {checkpoint.parent}")
    return checkpoint, weights


def write_delta(trainer: Trainer, pl_module: LightningModule, network: nn.Module, *, head: str) -> Path:
    """Write the deltas of a network and its head, ``delta.safetensors``; call it on all processes."""
    path: Path = trainer.strategy.broadcast(unused_path(run_folder(trainer) / "delta.safetensors", trainer=trainer))
    if trainer.is_global_zero:
        bsdp.save_delta(network, path, head=[head], metadata=_metadata(trainer, pl_module))
    return path


def _metadata(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    describe = getattr(pl_module, "export_metadata", None)
    metadata = dict(describe()) if callable(describe) else {}
    data = trainer.datamodule  # type: ignore[attr-defined]
    for key in ("class_names", "image_size"):
        value = getattr(data, key, None)
        if value is not None and key not in metadata:
            metadata[key] = list(value) if isinstance(value, tuple) else value
    return metadata | (getattr(data, "normalization", None) or {})  # what the images really went through
