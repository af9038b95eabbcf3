"""`rebase: auto`: bases by the KFAC metric in the runs that allow it, and in no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, default_collate

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


class Collated(Stripes):
    """Training batches in another form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, 32, collate_fn=lambda examples: self.form(*default_collate(examples)))


class Once(Stripes):
    """A training loader that can be read only once."""

    def train_dataloader(self) -> Any:
        return iter(list(super().train_dataloader()) * 3)


class Several(Stripes):
    def train_dataloader(self) -> Any:
        return {"one": super().train_dataloader()}


class Loose(Classifier):
    """Takes batches of any loader, and targets of any kind."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch["one"] if isinstance(batch, dict) else batch
        if labels.is_floating_point() and labels.shape[1:] == (4,):
            return F.mse_loss(self(images), labels)
        return F.cross_entropy(self(images), labels.long().flatten())


class OneScore(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[:, :1]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def one_hot(images: Tensor, labels: Tensor) -> Any:
    return images, F.one_hot(labels, 4).float() * 0.9 + 0.025


def several_labels(images: Tensor, labels: Tensor) -> Any:
    return images, F.one_hot(labels, 4).float() + F.one_hot((labels + 1) % 4, 4).float()


def numbers_of_something_else(images: Tensor, labels: Tensor) -> Any:
    return images, labels.float()


def fit(folder: Path, module: Classifier, data: LightningDataModule, **options: Any) -> IterativeBasisPruning:
    settings = {"target": 0.4, "rounds": 1, "tolerance": None, "save_pruned": False, "calibration_batches": 2}
    prune = IterativeBasisPruning(**{**settings, **options})
    limits = {"limit_train_batches": 3} if isinstance(data, Once) else {}
    make_trainer(folder, [BasisDecomposition(), prune], max_epochs=3, **limits).fit(module, datamodule=data)
    return prune


def was_rebased(prune: IterativeBasisPruning) -> bool:
    assert isinstance(prune.pruner, bsdp.IterativePruner)
    return prune.pruner.rebased_for > 0


def settings_of(prune: IterativeBasisPruning) -> bsdp.PruningSettings:
    assert isinstance(prune.pruner, bsdp.IterativePruner)
    return prune.pruner.settings


@pytest.mark.parametrize("data", [Stripes(), Collated(one_hot)], ids=["numbers", "shares"])
def test_classes_get_bases_by_kfac(tmp_path: Path, data: LightningDataModule) -> None:
    prune = fit(tmp_path, Loose(), data)
    assert was_rebased(prune)
    settings = settings_of(prune)
    assert (settings.metric, settings.rebase, settings.warmup_epochs) == ("kfac", "warmup", 2)


@pytest.mark.parametrize(
    ("data", "module", "options", "reason"),
    [
        (Stripes(), Loose, {"warmup_epochs": 1}, "`warmup_epochs` of at least 2, not 1"),
        (Stripes(), Loose, {"importance": "magnitude"}, "`importance: magnitude` ranks bases without"),
        (Collated(several_labels), Loose, {}, "holds the classes"),
        (Collated(numbers_of_something_else), Loose, {}, "holds the classes"),
        (Several(), Loose, {}, "needs one training loader"),
        (Once(), Loose, {}, "can be read only once"),
        (Stripes(), OneScore, {}, "two classes or more"),
    ],
    ids=["short", "no scores", "several labels", "numbers", "several loaders", "once", "one score"],
)
def test_others_keep_theirs_and_hear_why(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    data: LightningDataModule,
    module: type[Classifier],
    options: dict[str, Any],
    reason: str,
) -> None:
    with caplog.at_level("INFO"):
        prune = fit(tmp_path, module(), data, **options)
    assert not was_rebased(prune) and settings_of(prune).rebase == "never"
    words = [r.getMessage() for r in caplog.records if "not chosen by the loss" in r.getMessage()]
    assert len(words) == 1 and reason in words[0], words


def test_a_loader_that_is_read_once_loses_no_batch(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(Loose):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    fit(tmp_path, Watching(), Once())
    assert len(seen) == 9


def test_the_second_fit_asks_again(tmp_path: Path) -> None:
    settings = {"target": 0.4, "rounds": 1, "tolerance": None, "save_pruned": False, "calibration_batches": 2}
    prune = IterativeBasisPruning(**settings)  # type: ignore[arg-type]
    for data, expected in ((Collated(several_labels), False), (Stripes(), True)):
        make_trainer(tmp_path, [BasisDecomposition(), prune], max_epochs=3).fit(Loose(), datamodule=data)
        assert was_rebased(prune) is expected


def test_a_metric_of_the_user_is_taken_at_its_word(tmp_path: Path) -> None:
    prune = fit(tmp_path, OneScore(), Stripes(), metric="activation")
    assert was_rebased(prune) and settings_of(prune).metric == "activation"
    with pytest.raises(ValueError, match=r"needs logits \[batch, classes, ...\] of two classes or more"):
        fit(tmp_path, OneScore(), Stripes(), metric="kfac")


def test_never_is_the_decomposition(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert not was_rebased(fit(tmp_path, Loose(), Stripes(), rebase="never"))
    with pytest.raises(ValueError, match="`rebase` must be one of"):
        IterativeBasisPruning(rebase="sometimes")  # type: ignore[arg-type]
