"""`rebase: auto`: bases by the KFAC metric in the runs that allow it, and in no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, default_collate

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from bsdp.callbacks._rebase_choice import why_no_class_scores
from bsdp.datamodules.sampling import TrainingLoader
from tests.helpers.pruning_runs import Classifier, Manual, Stripes, make_trainer


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
        if labels.is_floating_point() and float(labels[0].sum()) > 1.5:
            return F.mse_loss(self(images), labels)
        return F.cross_entropy(self(images), labels)


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


class Stream(IterableDataset[Any]):
    """One source that goes on where the last reader left it."""

    def __init__(self, examples: Any) -> None:
        self.source = iter([examples[i] for i in range(96)] * 3)

    def __iter__(self) -> Any:
        return self.source


class Streamed(Stripes):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self.examples), 32)


class Values(Classifier):
    """The labels say which output is to be predicted, as actions do."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).gather(1, batch[1][:, None]).sub(1.0).square().mean()


class Unlike(Classifier):
    """Later, in passes beside the training, there is nothing to draw labels from."""

    def forward(self, images: Tensor) -> Tensor:
        beside = "log" in vars(self)
        return super().forward(images) * (torch.nan if beside and self.trainer.current_epoch == 1 else 1.0)


def fit(folder: Path, module: Classifier, data: LightningDataModule, **options: Any) -> IterativeBasisPruning:
    settings = {"target": 0.4, "rounds": 1, "tolerance": None, "save_pruned": False, "calibration_batches": 2}
    prune = IterativeBasisPruning(**{**settings, **options})
    limits = {"limit_train_batches": 3} if isinstance(data, (Once, Streamed)) else {}
    make_trainer(folder, [BasisDecomposition(), prune], max_epochs=3, **limits).fit(module, datamodule=data)
    return prune


def was_rebased(prune: IterativeBasisPruning) -> bool:
    assert isinstance(prune.pruner, bsdp.IterativePruner)
    return prune.pruner.rebased_for > 0


def settings_of(prune: IterativeBasisPruning) -> bsdp.PruningSettings:
    assert isinstance(prune.pruner, bsdp.IterativePruner)
    return prune.pruner.settings


class Resumable(Stripes):
    """The loader of this project's data modules, which a run can take up in the middle of an epoch."""

    def train_dataloader(self) -> Any:
        return TrainingLoader(self.examples, 32)


@pytest.mark.parametrize("data", [Stripes(), Collated(one_hot), Resumable()], ids=["numbers", "shares", "resumable"])
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
        (Collated(several_labels), Loose, {}, "does not take what the network puts out for scores"),
        (Stripes(), Values, {}, "does not take what the network puts out for scores"),
        (Several(), Loose, {}, "needs one training loader"),
        (Once(), Loose, {}, "may lose batches of a stream"),
        (Streamed(), Loose, {}, "may lose batches of a stream"),
        (Stripes(), OneScore, {}, "two classes or more"),
        (Stripes(), Manual, {}, "in manual optimization"),
    ],
    ids=[
        "short",
        "no scores",
        "targets",
        "values",
        "several loaders",
        "once",
        "stream",
        "one score",
        "manual",
    ],
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


@pytest.mark.parametrize("data", [Once, Streamed])
def test_a_loader_that_is_read_once_loses_no_batch(tmp_path: Path, data: type[Stripes]) -> None:
    seen: list[int] = []

    class Watching(Loose):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    fit(tmp_path, Watching(), data())
    assert len(seen) == 9


def test_the_second_fit_asks_again(tmp_path: Path) -> None:
    settings = {"target": 0.4, "rounds": 1, "tolerance": None, "save_pruned": False, "calibration_batches": 2}
    prune = IterativeBasisPruning(**settings)  # type: ignore[arg-type]
    for data, expected in ((Collated(several_labels), False), (Stripes(), True)):
        make_trainer(tmp_path, [BasisDecomposition(), prune], max_epochs=3).fit(Loose(), datamodule=data)
        assert was_rebased(prune) is expected


def logs(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_a_pass_that_fails_later_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        prune = fit(tmp_path, Unlike(), Stripes())
    assert "bases stay as they are, for they could not be measured (RuntimeError: " in logs(caplog)
    assert "bases of 0 of 2 layers chosen anew" in logs(caplog)
    assert len(prune.record.rounds) == 2


class Thrifty(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = checkpoint(self[0], images, use_reentrant=False)  # type: ignore[no-untyped-call]
        for layer in list(self)[1:]:
            features = layer(features)
        return features


class Checkpointed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.network = Thrifty(*self.network)


class Twice(Classifier):
    """A second pass, without gradients, for the accuracy."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self(batch[0]).argmax(1)
        return loss


class Logs(Classifier):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).log_softmax(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("module", [Checkpointed, Twice, Logs])
def test_other_ways_to_train_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, module: type[Classifier]
) -> None:
    with caplog.at_level("INFO"):
        fit(tmp_path, module(), Stripes())
    assert "bases of 2 of 2 layers chosen anew, metric kfac" in logs(caplog)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_goes_on_as_it_began(tmp_path: Path) -> None:
    """The module says something else by then."""
    settings: dict[str, Any] = {"target": 0.4, "rounds": 1, "tolerance": None, "save_pruned": False}
    for first, second, expected in ((Values, Loose, False), (Loose, Values, True)):
        begun, folder = IterativeBasisPruning(**settings), tmp_path / first.__name__
        keeper = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(tmp_path, [BasisDecomposition(), begun, keeper], max_epochs=3, enable_checkpointing=True)
        trainer.fit(first(), datamodule=Stripes())
        assert was_rebased(begun) is expected
        resumed = IterativeBasisPruning(**settings)
        trainer = make_trainer(tmp_path, [BasisDecomposition(), resumed], max_epochs=3)
        trainer.fit(second(), datamodule=Stripes(), ckpt_path=folder / "epoch=0.ckpt", weights_only=True)
        assert was_rebased(resumed) is expected


LABELS = torch.arange(16) % 4
OTHERS = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("loss", "are"),
    [
        (lambda z: F.cross_entropy(z, LABELS), True),
        (lambda z: F.cross_entropy(z, LABELS, weight=torch.tensor([1.0, 5, 2, 1]), label_smoothing=0.1), True),
        (lambda z: F.cross_entropy(30 * z, OTHERS.softmax(1)), True),
        (lambda z: 0.7 * F.cross_entropy(z, LABELS) + 0.3 * F.cross_entropy(z, LABELS.flip(0)), True),
        (lambda z: F.multi_margin_loss(z, LABELS), True),
        (lambda z: {"loss": F.cross_entropy(z, LABELS)}, True),
        (lambda z: F.mse_loss(z, OTHERS), False),
        (lambda z: F.binary_cross_entropy_with_logits(z, F.one_hot(LABELS, 4).float()), False),
        (lambda z: F.cross_entropy(F.normalize(z) @ F.normalize(OTHERS).T, torch.arange(16)), False),
        (lambda z: z.detach().sum(), False),
        (lambda z: z.sum() * torch.nan, False),
        (lambda z: None, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_over_scores_of_classes(loss: Callable[[Tensor], Any], are: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    if dtype is torch.bfloat16:
        given, loss = loss, lambda z: given(z.float())
    assert (why_no_class_scores(loss(logits), logits) is None) is are


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
