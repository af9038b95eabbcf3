"""Batch norms that are recalibrated after a cut, on the data of the trainer."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning, _recalibration
from tests.helpers.channel_runs import ResidualClassifier, Shuffled
from tests.helpers.pruning_runs import Stripes, make_trainer
from tests.helpers.resuming import SaveAt, Stopped, differences


def trainer_with(*tensors: Tensor, shuffle: bool = False, **options: Any) -> Any:
    strategy = SimpleNamespace(batch_to_device=lambda batch: batch, **options)
    loader = DataLoader(TensorDataset(*tensors), 4, shuffle=shuffle)
    return SimpleNamespace(
        train_dataloader=loader,
        strategy=strategy,
        world_size=2 if options else 1,
        num_training_batches=len(loader),
        global_step=0,
        loggers=[],
        datamodule=None,
        precision_plugin=Precision(),
    )


class Module(LightningModule):
    """Does in its step what `step` says; each layer is its own."""

    def __init__(self, step: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.step, self.calls = step, [0]
        self.linear, self.norm, self.dropout = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.automatic_optimization = step is not None

    def __getitem__(self, index: int) -> Any:
        return (self.linear, self.norm, self.dropout)[index]

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(images)))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls[0] += 1
        self.calls.append(batch_idx)
        assert self.step is not None
        return self.step(self, batch)


def network(step: Callable[[Any, Any], Any] | None = None) -> Any:
    torch.manual_seed(0)
    return Module(step)


def statistics(module: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in module.named_buffers() if "running" in name]


def test_statistics_are_those_of_the_first_batches_and_the_random_state_stays() -> None:
    images, labels = torch.randn(16, 3), torch.arange(16)
    module, expected = network(), network()
    before = torch.get_rng_state()
    _recalibration.recalibrate(trainer_with(images, labels), module, 2)
    assert torch.equal(torch.get_rng_state(), before)
    outputs = [expected[0](batch) for batch in images[:8].split(4)]
    mean, variance = sum(o.mean(0) for o in outputs) / 2, sum(o.var(0) for o in outputs) / 2  # type: ignore[union-attr]
    for own, by_hand in zip(statistics(module), (mean, variance), strict=True):
        torch.testing.assert_close(own, by_hand)
    assert all(entry.training for entry in module.modules())


def test_the_step_shows_what_reaches_the_layers() -> None:
    images, labels = torch.randn(16, 3), torch.arange(16)
    module, expected = network(lambda module, batch: module(batch[0] / 4 + 3).sum()), network()
    _recalibration.recalibrate(trainer_with(images, labels), module, 2)
    _recalibration.recalibrate(trainer_with(images / 4 + 3, labels), expected, 2)
    for own, by_hand in zip(statistics(module), statistics(expected), strict=True):
        torch.testing.assert_close(own, by_hand)
    assert module.calls == [0] and module.norm.num_batches_tracked == 0


def test_steps_leave_no_trace() -> None:
    groups = [{"lr": 1.0}]

    def step(module: Any, batch: Any) -> Tensor:
        images = (batch[0] / 4 + 3).requires_grad_()
        (gradient,) = torch.autograd.grad(module(images).square().sum(), images)  # an adversarial example
        outputs = module(images).sum()
        with torch.no_grad():
            module.linear.bias.mul_(0.5)
            module.memory.add_(1.0)
        module.history["losses"].append(gradient)
        module.groups[0]["lr"] = 0.0
        return outputs  # type: ignore[no-any-return]

    module = network(step)
    losses: list[Any] = []
    module.history, module.groups, module.memory = {"losses": losses}, groups, torch.zeros(2)
    images, expected = torch.randn(16, 3), network()
    before = copy.deepcopy(module.linear.state_dict())
    _recalibration.recalibrate(trainer_with(images), module, 1)
    _recalibration.recalibrate(trainer_with(images / 4 + 3), expected, 1)
    for own, by_hand in zip(statistics(module), statistics(expected), strict=True):
        torch.testing.assert_close(own, by_hand)
    assert not module.memory.any() and module.history["losses"] is losses and not losses
    assert module.groups is groups and groups == [{"lr": 1.0}]
    assert all(torch.equal(value, module.linear.state_dict()[key]) for key, value in before.items())


def test_generators_counters_and_children_are_as_before() -> None:
    def step(module: Any, batch: Any) -> Tensor:
        torch.rand(1, generator=module.noise)
        module.draws.random(), module.numbers.random(), module.data.random()
        module.seen["steps"] += 1
        module.linear.calls, module.linear.fresh = module.linear.calls + 1, True
        return module(batch[0]).sum()  # type: ignore[no-any-return]

    module, trainer = network(step), trainer_with(torch.randn(16, 3))
    module.noise, module.draws, module.numbers = torch.Generator(), random.Random(0), np.random.default_rng(0)
    module.seen, module.linear.calls = Counter(), 0
    module.data = trainer.train_dataloader.dataset.generator = np.random.default_rng(1)
    before = [module.noise.get_state(), module.draws.getstate(), module.numbers.random(), module.data.random()]
    module.numbers, holder = np.random.default_rng(0), trainer.train_dataloader.dataset
    module.data = holder.generator = np.random.default_rng(1)
    _recalibration.recalibrate(trainer, module, 2)
    assert torch.equal(module.noise.get_state(), before[0]) and module.draws.getstate() == before[1]
    assert [module.numbers.random(), holder.generator.random()] == before[2:]
    assert module.linear.calls == 0 and not hasattr(module.linear, "fresh") and module.seen == Counter()


def test_a_later_batch_that_fails_in_the_step_goes_through_forward() -> None:
    def step(module: Any, batch: Any) -> Tensor:
        assert module.calls[-1] == 0
        return module(batch[0]).sum()  # type: ignore[no-any-return]

    images, module, expected = torch.randn(16, 3), network(step), network()
    for each in (module, expected):
        _recalibration.recalibrate(trainer_with(images), each, 3)
    assert all(torch.equal(own, other) for own, other in zip(statistics(module), statistics(expected), strict=True))


def test_no_more_batches_than_an_epoch_has() -> None:
    images, module, expected = torch.randn(16, 3), network(), network()
    trainer = trainer_with(images)
    trainer.num_training_batches = 2
    _recalibration.recalibrate(trainer, module, 4)
    _recalibration.recalibrate(trainer_with(images), expected, 2)
    assert all(torch.equal(own, other) for own, other in zip(statistics(module), statistics(expected), strict=True))


def test_a_step_that_needs_training_mode_has_it_without_dropout() -> None:
    dropped = []

    def step(module: Any, batch: Any) -> Tensor:
        assert module.training, "no losses in eval mode"
        dropped.append(module.dropout.training)
        return module(module.dropout(batch[0]) / 4 + 3).sum()  # type: ignore[no-any-return]

    images, module, expected = torch.randn(16, 3), network(step), network()
    module.dropout = nn.Dropout()
    _recalibration.recalibrate(trainer_with(images), module, 2)
    _recalibration.recalibrate(trainer_with(images / 4 + 3), expected, 2)
    for own, by_hand in zip(statistics(module), statistics(expected), strict=True):
        torch.testing.assert_close(own, by_hand)
    assert len(dropped) == 3 and not any(dropped)
    assert all(entry.training for entry in module.modules())


def test_a_step_that_cannot_be_run_alone_leaves_forward(caplog: pytest.LogCaptureFixture) -> None:
    def fails(module: Any, batch: Any) -> Tensor:
        raise AssertionError("no own step")

    images, module, expected = torch.randn(16, 3), network(fails), network()
    for each in (module, expected):
        _recalibration.recalibrate(trainer_with(images), each, 2)
    assert all(torch.equal(own, other) for own, other in zip(statistics(module), statistics(expected), strict=True))
    assert "of training batches to `forward`" in caplog.text and "(AssertionError: no own step" in caplog.text
    module.forward = None
    words = (
        r"`recalibration_batches` needs to run the module .*\(AssertionError: no own step\), and `forward` failed .*"
        r"`recalibration_batches: 0` does without\.$"
    )
    with pytest.raises(ValueError, match=words):
        _recalibration.recalibrate(trainer_with(images), module, 2)


def test_shuffled_batches_are_the_same_whatever_was_drawn_before() -> None:
    trainer, found = trainer_with(torch.randn(16, 3), shuffle=True), []
    for seed in range(2):
        module = network()
        torch.manual_seed(seed)
        _recalibration.recalibrate(trainer, module, 2)
        found.append(statistics(module))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_processes_average() -> None:
    images = torch.randn(16, 3)
    alone, module = network(), network()
    _recalibration.recalibrate(trainer_with(images), alone, 4)
    _recalibration.recalibrate(trainer_with(images, reduce=lambda value, reduce_op: value + 1.0), module, 4)
    for own, single in zip(statistics(module), statistics(alone), strict=True):
        torch.testing.assert_close(own, single + 1.0)


def test_data_that_give_no_statistics() -> None:
    module = network()
    before = statistics(module)
    with pytest.raises(ValueError, match="`recalibration_batches` reads the first floating-point tensor"):
        _recalibration.recalibrate(trainer_with(torch.arange(8)), module, 1)
    with pytest.warns(UserWarning, match="keep their statistics after this cut: .* NaN or infinite"):
        _recalibration.recalibrate(trainer_with(torch.full((8, 3), torch.nan)), module, 1)
    assert all(torch.equal(own, old) for own, old in zip(statistics(module), before, strict=True))


class AfterCut(Callback):
    """Takes the module as the epoch after the first cut starts."""

    module: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 0):
            self.module = copy.deepcopy(pl_module)


@pytest.mark.parametrize("kind", [IterativeBasisPruning, ChannelPruning, DoublePruning])
def test_a_cut_is_followed_by_it(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    after = AfterCut()
    pruning = kind(
        target=0.3,
        rounds=1,
        warmup_epochs=1,
        tolerance=None,
        recalibration_batches=2,
        **({} if kind is not DoublePruning else {"split": 0.5}),
    )
    callbacks = [pruning, after, *([] if kind is ChannelPruning else [BasisDecomposition()])]
    data = Stripes(batch_size=16)
    make_trainer(tmp_path, callbacks, max_epochs=2).fit(ResidualClassifier(), datamodule=data)
    expected = copy.deepcopy(after.module)
    bsdp.recalibrate_batch_norms(expected, data.examples.tensors[0][:32].split(16))
    for own, by_hand in zip(statistics(after.module), statistics(expected), strict=True):
        torch.testing.assert_close(own, by_hand)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_recalibrates_on_the_same_batches(tmp_path: Path) -> None:
    def run(folder: Path, *others: Callback, ckpt: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0 if ckpt is None else 1)
        module = ResidualClassifier()
        pruning = IterativeBasisPruning(warmup_epochs=1, target=0.4, rounds=1, tolerance=None, recalibration_batches=2)
        trainer = make_trainer(folder, [pruning, BasisDecomposition(), *others], max_epochs=2)
        trainer.fit(module, datamodule=Shuffled(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
        return dict(module.state_dict())

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path, SaveAt("on_train_epoch_end", 0))
    resumed = run(tmp_path, ckpt=tmp_path / "kept.ckpt")
    assert not torch.equal(whole["network.bn0.running_mean"], torch.zeros(12))
    assert differences(whole, resumed) == []


@pytest.mark.parametrize("value", [-1, 1.5])
def test_bad_numbers_of_batches_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`recalibration_batches` must be at least 0 and a whole number"):
        IterativeBasisPruning(warmup_epochs=1, recalibration_batches=value)
