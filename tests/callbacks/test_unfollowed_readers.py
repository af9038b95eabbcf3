"""Layers that read channels in training only, which no graph of ``forward`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer


class TwoHeads(Classifier):
    """Has a second head that `training_step` alone calls.

    Args:
        reads: ``features``, the ``image``, or ``frozen`` features of a second network.
    """

    def __init__(self, reads: str) -> None:
        super().__init__(spread=True)
        self.reads = reads
        self.teacher = nn.Sequential(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3))
        self.second = nn.Linear(64 if reads == "image" else 24, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features = self.first(batch[0])
        with torch.no_grad():
            frozen = self.teacher(batch[0]).mean((2, 3))
        read = {"features": F.relu(features).mean((2, 3)), "image": batch[0].flatten(1), "frozen": frozen}[self.reads]
        return F.cross_entropy(self.rest(features), batch[1]) + F.cross_entropy(self.second(read), batch[1])


def fit(module: Classifier, folder: Path, *, double: bool = False, **pruning: Any) -> Any:
    kind: Any = DoublePruning if double else ChannelPruning
    settings = {"target": 0.3, "rounds": 1, "warmup_epochs": 1, "tolerance": None, "save_pruned": False}
    callback = kind(**{**settings, **pruning})
    others = [BasisDecomposition(exclude=["second", "teacher"])] if double else []
    trainer = make_trainer(folder, [callback, *others], max_epochs=2, limit_train_batches=2)
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    return callback


@pytest.mark.filterwarnings("ignore:.*the run ends there")
@pytest.mark.parametrize("double", [False, True])
def test_a_head_of_the_training_step_is_refused_until_its_channels_stay(double: bool, tmp_path: Path) -> None:
    message = r"layer 'second' runs in training, but not in `forward` .* that make them \(first.2\) in `exclude`"
    with pytest.raises(ValueError, match=message):
        fit(TwoHeads("features"), tmp_path, double=double)
    assert len(fit(TwoHeads("features"), tmp_path, double=double, exclude=["first.2"]).record.rounds) == 2


@pytest.mark.parametrize("reads", ["image", "frozen"])
def test_a_head_that_reads_other_things_is_not(reads: str, tmp_path: Path) -> None:
    assert len(fit(TwoHeads(reads), tmp_path).record.rounds) == 2
