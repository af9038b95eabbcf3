"""Lightning's own callbacks and tuners in the same trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.tuner import Tuner

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import Watch, check, ranks, run
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
]


class Tunable(Classifier):
    """Has the attributes that tuners set, and a batch norm whose statistics must not move while they try."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.2
        self.network[0].insert(1, torch.nn.BatchNorm2d(16))  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def test_checkpoints_of_the_best_epochs(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(
        tmp_path / "kept", save_top_k=2, monitor="val_loss", filename="{epoch}-{val_loss:.4f}", save_last=True
    )
    smallest = ModelCheckpoint(
        tmp_path / "small", monitor="bsdp/params_kept", save_on_train_epoch_end=True, filename="smallest"
    )
    module = Classifier()
    trainer, pruning, _ = run(module, tmp_path, keeper, smallest, enable_checkpointing=True)
    assert len(list((tmp_path / "kept").glob("epoch*.ckpt"))) == 2
    for path in (tmp_path / "kept").glob("epoch*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        entry = [e for e in pruning.record.rounds if e.epoch <= checkpoint["epoch"]][-1]
        saved = [entry["rank"] for entry in checkpoint["bsdp"]["pairs"].values()]
        assert saved == list(entry.ranks.values())
        assert checkpoint["state_dict"]["network.0.2.scaling.delta"].numel() == saved[1]
    checkpoint = torch.load(tmp_path / "small" / "smallest.ckpt", weights_only=True)
    assert [entry["rank"] for entry in checkpoint["bsdp"]["pairs"].values()] == ranks(module)
    trainer.test(module, datamodule=Stripes(), ckpt_path="last", verbose=False, weights_only=True)


def test_early_stopping_that_waits(tmp_path: Path) -> None:
    run(Classifier(), tmp_path, EarlyStopping("val_loss", patience=10), LambdaCallback(), Timer(), ModelSummary())


def test_early_stopping_that_does_not_wait(tmp_path: Path) -> None:
    module, pruning = Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=3, tolerance=None)
    stop = EarlyStopping("val_loss", patience=0, divergence_threshold=0.0)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), stop], max_epochs=4)
    with pytest.warns(UserWarning, match="training ended after 0 of 3 pruning rounds"):
        trainer.fit(module, datamodule=Stripes())
    assert ranks(module) == [9, 24]
    assert pruning.checkpoint_path is not None and pruning.checkpoint_path.is_file()


def test_progress_bar(tmp_path: Path) -> None:
    run(Classifier(), tmp_path, RichProgressBar(), enable_progress_bar=True)


TUNERS = [("batch size", True), ("batch size", False), ("learning rate", True), ("learning rate", False)]


@pytest.mark.parametrize(("name", "first"), slow_but(TUNERS[::3], TUNERS))
def test_tuning_callbacks_cut_nothing_and_leave_no_trace(name: str, first: bool, tmp_path: Path) -> None:
    module, data = Tunable(), Stripes(batch_size=8)
    tuner: Callback = BatchSizeFinder(max_trials=2, steps_per_trial=2, init_val=16)
    if name == "learning rate":
        tuner = LearningRateFinder(num_training_steps=20, min_lr=0.1, max_lr=0.3)
    pruning, watch, seen = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None), Watch(), Seen()
    callbacks: list[Callback] = [pruning, BasisDecomposition(), watch, seen]
    trainer = make_trainer(tmp_path, [tuner, *callbacks] if first else [*callbacks, tuner], max_epochs=4)
    torch.manual_seed(1)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.fit(module, datamodule=data)
    check(module, pruning, watch)
    assert [entry.epoch for entry in pruning.record.rounds] == [0, 1, 2]
    assert seen.ranks == [9, 24] and seen.deltas == 0.0
    assert torch.equal(seen.head, before["network.3.weight"])
    assert not seen.mean.any() and not module.network[0][1].running_mean.any()  # type: ignore[operator, union-attr]
    assert data.batch_size == (32 if name == "batch size" else 8)
    assert (module.lr == 0.2) is (name == "batch size")
    assert not list(tmp_path.rglob(".*.ckpt"))


class Seen(Callback):
    """The module as training really starts."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        pairs = bsdp.named_pairs(pl_module)
        self.ranks = [pair.rank for pair in pairs.values()]
        self.deltas = max(float(pair.scaling.delta.detach().abs().max()) for pair in pairs.values())
        self.head = pl_module.network[3].weight.detach().clone()
        self.mean = pl_module.network[0][1].running_mean.clone()


def test_tuner_and_then_a_fit(tmp_path: Path) -> None:
    module, data = Tunable(), Stripes(batch_size=8)
    pruning, watch = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=0.9), Watch()
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(metric="activation"), watch], max_epochs=4)
    tuner = Tuner(trainer)
    tuner.scale_batch_size(module, datamodule=data, max_trials=2, steps_per_trial=2, init_val=4)
    found = tuner.lr_find(module, datamodule=data, num_training=20, min_lr=0.1, max_lr=0.3, update_attr=True)
    assert found is not None and module.lr != 0.2
    assert ranks(module) == [9, 24]
    assert pruning.record.chosen is None
    trainer.fit(module, datamodule=data)
    check(module, pruning, watch)


def test_a_tuner_is_no_resumed_run(tmp_path: Path) -> None:
    for _ in range(2):  # without a logger, both runs have the same folder
        module = Tunable()
        tuner = BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=16)
        callbacks = [
            tuner,
            IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None),
            BasisDecomposition(),
        ]
        trainer = make_trainer(tmp_path, callbacks, max_epochs=2, logger=False)
        trainer.fit(module, datamodule=Stripes(batch_size=16))
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"pruned.ckpt", "pruned-v1.ckpt"}


class Failing(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        raise RuntimeError("stop")


def test_an_error_leaves_no_hook_behind(tmp_path: Path) -> None:
    module, pruning = Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), Failing()])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, datamodule=Stripes())
    assert not any(pair.basis._forward_hooks for pair in bsdp.named_pairs(module).values())
