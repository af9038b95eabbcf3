"""Runs that prune channels: a residual network with batch norms, and what has to be true after every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning
from bsdp.record import PruningRecord
from tests.helpers.outcomes import Watch
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


class ResidualNet(nn.Module):
    """A residual stream of 12 channels, 16 inside the block, a shortcut; input ``[batch, 1, 8, 8]``, 4 classes.

    Args:
        norm: Have batch norms.
    """

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 12, 3, padding=1, bias=not norm), _norm(12, norm)
        self.conv1, self.bn1 = nn.Conv2d(12, 16, 3, padding=1, bias=not norm), _norm(16, norm)
        self.conv2, self.bn2 = nn.Conv2d(16, 12, 3, padding=1, bias=not norm), _norm(12, norm)
        self.head = nn.Linear(48, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn0(self.stem(images)))
        features = F.relu(features + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(features))))))
        return self.head(F.adaptive_avg_pool2d(features, 2).flatten(1))


def _norm(channels: int, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


class ResidualClassifier(Classifier):
    """A classifier with the network above.

    Args:
        norm: Have batch norms.
        optimizer: ``sgd`` with momentum or ``adamw``.
        schedule: ``none``, ``cosine`` or ``onecycle``.
        early: Build the optimizer in `__init__`, as ``--optimizer`` of the command line does.
        values: What to log as ``val_accuracy`` in each epoch; by default the real value.
    """

    def __init__(
        self,
        *,
        norm: bool = True,
        optimizer: str = "sgd",
        schedule: str = "none",
        early: bool = False,
        values: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = ResidualNet(norm=norm)  # type: ignore[assignment]
        self.kind, self.schedule, self.values = optimizer, schedule, values
        self.built = self.build() if early else None

    def build(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "adamw":
            return torch.optim.AdamW(parameters, lr=0.01)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.values is not None:
            self.log("steered", self.values[min(self.current_epoch, len(self.values) - 1)])

    def configure_optimizers(self) -> Any:
        optimizer = self.built or self.build()
        if self.schedule == "none":
            return optimizer
        schedules = torch.optim.lr_scheduler
        scheduler: Any = (
            schedules.CosineAnnealingLR(optimizer, 30)
            if self.schedule == "cosine"
            else schedules.OneCycleLR(optimizer, 0.05, int(self.trainer.estimated_stepping_batches))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Shuffled(Stripes):
    """Draws its order from the global generator, as most data modules do."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, 16, shuffle=True)


def fit(
    module: LightningModule,
    folder: Path,
    *others: Callback,
    double: bool = False,
    pruning: dict[str, Any] | None = None,
    decomposition: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, Any, Watch]:
    """Fit with two cuts of channels, or of bases and channels.

    Args:
        module: The module.
        folder: For files.
        others: More callbacks.
        double: Use `DoublePruning`.
        pruning: Changed arguments of the pruning callback.
        decomposition: Arguments of the decomposition; None for none, but for double pruning.
        call: Changed arguments of ``trainer.fit``.
        options: Changed arguments of the trainer.
    """
    kind: Any = DoublePruning if double else ChannelPruning
    callback = kind(**{"target": 0.5, "rounds": 2, "warmup_epochs": 1, "tolerance": None, **(pruning or {})})
    watch = Watch()
    callbacks: list[Callback] = [callback]
    if double or decomposition is not None:
        callbacks.append(BasisDecomposition(**(decomposition or {})))
    trainer = make_trainer(folder, [*callbacks, watch, *others], **{"max_epochs": 4, **options})
    trainer.fit(module, **(call or {"datamodule": Stripes(batch_size=16)}))
    return trainer, callback, watch


def check(module: LightningModule, callback: Any, watch: Watch) -> None:
    """The structure shrank to the budget, what trained after the last cut moved, and the loss fell."""
    record: PruningRecord = callback.record
    assert len(record.rounds) == callback.rounds + 1 and record.chosen == callback.rounds
    kept = [record.kept(entry, record.target_kind) for entry in record.rounds]
    assert kept == sorted(kept, reverse=True) and kept[-1] <= 1 - callback.settings.target, kept  # type: ignore[type-var, operator]
    network = module.get_submodule(record.network) if record.network else module
    for name, count in record.rounds[-1].channels.items():
        layer = network.get_submodule(name)
        assert getattr(layer, "out_channels", None) == count or getattr(layer, "out_features", None) == count
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    after_cut = watch.starts[record.rounds[-1].epoch - record.rounds[0].epoch]
    moved = {name for name, value in after_cut.items() if not torch.equal(value, module.get_parameter(name))}
    assert moved == after_cut.keys()
    assert watch.losses[-1] < watch.losses[0], watch.losses
    assert callback.weights_path.is_file() and callback.checkpoint_path.is_file()


def widths(module: Any) -> tuple[int, int]:
    """Channels of the residual stream and inside the block of a `ResidualClassifier`."""
    network = module.network
    assert network.stem.out_channels == network.conv2.out_channels == network.conv1.in_channels
    assert network.head.in_features == 4 * network.stem.out_channels
    return int(network.stem.out_channels), int(network.conv1.out_channels)
