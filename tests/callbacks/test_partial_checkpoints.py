"""Modules that keep a frozen part out of their checkpoints, as Lightning's documentation of `strict_loading` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning, PruningReport
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

OPTIONS: dict[str, Any] = {"target": 0.3, "rounds": 1, "tolerance": 0.9}
CALLBACKS: dict[str, Any] = {
    "basis": lambda: [
        BasisDecomposition(),
        IterativeBasisPruning(warmup_epochs=1, **OPTIONS, distillation=0.5),
        PruningReport(),
    ],
    "channel": lambda: [ChannelPruning(**OPTIONS)],
    "double": lambda: [BasisDecomposition(), DoublePruning(warmup_epochs=1, **OPTIONS)],
}


class Partial(Classifier):
    """Has a frozen part that its checkpoints lack.

    Args:
        plain: Give a plain dict, not the one of ``nn.Module`` with keys taken out.
    """

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self.encoder, self.plain = nn.LayerNorm(8).requires_grad_(False), plain
        self.strict_loading = False

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.encoder(images))

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **options)
        for key in [key for key in state if key.startswith("encoder")]:
            del state[key]
        return dict(state) if self.plain else state


def fit(folder: Path, callbacks: list[Callback], module: Partial, *, epochs: int = 2, **options: Any) -> Any:
    trainer = make_trainer(folder, callbacks, max_epochs=epochs)
    trainer.fit(module, datamodule=Stripes(), **options)
    return next(callback for callback in callbacks if hasattr(callback, "pruner"))


KINDS = [("basis", True), ("basis", False), ("channel", False), ("double", True)]


@pytest.mark.parametrize(("kind", "plain"), slow_but(KINDS[1:], KINDS))
def test_a_run_ends_with_files_that_follow_the_module(kind: str, plain: bool, tmp_path: Path) -> None:
    module = Partial(plain=plain)
    pruning = fit(tmp_path, CALLBACKS[kind](), module)
    assert pruning.record.chosen == 1
    saved = torch.load(pruning.checkpoint_path, weights_only=True)["state_dict"]
    assert saved.keys() == module.state_dict().keys() and not any("encoder" in key for key in saved)
    images = torch.randn(2, 1, 8, 8)
    loaded = bsdp.load(Partial(plain=plain), pruning.weights_path)
    torch.testing.assert_close(loaded(images), module.eval()(images), rtol=1e-4, atol=1e-5)
    resumed = fit(tmp_path, CALLBACKS[kind](), Partial(plain=plain), epochs=3, ckpt_path=pruning.checkpoint_path)
    assert resumed.record.chosen == 1
