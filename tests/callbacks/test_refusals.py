"""What cannot work is refused before anything runs, with the reason and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

OURS: list[Any] = [BasisDecomposition, IterativeBasisPruning, ChannelPruning, DoublePruning]

CALLBACKS: dict[str, tuple[Any, str]] = {
    "SWA": (lambda: StochasticWeightAveraging(swa_lrs=0.1), "weight averaging keeps a copy .* second run"),
    "averaging": (WeightAveraging, "weight averaging keeps a copy"),
    "EMA": (EMAWeightAveraging, "weight averaging keeps a copy"),
    "masks": (lambda: ModelPruning("l1_unstructured"), "it puts masks .* Remove it"),
    "thawing": (BackboneFinetuning, "it freezes and thaws layers .* `trainable` of `BasisDecomposition`"),
}


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize(("make", "message"), CALLBACKS.values(), ids=CALLBACKS.keys())
def test_callbacks(ours: Any, make: Any, message: str, tmp_path: Path) -> None:
    module, other = Classifier(), make()
    trainer = make_trainer(tmp_path, [ours(), other])
    with pytest.raises(ValueError, match=f"`{ours.__name__}` does not go with `{type(other).__name__}`: {message}"):
        trainer.fit(module, datamodule=Stripes())
    assert not bsdp.named_pairs(module)  # nothing was changed


class DeepSpeedStrategy(DDPStrategy):
    """Stands in for Lightning's own, which cannot be built without the package."""


STRATEGIES: dict[str, tuple[Any, str]] = {
    "FSDP": (FSDPStrategy, "FSDPStrategy, which shards the parameters .* `strategy='ddp'`"),
    "ModelParallel": (ModelParallelStrategy, "ModelParallelStrategy, which shards"),
    "DeepSpeed": (DeepSpeedStrategy, "DeepSpeedStrategy, which shards"),
}


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize(("make", "message"), STRATEGIES.values(), ids=STRATEGIES.keys())
def test_sharding(ours: Any, make: Any, message: str, tmp_path: Path) -> None:
    refused_in_setup(ours, make_trainer(tmp_path, []), make(), message)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_spawn_find_unused_parameters_true"])
def test_spawning(ours: Any, name: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], strategy=name, devices=2)
    refused_in_setup(ours, trainer, None, r"spawn or fork processes \(ddp_spawn, .* `strategy='ddp'`")


class BitsandbytesPrecision(Precision):
    """Stands in for Lightning's own, which cannot be built without the package."""


@pytest.mark.parametrize("ours", OURS)
def test_precision_that_replaces_layers(ours: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [], plugins=[BitsandbytesPrecision()])
    refused_in_setup(ours, trainer, None, "BitsandbytesPrecision, which puts layers of its own .* quantise the pruned")


def refused_in_setup(ours: Any, trainer: Trainer, strategy: Strategy | None, message: str) -> None:
    """Call `setup` as Lightning does, where the trainer itself cannot get that far on this machine."""
    if strategy is not None:
        trainer._accelerator_connector.strategy = strategy
    module, callback = Classifier(), ours()
    with pytest.raises(ValueError, match=f"`{ours.__name__}` does not support .*{message}"):
        callback.setup(trainer, module, "fit")
    assert not bsdp.named_pairs(module)


def test_network_that_is_built_twice(tmp_path: Path) -> None:
    class Forgetful(Classifier):
        def configure_model(self) -> None:
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    with pytest.raises(ValueError, match=r"built the network anew .* `configure_model`, which is called twice"):
        make_trainer(tmp_path, [BasisDecomposition()]).fit(Forgetful(), datamodule=Stripes())


def test_pruning_that_something_else_ends(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    module, pruning = Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=3, tolerance=None)
    with pytest.warns(UserWarning, match="training ended after 1 of 3 pruning rounds, short of `target=0.6`"):
        make_trainer(tmp_path, [pruning, BasisDecomposition(), Enough()], max_epochs=4).fit(
            module, datamodule=Stripes()
        )
    assert [entry.epoch for entry in pruning.record.rounds] == [0, 1]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert torch.load(str(pruning.checkpoint_path), weights_only=True)["bsdp"]["pairs"]
