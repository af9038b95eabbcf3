"""`ChannelPruning` in real, tiny runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import bsdp
from bsdp.callbacks import ChannelPruning
from bsdp.channel_pruner import ALL_CRITERIA
from bsdp.scale_hooks import scales_of
from tests.helpers.channel_runs import ResidualClassifier, ResidualNet, check, fit, widths
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

EXTRA: dict[str, dict[str, Any]] = {
    "activation_cumsum": {"theta": 0.4},
    "bn_scale": {"l1": 0.001},
    "channel_scaling": {"l1": 0.01},
    "taylor_2016": {"macs_penalty": 0.001},
}


@pytest.mark.parametrize("criterion", ALL_CRITERIA)
def test_criterion(criterion: str, tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, watch = fit(module, tmp_path, pruning={"criterion": criterion, **EXTRA.get(criterion, {})})
    check(module, callback, watch)
    images = torch.randn(3, 1, 8, 8)
    written = bsdp.load(ResidualNet, callback.weights_path)
    torch.testing.assert_close(written(images), module.eval()(images), rtol=1e-4, atol=1e-5)
