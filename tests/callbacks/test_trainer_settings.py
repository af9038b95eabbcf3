"""Every way a `Trainer` can be set: six batches an epoch, two cuts, and a smaller model that still learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import Watch, check, ranks, run
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tolerance": {"pruning": {"tolerance": 0.9}},
    "limit_train_batches": {"limit_train_batches": 4},
    "limit_train_batches as a share": {"limit_train_batches": 0.5},
    "limit_val_batches": {"limit_val_batches": 1, "pruning": {"tolerance": 0.9}},
    "limit_val_batches 0": {"limit_val_batches": 0},
    "max_steps": {"max_epochs": -1, "max_steps": 24, "pruning": {"rounds": None, "warmup_epochs": 2}},
    "max_steps and accumulation": {"max_epochs": -1, "max_steps": 12, "accumulate_grad_batches": 2},
    "val_check_interval 0.5": {"val_check_interval": 0.5, "pruning": {"tolerance": 0.9}},
    "val_check_interval 4": {"val_check_interval": 4, "pruning": {"tolerance": 0.9}},
    "validation by batches": {"val_check_interval": 5, "check_val_every_n_epoch": None, "pruning": {"tolerance": 0.9}},
    "check_val_every_n_epoch": {
        "check_val_every_n_epoch": 2,
        "max_epochs": 6,
        "pruning": {"tolerance": 0.9, "warmup_epochs": 2, "epochs_per_round": 2},
    },
    "num_sanity_val_steps": {"num_sanity_val_steps": 2, "pruning": {"tolerance": 0.9}},
    "inference_mode": {"inference_mode": False, "pruning": {"tolerance": 0.9}},
    "overfit_batches": {"overfit_batches": 3, "pruning": {"tolerance": 0.9}},
    "reload_dataloaders": {"reload_dataloaders_every_n_epochs": 1, "pruning": {"tolerance": 0.9}},
    "gradient_clip_val": {"gradient_clip_val": 0.5},
    "gradient_clip_val by value": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    "accumulate_grad_batches": {"accumulate_grad_batches": 4},
    "deterministic": {"deterministic": True},
    "detect_anomaly": {"detect_anomaly": True},
    "no logger": {"logger": False},
    "min_epochs": {"min_epochs": 2},
    "max_time": {"max_time": "00:01:00:00"},
    "profiler": {"profiler": "simple"},
    "importance energy": {"pruning": {"importance": "energy"}},
    "activation metric": {"decomposition": {"metric": "activation"}},
    "macs": {"pruning": {"target_kind": "macs"}},
}


# Here, or with another value, in a test of its own or of another file.
SELDOM = {"tolerance", "limit_train_batches as a share", "val_check_interval 4", "inference_mode", "deterministic"} | {
    *("gradient_clip_val by value", "min_epochs", "max_time", "profiler", "importance energy", "macs")
}


@pytest.mark.parametrize("name", slow_but(SETTINGS.keys() - SELDOM, SETTINGS))
@pytest.mark.filterwarnings("ignore:You are running on single node with no parallelization, so distributed")
def test_setting(name: str, tmp_path: Path) -> None:
    module, settings = Classifier(), SETTINGS[name]
    _, pruning, _ = run(module, tmp_path, **settings)
    assert pruning.weights_path is not None and pruning.weights_path.is_file()
    if settings.get("pruning", {}).get("tolerance") is not None:
        assert all(entry.accuracy_best is not None for entry in pruning.record.rounds)


def test_scores_are_those_before_clipping(tmp_path: Path) -> None:
    scores, moved = [], []
    for clip in ({}, {"gradient_clip_val": 1e-4}, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}):
        torch.manual_seed(0)
        module, first = Classifier(), FirstScores()
        pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None)
        trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), first], max_epochs=2, **clip)
        trainer.fit(module, datamodule=Stripes(batch_size=16))
        scores.append(first.value)
        moved.append(max(float(pair.scaling.delta.detach().abs().max()) for pair in bsdp.named_pairs(module).values()))
    assert moved[0] > 2 * max(moved[1:])  # the clipping itself happened
    assert scores[0].any()
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


class FirstScores(Callback):
    """Takes the sum of the scores after the first step, of which clipping would change only what follows."""

    value: Tensor

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1 and not hasattr(self, "value"):
            pruning = next(c for c in trainer.callbacks if isinstance(c, IterativeBasisPruning))
            assert pruning.pruner is not None
            self.value = pruning.pruner.scores._sum.clone()  # type: ignore[union-attr]


def test_accumulation_cuts_as_a_big_batch_does(tmp_path: Path) -> None:
    records, steps = [], []
    for batch_size, factor in ((48, 1), (16, 3)):
        torch.manual_seed(0)
        data = Stripes(batch_size=batch_size)
        # the mean of features is taken on the first batch; leave it out, as that is another one here
        pruning = {"mean_to_bias": False}
        _, pruner, watch = run(Classifier(), tmp_path, data=data, accumulate_grad_batches=factor, pruning=pruning)
        records.append([entry.ranks for entry in pruner.record.rounds])
        steps.append(torch.cat([value.flatten() for value in watch.starts[1].values()]))
    assert records[0] == records[1]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_epochs": -1, "max_steps": 15, "pruning": {"rounds": None}}],
    ids=["epochs", "steps"],
)
def test_accumulation_scheduler(options: dict[str, Any], tmp_path: Path) -> None:
    # 6 + 3 + 3 + 3 steps in four epochs
    options = {"pruning": {"rounds": 3}, **options}
    if "max_steps" in options:
        options["pruning"] = {"rounds": None, "warmup_epochs": 2}
    trainer, _, _ = run(Classifier(), tmp_path, GradientAccumulationScheduler({1: 2}), **options)
    assert (trainer.current_epoch, trainer.global_step) == (4, 15)


class Stream(IterableDataset[Any]):
    """Batches without a length."""

    def __init__(self, data: Stripes) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data.examples, 16))


class StreamData(Stripes):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self), batch_size=None)


@pytest.mark.parametrize(
    "options",
    [{}, {"max_epochs": -1, "max_steps": 24}, {"val_check_interval": 6, "pruning": {"tolerance": 0.9}}],
    ids=["epochs", "steps", "validation by batches"],
)
def test_iterable_data_without_length(options: dict[str, Any], tmp_path: Path) -> None:
    run(Classifier(), tmp_path, data=StreamData(), decomposition={"metric": "activation"}, **options)


def test_steps_of_a_stream_do_not_tell_the_rounds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`rounds` must be given"):
        run(Classifier(), tmp_path, data=StreamData(), max_epochs=-1, max_steps=24, pruning={"rounds": None})


class NoValidation(Classifier):
    validation_step = LightningModule.validation_step  # type: ignore[assignment]


def loaders() -> tuple[Any, Any]:
    data = Stripes(batch_size=16)
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()


def test_loaders_without_a_data_module_and_no_validation_at_all(tmp_path: Path) -> None:
    train, val = loaders()
    run(Classifier(), tmp_path / "both", fit={"train_dataloaders": train, "val_dataloaders": val})
    run(NoValidation(), tmp_path / "train", fit={"train_dataloaders": train})
    with pytest.raises(ValueError, match="needs a validation loader"):
        run(NoValidation(), tmp_path, fit={"train_dataloaders": train}, pruning={"tolerance": 0.1})


class TwoLoaders(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["b"], batch_idx) + super().training_step(batch["a"], batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_several_loaders(tmp_path: Path) -> None:
    train, val = loaders()
    run(
        TwoLoaders(),
        tmp_path,
        fit={"train_dataloaders": {"a": train, "b": train}, "val_dataloaders": [val, val]},
        pruning={"monitor": "val_accuracy/dataloader_idx_1", "tolerance": 0.9},
        decomposition={"metric": "activation"},
    )


def test_barebones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruning, watch, module = (
        IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None),
        Watch(),
        NoValidation(),
    )
    trainer = Trainer(barebones=True, max_epochs=4, accelerator="cpu", callbacks=[pruning, BasisDecomposition(), watch])
    trainer.fit(module, loaders()[0])
    check(module, pruning, watch)
    assert (tmp_path / "pruned.ckpt").is_file()


@pytest.mark.parametrize("dry", [True, 2])
def test_fast_dev_run_cuts_nothing_and_writes_nothing(dry: Any, tmp_path: Path) -> None:
    module, pruning = Classifier(), IterativeBasisPruning(warmup_epochs=3)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(metric="activation")], fast_dev_run=dry)
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    assert ranks(module) == [9, 24]
    assert pruning.record.chosen is None
    assert not list(tmp_path.rglob("pruned*"))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # which Lightning says once per process
def test_training_steps_that_skip_a_batch(tmp_path: Path) -> None:
    class Picky(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx % 2 else {"loss": super().training_step(batch, batch_idx), "extra": 1}

    run(Picky(), tmp_path)


def test_callbacks_that_the_module_brings_along(tmp_path: Path) -> None:
    pruning, watch = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None), Watch()

    class Complete(Classifier):
        def configure_callbacks(self) -> list[Callback]:
            return [pruning, BasisDecomposition(), watch]

    module = Complete()
    make_trainer(tmp_path, [], max_epochs=4).fit(module, datamodule=Stripes(batch_size=16))
    check(module, pruning, watch)
