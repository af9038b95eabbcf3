"""Layers that run in training and get no gradient, whose bases would score zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


class Frozen(Classifier):
    """A backbone that runs without gradients, in one of several ways, below a head that trains."""

    def __init__(self, how: str) -> None:
        super().__init__(spread=True)
        self.how = how

    def forward(self, images: Tensor) -> Tensor:
        features, rest = self.first, self.rest
        probing = self.how == "probing" and self.current_epoch == 0
        critic = self.how == "critic" and self.training and self.trainer.fit_loop.epoch_loop.batch_idx == 0
        if self.how == "no_grad" or probing or critic:
            with torch.no_grad():
                hidden = features(images)
        elif self.how == "checkpoint":  # runs without gradients first, and again in the backward pass
            hidden = checkpoint(features, images.requires_grad_(), use_reentrant=True)
        else:
            hidden = features(images).detach() if self.how == "detach" else features(images)
        output: Tensor = rest(hidden)
        return output


def fit(folder: Path, how: str, **pruning: Any) -> IterativeBasisPruning:
    callback = IterativeBasisPruning(
        **{"target": 0.3, "rounds": 1, "warmup_epochs": 1, "tolerance": None, "save_pruned": False, **pruning}
    )
    trainer = make_trainer(folder, [BasisDecomposition(), callback], max_epochs=3)
    trainer.fit(Frozen(how), datamodule=Stripes())
    return callback


@pytest.mark.filterwarnings("ignore:.*the run ends there")
@pytest.mark.parametrize("importance", ["mean_square", "fisher", "second_order"])
@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_layers_without_gradients_are_refused_before_the_first_cut(tmp_path: Path, importance: str, how: str) -> None:
    message = rf"`importance: {importance}` is made of gradients, .* none reached 2 .*\(first: 'first.0'\)"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, how, importance=importance)


def test_the_first_epoch_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="none reached 2 .* the run ends there"), pytest.raises(ValueError):
        fit(tmp_path, "no_grad", warmup_epochs=2)


@pytest.mark.filterwarnings("ignore:.*the run ends there")
@pytest.mark.parametrize(
    ("how", "importance"),
    [("no_grad", "energy"), ("checkpoint", "mean_square"), ("probing", "mean_square"), ("critic", "mean_square")],
)
def test_layers_that_can_be_scored_are_not(tmp_path: Path, how: str, importance: str) -> None:
    assert len(fit(tmp_path, how, importance=importance, warmup_epochs=2).record.rounds) == 2
