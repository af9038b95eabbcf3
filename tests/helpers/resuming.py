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
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp

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
        self.epoch, self.batch = epoch, batch
        self.end = die if kill else stop
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if not trainer.sanity_checking and trainer.current_epoch == self.epoch and self.batch in (None, *args[-1:]):
            self._reached(trainer)

    def _reached(self, trainer: Trainer) -> None:
        self.end()


class SaveAt(StopAt):
    """Write a checkpoint into the trainer's root folder at a hook, then end the run.

    Args:
        hook: Name of the hook.
        epoch: In which epoch.
        batch: At which of its batches; None where the hook has none.
        file: Name of the checkpoint.
        go_on: Do not end the run.
    """

    def __init__(
        self, hook: str, epoch: int, batch: int | None = None, *, file: str = "kept.ckpt", go_on: bool = False
    ) -> None:
        super().__init__(hook, epoch, batch)
        self.file, self.go_on = file, go_on

    def _reached(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / self.file, weights_only=False)
        if not self.go_on:
            self.end()


class StopInWrite(Callback):
    """End the run while a file is written.

    Args:
        file: Name of the file, or how it begins.
        epoch: In which epoch; that of the end is the number of epochs.
        when: ``during`` (half of the checkpoint is there), ``before`` or ``after`` it is moved to its place.
        kill: End the process by SIGKILL.
    """

    def __init__(self, file: str, epoch: int, when: str, kill: bool = False) -> None:
        self.file, self.epoch, self.when = file, epoch, when
        self.end = die if kill else stop
        self.replace, self.save = os.replace, torch.save

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def replace(source: Any, target: Any) -> None:
            here = trainer.current_epoch == self.epoch and Path(target).name.startswith(self.file)
            if here and self.when == "before":
                self.end()
            self.replace(source, target)
            if here and self.when == "after":
                self.end()

        def save(content: Any, file: Any) -> None:
            self.save(content, file)
            if self.when == "during" and trainer.current_epoch == self.epoch and f"/.{self.file}" in file.name:
                file.truncate(file.tell() // 2)
                self.end()

        os.replace, torch.save = replace, save  # type: ignore[assignment]

    def on_exception(self, *args: Any) -> None:
        os.replace, torch.save = self.replace, self.save

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        os.replace, torch.save = self.replace, self.save


def stop() -> None:
    raise Stopped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def words_of(callback: type[Callback], **arguments: Any) -> list[str]:
    """Words of the command line that add a callback of this file to the trainer."""
    value = {"class_path": f"{__name__}.{callback.__name__}", "init_args": arguments}
    return ["--trainer.callbacks+", json.dumps(value)]


def write_configuration(folder: Path, **trainer: Any) -> Path:
    """Write the configuration of a run of five short epochs with three cuts; gives the file."""
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_accuracy", "mode": "max", "save_top_k": -1}},
        {"class_path": "LearningRateMonitor", "init_args": {"logging_interval": "epoch"}},
        {"class_path": "bsdp.callbacks.PruningReport", "init_args": {"latency_repeats": 0, "plot": False}},
        {"class_path": "bsdp.callbacks.BasisDecomposition", "init_args": {"metric": "activation", "batch_norm": "all"}},
        {
            "class_path": "bsdp.callbacks.IterativeBasisPruning",
            "init_args": {"target": 0.5, "tolerance": 0.9, "warmup_epochs": 2},
        },
    ]
    data = {"image_size": 8, "batch_size": 32, "samples_per_class": 13, "augment": "crop_flip"}
    content = {
        "name": "net",
        "seed_everything": 0,
        "model": {"class_path": f"{__name__}.RandomNet"},
        "data": {"class_path": "bsdp.datamodules.DigitsDataModule", "init_args": data},
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
    loops = last["loops"]["fit_loop"]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "rows": rows,
        "summary": json.loads((run / "summary.json").read_text()),
        "metadata": bsdp.read_metadata(run / "pruned.safetensors"),
        "weights": load_file(run / "pruned.safetensors"),
        **{f"pruned {key}": pruned[key] for key in ("bsdp", "state_dict", "optimizer_states", "lr_schedulers")},
        **{f"last {key}": last[key] for key in ("bsdp", "state_dict", "optimizer_states", "lr_schedulers")},
        "progress": {key: loops[key] for key in ("epoch_progress", "epoch_loop.batch_progress")},
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
