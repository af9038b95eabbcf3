"""Runs of a plain `Trainer` with foreign data that are stopped and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from bsdp.resume import LastCheckpoint, RunState
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer
from tests.helpers.resuming import SaveAt, StopAt, Stopped, differences

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed",
        "Be aware that when using `ckpt_path`",
        "You're resuming from a checkpoint that ended before the epoch ended",
    )
]


class Shuffled(Stripes):
    """Draws its order from the global generator, as most data modules do."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, 32, shuffle=True)


class Learner(Classifier):
    """With dropout, momentum and a schedule.

    Args:
        early: Build the optimizer before the layers are decomposed, as ``--optimizer`` of the command line does.
        values: What to log as ``val_accuracy`` in each epoch; by default the real value.
    """

    def __init__(self, *, early: bool = False, values: list[float] | None = None) -> None:
        super().__init__()
        self.network[0].insert(2, nn.Dropout(0.2))
        self.values = values
        self.optimizer = self._build() if early else None

    def _build(self) -> torch.optim.Optimizer:
        biases = [p for p in self.parameters() if p.dim() == 1]
        weights = [p for p in self.parameters() if p.dim() > 1 or p not in set(biases)]
        return torch.optim.AdamW([{"params": biases, "lr": 0.02}, {"params": weights}], lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.values is None:
            super().validation_step(batch, batch_idx)
        else:
            self.log("val_accuracy", self.values[self.current_epoch])

    def configure_optimizers(self) -> Any:
        optimizer = self._build() if self.optimizer is None else self.optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Look(Callback):
    """Takes what the trainer has as the training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruning = next(c for c in trainer.callbacks if isinstance(c, IterativeBasisPruning))  # type: ignore[attr-defined]
        assert pruning.pruner is not None
        self.seen = copy.deepcopy(
            {
                "state_dict": dict(pl_module.state_dict()),
                "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "pruner": pruning.pruner.state_dict(),
            }
        )
        self.shapes = [
            (parameter.shape, value.shape)
            for optimizer in trainer.optimizers
            for parameter, state in optimizer.state.items()
            for value in state.values()
            if value.dim() > 0
        ]


def fit(
    folder: Path, *others: Callback, learner: dict[str, Any] | None = None, ckpt: Path | None = None, **options: Any
) -> tuple[LightningModule, IterativeBasisPruning, Trainer]:
    torch.manual_seed(5 if ckpt is None else 6)
    module = Learner(**(learner or {}))
    pruning = IterativeBasisPruning(**{"target": 0.6, "tolerance": 0.9, "warmup_epochs": 2, **options.pop("prune", {})})
    callbacks = [pruning, BasisDecomposition(**options.pop("decompose", {}))]
    callbacks = [*(reversed(callbacks) if options.pop("decomposition_first", False) else callbacks), *others]
    settings = {"max_epochs": 5, "enable_checkpointing": any(isinstance(c, LastCheckpoint) for c in others), **options}
    trainer = make_trainer(folder, callbacks, **settings)
    weights_only = {} if ckpt is None else {"weights_only": True}
    trainer.fit(module, datamodule=Shuffled(), ckpt_path=ckpt, **weights_only)
    return module, pruning, trainer


MOMENTS = [("on_train_epoch_end", 3), ("on_train_batch_end", 2, 1), ("on_validation_end", 2)]
RESTORED = [(moment, early) for moment in MOMENTS for early in (False, True)]


@pytest.mark.parametrize(("moment", "early"), slow_but([RESTORED[1], RESTORED[2], RESTORED[4]], RESTORED))
def test_everything_is_restored_before_the_first_step(tmp_path: Path, moment: Any, early: bool) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, SaveAt(*moment), learner={"early": early})
    checkpoint = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    look = Look()
    fit(tmp_path, look, learner={"early": early}, ckpt=tmp_path / "kept.ckpt")
    states = checkpoint["callbacks"]["IterativeBasisPruning"]
    expected = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
    expected["pruner"] = {key: states[key] for key in look.seen["pruner"]}
    assert differences(expected, look.seen) == []
    assert len(states["record"]["rounds"]) > 1 and checkpoint["optimizer_states"][0]["state"]
    assert all(parameter == value for parameter, value in look.shapes)


CURVATURE = {"importance": "second_order", "score_momentum": 0.5, "curvature_batches": 2}
EXAMPLES = {"importance": "fisher", "score_momentum": 0.5}


@pytest.mark.parametrize(
    ("epochs", "prune"),
    [((1, 3), {}), ((3,), {"distillation": 0.5}), ((3,), CURVATURE), ((3,), EXAMPLES)],
    ids=["", "distillation", "curvature", "examples"],
)
def test_dropout_and_shuffling_go_on_from_an_epochs_end(
    tmp_path: Path, epochs: tuple[int, ...], prune: dict[str, Any]
) -> None:
    saving = [SaveAt("on_train_epoch_end", epoch, file=f"{epoch}.ckpt", go_on=True) for epoch in epochs]
    whole, pruning, _ = fit(tmp_path, *saving, prune=prune)
    for epoch in epochs:
        module, resumed, _ = fit(tmp_path / f"{epoch}", ckpt=tmp_path / f"{epoch}.ckpt", prune=prune)
        assert differences(dict(whole.state_dict()), dict(module.state_dict())) == []
        assert resumed.record.rounds == pruning.record.rounds


REBASE = {"rebase": "every_round", "metric": "activation"}


@pytest.mark.parametrize(
    ("prune", "first"),
    slow_but([({}, True), (REBASE, False)], [({}, True), ({}, False), (REBASE, True), (REBASE, False)]),
)
def test_training_of_all_weights_goes_on_from_an_epochs_end(tmp_path: Path, prune: dict[str, Any], first: bool) -> None:
    moments = [("on_train_epoch_end", 1), ("on_train_epoch_end", 3), ("on_train_batch_end", 1, 2)]

    def run(folder: Path, *others: Callback, ckpt: Path | None = None) -> tuple[LightningModule, IterativeBasisPruning]:
        options = {"decompose": {"metric": "activation", "train": "weights"}, "prune": dict(prune)}
        module, pruning, _ = fit(folder, *others, ckpt=ckpt, decomposition_first=first, **options)
        return module, pruning

    saving = [SaveAt(*moment, file=f"{i}.ckpt", go_on=True) for i, moment in enumerate(moments)]  # type: ignore[arg-type]
    whole, pruning = run(tmp_path, *saving)
    for i, moment in enumerate(moments):
        module, resumed = run(tmp_path / f"{i}", ckpt=tmp_path / f"{i}.ckpt")
        assert differences(dict(whole.state_dict()), dict(module.state_dict())) == [], moment
        assert [entry.ranks for entry in resumed.record.rounds] == [entry.ranks for entry in pruning.record.rounds]
        if moment[0] == "on_train_epoch_end":  # after the last batch of an epoch, its validation is left out
            assert resumed.record.rounds == pruning.record.rounds


def test_scores_of_the_warm_up_are_of_one_epoch_wherever_it_was_resumed(tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert resumed.pruner is not None
            steps.append(resumed.pruner.scores.steps)

    with pytest.raises(Stopped):  # after the last step of an epoch, where Lightning goes on in the next one
        fit(tmp_path, SaveAt("on_train_batch_end", 0, 2), prune={"warmup_epochs": 3})
    resumed = IterativeBasisPruning(target=0.6, tolerance=0.9, warmup_epochs=3)
    trainer = make_trainer(tmp_path, [resumed, BasisDecomposition(), Count()], max_epochs=5)
    trainer.fit(Learner(), datamodule=Shuffled(), ckpt_path=tmp_path / "kept.ckpt", weights_only=True)
    assert steps == [3] * 4


def test_a_run_that_had_stopped_is_finished_and_not_trained_further(tmp_path: Path) -> None:
    values = [0.9, 0.9, 0.895, 0.1, 0.9]
    prune = {"tolerance": 0.01}
    _, whole, _ = fit(tmp_path / "whole", learner={"values": values}, prune=prune)
    assert (len(whole.record.rounds), whole.record.chosen) == (3, 1)
    with pytest.raises(Stopped):
        fit(tmp_path, LastCheckpoint(), StopAt("on_train_end", 4), learner={"values": values}, prune=prune)
    (last,) = tmp_path.rglob("last.ckpt")
    module, resumed, trainer = fit(tmp_path, learner={"values": values}, prune=prune, ckpt=last)
    assert trainer.global_step == 12
    assert resumed.record.rounds == whole.record.rounds and resumed.record.chosen == 1
    assert {name.removeprefix("network."): p.rank for name, p in bsdp.named_pairs(module).items()} == (
        whole.record.rounds[1].ranks
    )


@pytest.mark.filterwarnings("ignore:training ended after 0 of 1 pruning rounds")
@pytest.mark.parametrize(
    ("values", "settings", "epochs"),
    [
        ([0.9] * 5, {"patience": 2}, 3),
        ([0.9, 0.96, 0.9, 0.9, 0.9], {"stopping_threshold": 0.95}, 2),
        ([0.96, 0.9, 0.9, 0.9, 0.9], {"stopping_threshold": 0.95}, 1),
    ],
    ids=["patience", "threshold", "threshold_at_once"],
)
def test_early_stopping_stays(tmp_path: Path, values: list[float], settings: dict[str, Any], epochs: int) -> None:
    def parts() -> list[Callback]:
        stopping = EarlyStopping("val_accuracy", mode="max", **{"patience": 5, **settings})
        return [stopping, RunState(), LastCheckpoint()]

    prune = {"rounds": 1, "tolerance": None}
    with pytest.raises(Stopped):
        fit(tmp_path, *parts(), StopAt("on_train_end", epochs), learner={"values": values}, prune=prune)
    (last,) = tmp_path.rglob("last.ckpt")
    _, resumed, trainer = fit(tmp_path, *parts(), learner={"values": values}, prune=prune, ckpt=last)
    assert trainer.global_step == 3 * epochs and resumed.checkpoint_path is not None


def test_epochs_that_are_added_train_the_final_structure(tmp_path: Path) -> None:
    _, whole, _ = fit(tmp_path, LastCheckpoint())
    (last,) = tmp_path.rglob("last.ckpt")
    _, resumed, trainer = fit(tmp_path, LastCheckpoint(), ckpt=last, max_epochs=8)
    assert trainer.global_step == 24
    ranks = [[*r.ranks.values()] for r in resumed.record.rounds]
    assert ranks == [[*r.ranks.values()] for r in whole.record.rounds] and len(ranks) == 4
    assert resumed.pruner is not None and resumed.pruner.settings.rounds == 3


def test_a_warm_up_that_began_later_still_does_after_a_resume(tmp_path: Path) -> None:
    module = Learner()
    plain = make_trainer(tmp_path, [BasisDecomposition()], max_epochs=2)
    plain.fit(module, datamodule=Shuffled())

    def go_on(ckpt: Path, *others: Callback, max_epochs: int = 6) -> IterativeBasisPruning:
        pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=0.9)
        trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), *others], max_epochs=max_epochs)
        trainer.fit(Learner(), datamodule=Shuffled(), ckpt_path=ckpt, weights_only=True)
        return pruning

    plain.save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    with pytest.raises(Stopped):
        go_on(tmp_path / "plain.ckpt", SaveAt("on_train_epoch_end", 3))
    with pytest.raises(ValueError, match=r"needs 4 epochs .* stops after 3"):
        go_on(tmp_path / "kept.ckpt", max_epochs=5)
    resumed = go_on(tmp_path / "kept.ckpt")
    assert [r.epoch for r in resumed.record.rounds] == [0, 3, 4, 5]


def test_an_interrupted_end_leaves_the_older_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, LastCheckpoint(), logger=False)
    files = [tmp_path / "pruned.ckpt", tmp_path / "pruned.safetensors"]
    before = [file.read_bytes() for file in files]
    for name in ("torch.save", "safetensors.torch.save_file"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted(name))
            with pytest.raises(Stopped):
                fit(tmp_path, logger=False, ckpt=tmp_path / "checkpoints" / "last.ckpt")
        kept = [file.read_bytes() for file in files]
        assert kept[1] == before[1] and (kept[0] == before[0] or name != "torch.save")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "pruned.ckpt", "pruned.safetensors"]


def interrupted(name: str) -> Any:
    """A writer that gets halfway."""

    def write(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if name == "torch.save":
            file.write(b"half")
        else:
            Path(file).write_bytes(b"half")
        raise Stopped

    return write
