"""NaN and infinity: a broken step counts for nothing, a round without sound scores is skipped, the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import ranks, run
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer

NAN, INF = float("nan"), float("inf")


class Breaking(Classifier):
    """Multiplies the images (hence features, loss and gradients) of some batches by NaN or infinity.

    Args:
        where: ``{(epoch, batch): factor}``.
        guard: Leave weights alone in a step whose gradients are not finite.
    """

    def __init__(self, where: dict[tuple[int, int], float], *, guard: bool = True) -> None:
        super().__init__()
        self.where, self.guard = where, guard

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        factor = self.where.get((self.current_epoch, batch_idx), 1.0)
        return super().training_step((batch[0] * factor, batch[1]), batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.guard and not all(p.grad.isfinite().all() for p in self.parameters() if p.grad is not None):
            optimizer.zero_grad()


class Steps(Callback):
    """Notes how many steps counted when an epoch ended."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counted.append(next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner.scores.steps)


BROKEN = [(name, factor) for factor in (NAN, INF) for name in ("mean_square", "mean_abs", "energy")]


@pytest.mark.parametrize(("importance", "factor"), slow_but([BROKEN[1], BROKEN[2], BROKEN[3]], BROKEN))
def test_one_broken_batch_poisons_nothing(importance: str, factor: float, tmp_path: Path) -> None:
    # features are watched on all batches of so short an epoch
    module, steps = Breaking({(0, 4): factor, (1, 0): factor}), Steps()
    _, pruning, _ = run(module, tmp_path, steps, pruning={"importance": importance})
    if importance != "energy":
        assert steps.counted == [5, 5, 6, 12]
    assert [entry.epoch for entry in pruning.record.rounds] == [0, 1, 2]


@pytest.mark.parametrize("importance", ["mean_square", "mean_abs", "energy"])
def test_a_round_without_sound_scores_is_skipped(importance: str, tmp_path: Path) -> None:
    module = Breaking({(1, batch): NAN for batch in range(6)})
    # the first cut is sound; the second finds nothing since, and the third reaches the target nevertheless
    with pytest.warns(UserWarning, match="pruning round 2 is skipped: "):
        _, pruning, _ = run(module, tmp_path, pruning={"importance": importance, "rounds": 3, "target": 0.6}, skipped=1)
    assert [entry.epoch for entry in pruning.record.rounds] == [0, 1, 3]


@pytest.mark.parametrize("tolerance", [0.9, None])
def test_weights_that_are_nan_for_good_leave_the_last_sound_model(tolerance: float | None, tmp_path: Path) -> None:
    module = Breaking({(2, 3): NAN}, guard=False)
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=4, tolerance=tolerance)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], max_epochs=5)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(module, datamodule=Stripes(batch_size=16))
    texts = [str(entry.message) for entry in caught]
    # the third epoch has some sound steps before the break, but its weights are gone when the third cut is due
    assert any("pruning round 3 is skipped: the weights are NaN" in text for text in texts)
    assert len(pruning.record.rounds) == 3
    assert any("pruning round 4 is skipped: the weights are NaN" in text for text in texts)
    assert any("NaN or infinite: the model of round 1 is taken" in text for text in texts)
    assert trainer.current_epoch == 5
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert pruning.record.chosen == 1 and ranks(module) == list(pruning.record.rounds[1].ranks.values())


def test_weights_that_are_nan_from_the_start(tmp_path: Path) -> None:
    module = Breaking({(0, 0): NAN}, guard=False)
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=0.9, save_pruned=False)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], max_epochs=3)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(module, datamodule=Stripes(batch_size=16))
    assert any("NaN or infinite: no validation saw a sound model" in str(entry.message) for entry in caught)
    assert ranks(module) == [9, 24]


def test_infinite_scores_skip_the_round_whatever_they_come_from(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            scores = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner.scores
            if trainer.current_epoch == 0 and trainer.global_step == 6:
                scores._sum = scores._sum * INF

    module, pruning = Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), Poison()], max_epochs=2)
    with pytest.warns(UserWarning, match="round 1 is skipped: scores are NaN or infinite"):
        trainer.fit(module, datamodule=Stripes(batch_size=16))
    assert ranks(module) == [9, 24]


def test_nan_in_calibration_keeps_the_euclidean_bases(tmp_path: Path) -> None:
    class Broken(Stripes):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.examples.tensors[0][0] = NAN

    module, reference = Classifier(), Classifier()
    reference.load_state_dict(module.state_dict())
    bsdp.decompose(reference)
    trainer = make_trainer(tmp_path, [BasisDecomposition(metric="activation")], max_epochs=1, limit_train_batches=1)
    with pytest.warns(UserWarning, match="outputs or gradients of 2 layers .* keep their bases"):
        trainer.fit(module, datamodule=Broken(batch_size=16))
    for name, pair in bsdp.named_pairs(module).items():
        assert torch.equal(pair.basis.weight, bsdp.named_pairs(reference)[name].basis.weight)  # type: ignore[arg-type]
