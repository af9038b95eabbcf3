"""Mixed and half precision: scores are unscaled and finite, and the module trains on in its own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

import bsdp
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import run
from tests.helpers.pruning_runs import Classifier, Stripes


class Scores(Callback):
    """Copies the sum of the scores and the number of counted steps after every step of the warm-up."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pruner = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner
        if trainer.current_epoch == 0:
            self.sums.append(pruner.scores._sum.clone())
            self.steps.append(pruner.scores.steps)


DTYPES = {
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "32-true": torch.float32,
}


PRECISIONS = [(metric, precision) for metric in ("euclidean", "activation") for precision in DTYPES]


@pytest.mark.parametrize(("metric", "precision"), slow_but([*PRECISIONS[:5], ("activation", "16-true")], PRECISIONS))
def test_precision(precision: Any, metric: str, tmp_path: Path) -> None:
    module, scores = Classifier(), Scores()
    _, pruning, _ = run(
        module, tmp_path, scores, precision=precision, pruning={"tolerance": 0.9}, decomposition={"metric": metric}
    )
    for pair in bsdp.named_pairs(module).values():
        assert {p.dtype for p in pair.parameters()} == {DTYPES[precision]}
    assert scores.steps == [1, 2, 3, 4, 5, 6]
    assert scores.sums[-1].dtype == torch.float32 and scores.sums[-1].isfinite().all()
    assert pruning.record.rounds[-1].macs is not None


def test_bf16_scores_are_close_to_those_of_fp32(tmp_path: Path) -> None:
    sums = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        scores = Scores()
        run(Classifier(), tmp_path, scores, precision=precision)
        sums.append(scores.sums[0])
    torch.testing.assert_close(sums[0], sums[1], rtol=0.1, atol=0.02 * float(sums[0].max()))


class CpuScaler(MixedPrecision):
    """What 16-mixed does on a GPU, with bf16 as the type: Lightning leaves the scaler out on a CPU."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=1000)


class Overflowing(Classifier):
    """Has an infinite loss in one batch, as half precision does when the scale is too large."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        infinite = self.current_epoch == 0 and batch_idx == 2
        return super().training_step(batch, batch_idx) * (float("inf") if infinite else 1.0)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_are_unscaled_before_they_are_scored(clip: float | None, tmp_path: Path) -> None:
    sums = []
    for options in ({"precision": "bf16-mixed"}, {"plugins": [CpuScaler()]}):
        torch.manual_seed(0)
        scores = Scores()
        run(Classifier(), tmp_path, scores, gradient_clip_val=clip, **options)
        sums.append(scores.sums[0])
    torch.testing.assert_close(sums[0], sums[1], rtol=0.05, atol=0.02 * float(sums[0].max()))


def test_steps_that_overflow_do_not_count(tmp_path: Path) -> None:
    scores, precision = Scores(), CpuScaler()
    run(Overflowing(), tmp_path, scores, plugins=[precision])
    assert scores.steps == [1, 2, 2, 3, 4, 5]
    assert torch.equal(scores.sums[1], scores.sums[2])
    assert precision.scaler is not None and precision.scaler.get_scale() == 2.0**13  # the scaler saw it, too


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_precision_on_a_gpu(precision: Any, tmp_path: Path) -> None:
    scores = Scores()
    _, pruning, _ = run(
        Classifier(),
        tmp_path,
        scores,
        precision=precision,
        accelerator="gpu",
        data=Stripes(batch_size=16),
        pruning={"tolerance": 0.9},
        decomposition={"metric": "activation"},
    )
    assert scores.sums[-1].isfinite().all()
    assert pruning.record.rounds[-1].macs is not None
