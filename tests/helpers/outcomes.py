"""What has to be true after any pruning run, however the trainer was set."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from bsdp.probing import evaluating
from tests.helpers.pruning_runs import Stripes, make_trainer

EPOCHS = 4


class Watch(Callback):
    """Notes what trains at the start of every epoch; it must stand behind the pruning callback."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses.append(loss_of(pl_module))  # not in a batch, where pruning callbacks watch every forward pass

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.starts.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses.append(loss_of(pl_module))


def loss_of(module: Any) -> float:
    """Loss of a classifier on all of `Stripes`, in eval mode and without changing it."""
    data = Stripes()
    data.setup("fit")
    images, labels = data.examples.tensors
    first = next(module.parameters())
    with evaluating(module), torch.autocast("cpu", enabled=False):
        return float(F.cross_entropy(module(images.to(first)).float(), labels))


def run(
    module: LightningModule,
    folder: Path,
    *others: Callback,
    pruning: dict[str, Any] | None = None,
    decomposition: dict[str, Any] | None = None,
    data: LightningDataModule | None = None,
    fit: dict[str, Any] | None = None,
    model: Any = None,
    skipped: int = 0,
    **options: Any,
) -> tuple[Trainer, IterativeBasisPruning, Watch]:
    """Fit in six batches an epoch with two cuts, and check what must hold.

    Args:
        module: A `Classifier`.
        folder: For files.
        others: More callbacks.
        pruning: Changed arguments of the pruning callback.
        decomposition: Arguments of the decomposition.
        data: Instead of `Stripes`.
        fit: Changed arguments of ``trainer.fit``.
        model: What to fit when it is not the module itself but something around it.
        skipped: Rounds that are due but cannot be made.
        options: Changed arguments of the trainer.
    """
    pruner = IterativeBasisPruning(
        **{"target": 0.5, "rounds": 2, "warmup_epochs": 1, "tolerance": None, **(pruning or {})}
    )
    watch = Watch()
    callbacks = [pruner, BasisDecomposition(**(decomposition or {})), watch, *others]
    trainer = make_trainer(folder, callbacks, **{"max_epochs": EPOCHS, **options})
    trainer.fit(module if model is None else model, **(fit or {"datamodule": data or Stripes(batch_size=16)}))
    check(module, pruner, watch, skipped=skipped)
    return trainer, pruner, watch


def check(module: LightningModule, pruning: IterativeBasisPruning, watch: Watch, *, skipped: int = 0) -> None:
    """The structure shrank in every round, what trained after the last cut moved, and the loss fell."""
    record = pruning.record
    assert pruning.pruner is not None
    pairs = pruning.pruner.pairs
    assert len(record.rounds) == (pruning.rounds or 2) + 1 - skipped, record.rounds
    sizes = [entry.bases for entry in record.rounds]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0], sizes
    assert {name: pair.rank for name, pair in pairs.items()} == record.rounds[-1].ranks
    assert record.chosen == len(record.rounds) - 1
    kept = record.kept(record.rounds[-1], record.target_kind)
    assert kept is not None and kept <= 1 - pruning.settings.target
    assert all(pair.basis.weight.shape[0] == pair.rank * pair.groups for pair in pairs.values())  # type: ignore[union-attr, index]
    assert not any(pair.basis.weight.requires_grad for pair in pairs.values())  # type: ignore[union-attr]
    after_cut = watch.starts[record.rounds[-1].epoch - record.rounds[0].epoch]
    moved = [name for name, value in after_cut.items() if not torch.equal(value, module.get_parameter(name))]
    assert any("delta" in name for name in moved) and any("delta" not in name for name in moved), moved
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert watch.losses[-1] < watch.losses[0], watch.losses


def folded_equals(module: Any, folded: Any) -> bool:
    """Whether a folded network computes what the module's network does."""
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        return torch.allclose(folded.eval()(images), module.eval()(images), atol=1e-5)


def ranks(module: LightningModule) -> list[int]:
    """Ranks of all pairs of a module."""
    return [pair.rank for pair in bsdp.named_pairs(module).values()]
