"""A tiny pruning run without training that matters: a module, its data, and a callback that prunes in one cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.record import PruningRecord, RoundRecord

Batch = tuple[Tensor, Tensor]


def small_network() -> nn.Sequential:
    """Two convolutions below a nested name and a head. Input ``[batch, 1, 8, 8]``, 4 classes."""
    features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 4))


class Classifier(LightningModule):
    """The plainest module; it logs accuracies and losses.

    Args:
        spread: Keep the layers in the module itself instead of one network.
        broken: Raise in the test step.
    """

    def __init__(self, *, spread: bool = False, broken: bool = False) -> None:
        super().__init__()
        network = small_network()
        self.spread, self.broken = spread, broken
        if spread:
            self.first, self.rest = network[0], network[1:]
        else:
            self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.rest(self.first(images)) if self.spread else self.network(images)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        if self.broken:
            raise RuntimeError("no [good] test")
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        logits = self(batch[0])
        self.log(f"{stage}_accuracy", (logits.argmax(1) == batch[1]).float().mean())
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Stripes(LightningDataModule):
    """Images with one bright row; the row is the class.

    Args:
        batch_size: Of the training loader.
    """

    def __init__(self, *, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (96,), generator=generator)
        images = torch.randn(96, 1, 8, 8, generator=generator)
        images[torch.arange(96), 0, 2 * labels] += 2.0
        self.examples = TensorDataset(images, labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(self.examples, 48)

    def test_dataloader(self) -> Any:
        return DataLoader(self.examples, 40)


class StripesWithSource(Stripes):
    """Stripes as the target, and a source of three classes: one bright column."""

    source_num_classes = 3

    def source_train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(3, (64,), generator=generator)
        images = torch.randn(64, 1, 8, 8, generator=generator)
        images[torch.arange(64), 0, :, 2 * labels] += 2.0
        return DataLoader(TensorDataset(images, labels), 16)


class OneCut(Callback):
    """Stands in for the pruning callback: records one round per epoch and halves all ranks at the end.

    Args:
        record: Fields of the record to set.
        known_inputs: Measure MACs and note the input's shape.
    """

    def __init__(self, *, known_inputs: bool = True, **record: Any) -> None:
        self.record = PruningRecord(**{"tolerance": 1.0, "target": 0.3, **record})
        self.known_inputs = known_inputs
        self.weights_path: Path | None = None

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the trainer was copied")

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit" or bsdp.named_pairs(pl_module):
            return
        self.record.network = "" if pl_module.spread else "network"
        bsdp.decompose(pl_module)
        example = torch.zeros(1, 1, 8, 8) if self.known_inputs else None
        self.record.input_shapes = [[1, 1, 8, 8]] if self.known_inputs else [[0]]
        self.record.cost = bsdp.measure_cost(self._network(pl_module), example)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > 0:
            self._cut(pl_module)
        self._add_round(pl_module, trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = float(trainer.callback_metrics[self.record.monitor])
        self.record.update_last(accuracy_after=value, accuracy_best=value)
        if len(self.record.rounds) == 1:
            self.record.reference = value
            self.record.reference_state = {k: v.clone() for k, v in pl_module.state_dict().items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record.chosen = len(self.record.rounds) - 1
        self.weights_path = Path(trainer.default_root_dir) / "pruned.safetensors"
        bsdp.save(self._network(pl_module), self.weights_path, metadata={"class_names": ["row"] * 4})

    def _network(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self.record.network) if self.record.network else pl_module

    def _cut(self, pl_module: LightningModule) -> None:
        for pair in bsdp.named_pairs(pl_module).values():
            pair.keep(torch.arange(max(1, pair.rank // 2)))

    def _add_round(self, pl_module: LightningModule, epoch: int) -> None:
        cost = self.record.cost
        ranks = {name: pair.rank for name, pair in bsdp.named_pairs(self._network(pl_module)).items()}
        sizes = {kind: cost.deployed(ranks, kind) for kind in ("bases", "params")}
        macs = None if cost.fixed_macs is None else cost.deployed(ranks, "macs")
        self.record.rounds.append(RoundRecord(len(self.record.rounds), epoch, ranks, **sizes, macs=macs))


def make_trainer(folder: Path, callbacks: list[Callback], **options: Any) -> Trainer:
    """A quiet trainer on the CPU with a CSV logger in `folder`."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": CSVLogger(folder, name="runs"),
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=callbacks, **{**settings, **options})
