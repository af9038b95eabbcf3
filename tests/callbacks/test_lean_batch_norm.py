"""`BasisDecomposition(lean_batch_norm=True)` in a real, tiny run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from bsdp.callbacks import BasisDecomposition
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


class Normed(Classifier):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.network[0].insert(1, nn.BatchNorm2d(16))


class Watch(Callback):
    """Notes the classes of the batch norm inside and outside of training batches."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail
        self.inside: set[type] = set()
        self.outside: set[type] = set()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.inside.add(type(pl_module.network[0][1]))  # type: ignore[index, union-attr]
        if self.fail:
            raise KeyError("stop")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outside.add(type(pl_module.network[0][1]))  # type: ignore[index, union-attr]


def fit(folder: Path, *, lean: bool, fail: bool = False) -> tuple[Normed, Watch]:
    module, watch = Normed(), Watch(fail)
    trainer = make_trainer(folder, [BasisDecomposition(lean_batch_norm=lean), watch], max_epochs=2)
    trainer.fit(module, datamodule=Stripes())
    return module, watch


def test_training_ends_alike(tmp_path: Path) -> None:
    plain, seen = fit(tmp_path, lean=False)
    assert seen.inside == seen.outside == {nn.BatchNorm2d}
    lean, seen = fit(tmp_path, lean=True)
    assert nn.BatchNorm2d not in seen.inside and seen.outside == {nn.BatchNorm2d}
    torch.testing.assert_close(lean.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    assert type(lean.network[0][1]) is nn.BatchNorm2d  # type: ignore[index]


def test_an_error_leaves_no_trace(tmp_path: Path) -> None:
    module = Normed()
    trainer = make_trainer(tmp_path, [BasisDecomposition(lean_batch_norm=True), Watch(fail=True)])
    with pytest.raises(KeyError):
        trainer.fit(module, datamodule=Stripes())
    assert type(module.network[0][1]) is nn.BatchNorm2d  # type: ignore[index]
