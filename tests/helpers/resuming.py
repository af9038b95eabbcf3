"""Runs of the command line that are stopped somewhere and go on: pieces to name in their configuration."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


class Stopped(Exception):
    """Ends a run from inside, where a process of its own would cost too much."""


class RandomNet(LightningModule):
    """A small network whose training draws from every global generator. Input ``[batch, 3, 8, 8]``, 10 classes.

    Args:
        schedule: ``plateau`` or ``onecycle``.
    """

    def __init__(self, schedule: str = "onecycle") -> None:
        super().__init__()
        self.schedule = schedule
        first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.network = nn.Sequential(first, nn.Dropout(0.2), second, nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.network(images)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = 1.0 + 0.1 * random.random() + 0.1 * np.random.rand()
        loss = noise * F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        logits = F.dropout(self(batch[0]), 0.1, training=True)  # evaluations may draw, too
        self.log(f"{stage}_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)
        if self.schedule == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StopAt(Callback):
    """End the run at a hook: by an exception, or as if the power went.

    Args:
        hook: Name of the hook.
        epoch: In which epoch.
        batch: At which of its batches; None where the hook has none.
        kill: End the process by SIGKILL.
    """

    def __init__(self, hook: str, epoch: int, batch: int | None = None, kill: bool = False) -> None:
        self.epoch, self.batch, self.kill = epoch, batch, kill
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == self.epoch and self.batch in (None, *args[-1:]):
            die() if self.kill else stop()


class LastStopAt(StopAt):
    """The same, behind all checkpoints of that hook."""


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stopped


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def configuration(folder: Path, *, model: dict[str, Any] | None = None, **trainer: Any) -> Path:
    """Write the configuration of a run of five short epochs with three cuts; gives the file."""
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_accuracy", "mode": "max"}},
        {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "epoch"}},
        {"class_path": "bsdp.callbacks.BasisDecomposition", "init_args": {"metric": "activation", "batch_norm": "all"}},
        {
            "class_path": "bsdp.callbacks.IterativeBasisPruning",
            "init_args": {"target": 0.5, "tolerance": 0.9, "warmup_epochs": 2},
        },
        {"class_path": "bsdp.callbacks.PruningReport", "init_args": {"latency_repeats": 0, "plot": False}},
    ]
    content = {
        "name": "net",
        "seed_everything": 0,
        "model": model or {"class_path": "tests.helpers.resuming.RandomNet"},
        "data": {
            "class_path": "bsdp.datamodules.DigitsDataModule",
            "init_args": {"image_size": 8, "batch_size": 32, "samples_per_class": 13, "augment": "crop_flip"},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 5,
            "limit_val_batches": 2,
            "limit_test_batches": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "callbacks": callbacks,
            **trainer,
        },
    }
    path = folder / "net.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def outcome(run: Path) -> dict[str, Any]:
    """Everything that a finished run has left, but for paths."""
    pruned = torch.load(run / "pruned.ckpt", weights_only=True)
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "rows": rows,
        "summary": json.loads((run / "summary.json").read_text()),
        "weights": (run / "pruned.safetensors").read_bytes(),
        **{f"pruned {key}": pruned[key] for key in ("bsdp", "state_dict", "optimizer_states", "lr_schedulers")},
        **{f"last {key}": last[key] for key in ("bsdp", "state_dict", "optimizer_states", "lr_schedulers", "loops")},
        "pruner": next(state for key, state in last["callbacks"].items() if "IterativeBasisPruning" in key),
        "random": last["bsdp_run"]["random"],
    }


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two nested values differ; tensors are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{name}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [f"{name}: {str(one)[:200]} != {str(other)[:200]}"]
