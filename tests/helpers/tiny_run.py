"""A run folder as a pruning run leaves it, made without training."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import bsdp
from bsdp.callbacks import BasisDecomposition
from bsdp.task import TransferTask

CLASS_NAMES = ["zero", "one", "two", "three"]
IMAGE_SIZE = 8


def write_run(folder: Path) -> Path:
    """Write ``config.yaml``, ``pruned.ckpt``, ``pruned.safetensors`` and ``checkpoints/last.ckpt`` (not pruned)."""
    torch.manual_seed(0)
    task = TransferTask("bsdp:resnet20", num_classes=len(CLASS_NAMES), weights="none")
    for module in task.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    (folder / "checkpoints").mkdir(parents=True)
    settings = {"init_args": {"image_size": IMAGE_SIZE, "normalization": {"mean": [0.5] * 3, "std": [0.25] * 3}}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": settings}))
    write_checkpoint(task, folder / "checkpoints" / "last.ckpt")
    prune(task)
    write_checkpoint(task, folder / "pruned.ckpt")
    facts = {"class_names": CLASS_NAMES, "image_size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}
    bsdp.save(task.network, folder / "pruned.safetensors", metadata={**task.export_metadata(), **facts})
    return folder


def prune(module: nn.Module) -> None:
    """Decompose a module and keep a third of the bases of each layer, one layer excepted."""
    bsdp.decompose(module)
    for pair in list(bsdp.named_pairs(module).values())[1:]:
        pair.keep(torch.arange(-(-pair.rank // 3)))
        nn.init.uniform_(pair.scaling.delta, -0.3, 0.3)
        nn.init.uniform_(pair.scaling.bias, -0.3, 0.3)


def write_checkpoint(module: LightningModule, path: Path) -> Path:
    """Write the checkpoint that a trainer would write of a module as it is."""
    callbacks = [BasisDecomposition()] if bsdp.named_pairs(module) else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path
