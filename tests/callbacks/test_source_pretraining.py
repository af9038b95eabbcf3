"""Pretraining on source images inside a real fit."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning, SourcePretraining
from tests.helpers.pruning_runs import Classifier, Stripes, StripesWithSource, make_trainer


class Before(Callback):
    """Keeps the weights and random states with which training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {key: value.clone() for key, value in pl_module.state_dict().items()}
        self.random = (torch.rand(3).tolist(), random.random(), float(np.random.rand()))


class SaveAs(Callback):
    """Saves a checkpoint in one hook."""

    def __init__(self, path: Path, hook: str) -> None:
        setattr(self, hook, lambda trainer, pl_module: trainer.save_checkpoint(path))


class Counting(StripesWithSource):
    """Counts how often its source was asked for."""

    asked = 0

    def source_train_dataloader(self) -> Any:
        self.asked += 1
        random.random(), np.random.rand(), torch.rand(1)
        return super().source_train_dataloader()


def fit(
    folder: Path,
    *callbacks: Callback,
    module: LightningModule | None = None,
    data: Stripes | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Before:
    before = Before()
    trainer = make_trainer(folder, [*callbacks, before], **{"max_epochs": 1, **settings})
    trainer.fit(module or Classifier(), datamodule=data or Counting(), ckpt_path=ckpt_path)
    return before


def start() -> Classifier:
    torch.manual_seed(3)
    return Classifier()


def test_training_begins_with_other_weights_but_the_same_head(tmp_path: Path) -> None:
    module = start()
    own = {key: value.clone() for key, value in module.state_dict().items()}
    weights = fit(tmp_path, SourcePretraining(epochs=2), module=module).weights
    same = {key for key in own if torch.equal(own[key], weights[key])}
    assert same == {"network.3.weight", "network.3.bias"}


def test_random_state_of_the_run_is_the_same_without_it(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [SourcePretraining(epochs=2)]):
        random.seed(1), np.random.seed(1)
        module = start()
        torch.manual_seed(1)
        states.append(fit(tmp_path / str(len(callbacks)), *callbacks, module=module).random)
    assert states[0] == states[1]


def test_decomposed_module_computes_what_the_plain_one_does(tmp_path: Path) -> None:
    plain, decomposed = start(), start()
    beside = BasisDecomposition(batch_norm="all")
    first = fit(tmp_path / "0", SourcePretraining(epochs=2), module=plain)
    second = fit(tmp_path / "1", beside, SourcePretraining(epochs=2), module=decomposed)
    plain.load_state_dict(first.weights)
    decomposed.load_state_dict(second.weights)
    assert set(bsdp.named_pairs(decomposed)) == {"network.0.0", "network.0.2"}
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(decomposed(images), plain(images), rtol=1e-4, atol=1e-5)


def test_prunes_after_it_in_one_fit(tmp_path: Path) -> None:
    data, module = Counting(), start()
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None)
    callbacks = [pruning, SourcePretraining(epochs=1), BasisDecomposition(metric="activation")]
    fit(tmp_path, *callbacks, module=module, data=data, max_epochs=2)
    assert data.asked == 1
    assert pruning.record.chosen is not None
    with pytest.raises(ValueError, match=r"`SourcePretraining` comes before pruning, but \d layers .* Leave it out"):
        fit(tmp_path, SourcePretraining(epochs=1), module=module)


@pytest.mark.parametrize("pretrained_before", [True, False])
def test_resumed_fit_does_not_pretrain(tmp_path: Path, pretrained_before: bool) -> None:
    first = [SourcePretraining(epochs=1)] if pretrained_before else []
    module = start()
    fit(tmp_path, *first, SaveAs(tmp_path / "a.ckpt", "on_train_end"), module=module)
    data = Counting()
    weights = fit(tmp_path, SourcePretraining(epochs=1), data=data, ckpt_path=tmp_path / "a.ckpt", max_epochs=2).weights
    assert data.asked == 0
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


def test_checkpoint_of_before_the_first_step_remembers(tmp_path: Path) -> None:
    fit(tmp_path, SourcePretraining(epochs=1), SaveAs(tmp_path / "early.ckpt", "on_train_start"))
    data = Counting()
    fit(tmp_path, SourcePretraining(epochs=1), data=data, ckpt_path=tmp_path / "early.ckpt")
    assert data.asked == 0


def test_second_fit_of_a_trainer_goes_on_and_a_new_trainer_starts_anew(tmp_path: Path) -> None:
    data, callback, module = Counting(), SourcePretraining(epochs=1), start()
    trainer = make_trainer(tmp_path, [callback], max_epochs=1)
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule=data)
    assert data.asked == 1
    fit(tmp_path, callback, data=data)
    assert data.asked == 2


def test_dry_run_takes_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bsdp.callbacks import source_pretraining

    results: list[Any] = []
    original = source_pretraining.pretrain
    monkeypatch.setattr(
        source_pretraining, "pretrain", lambda *given, **named: results.extend(original(*given, **named))
    )
    fit(tmp_path, SourcePretraining(epochs=5), fast_dev_run=True)
    assert [result.images for result in results] == [16]


def test_order_of_the_source_changes_with_the_epoch(tmp_path: Path) -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []  # noqa: RUF012

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    class Shuffled(Counting):
        def source_train_dataloader(self) -> Any:
            data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3)
            return DataLoader(data, 4, sampler=Sampler(data))

    fit(tmp_path, SourcePretraining(epochs=3), data=Shuffled())
    assert Sampler.epochs[-3:] == [0, 1, 2]


def test_bfloat16_is_arithmetic_only(tmp_path: Path) -> None:
    exact = fit(tmp_path / "0", SourcePretraining(epochs=1), module=start()).weights
    rough = fit(tmp_path / "1", SourcePretraining(epochs=1, precision="bfloat16"), module=start()).weights
    assert all(value.dtype == torch.float32 for value in rough.values())
    difference = (exact["network.0.0.weight"] - rough["network.0.0.weight"]).abs().max()
    assert 0 < difference < 0.05


def test_refuses_data_without_a_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Stripes has no `source_train_dataloader`. Put it as the target into"):
        fit(tmp_path, SourcePretraining(), data=Stripes())


def test_refuses_images_that_the_network_does_not_take(tmp_path: Path) -> None:
    class Small(Counting):
        def source_train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.zeros(4, 3, 4, 4), torch.zeros(4).long()), 2)

    with pytest.raises(ValueError, match=r"does not take the source's images, \[3, 4, 4\] .* the `image_size` and ch"):
        fit(tmp_path, SourcePretraining(), data=Small())


def test_refuses_a_head_that_cannot_be_exchanged(tmp_path: Path) -> None:
    module = start()
    module.network[3] = nn.Sequential(nn.Unflatten(1, (24, 2, 2)), nn.Conv2d(24, 4, 2), nn.Flatten())
    with pytest.raises(ValueError, match=r"network's last layer, .* here it is '3.1' \(Conv2d\)"):
        fit(tmp_path, SourcePretraining(), module=module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"learning_rate": -1.0}, "`learning_rate` must be above 0 and finite, got -1.0"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"precision": "16"}, "`precision` must be one of 'float32', 'bfloat16', got '16'"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourcePretraining(**copy.deepcopy(arguments))
