"""Distillation inside `fit`: the same run as with the loss written into the module, for all ways to build a module."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning
from bsdp.distillation import SelfDistillation
from tests.helpers.channel_runs import ResidualClassifier
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Classifier, Manual, Stripes, make_trainer

WEIGHT, TEMPERATURE = 0.7, 3.0
DISTILLING = {"distillation": WEIGHT, "distillation_temperature": TEMPERATURE}


class Scaled(MixedPrecision):
    """The gradient scaler of mixed precision, in float32."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu", scaler=None)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


class Written(Classifier):
    """Has the loss of distillation in its training step, once it has a teacher."""

    def __init__(self, *, accumulated: int = 1) -> None:
        super().__init__()
        self.teachers: list[nn.Module] = []  # in a list, so that it is no child
        self.accumulated = accumulated

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        if not self.teachers or self.current_epoch == 0:
            return loss
        with torch.no_grad():
            target = self.teachers[0](batch[0])
        return (1 - WEIGHT) * loss + WEIGHT * bsdp.distillation_loss(logits, target, TEMPERATURE)


class KeepTeacher(Callback):
    """Copies the network after the first validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0 and not trainer.sanity_checking:
            self.teacher = copy.deepcopy(pl_module.network).eval()
            if isinstance(pl_module, Written):
                pl_module.teachers = [self.teacher]


def fit(
    module: LightningModule, folder: Path, *others: Callback, pruning: Any = None, model: Any = None, **options: Any
) -> Any:
    """Fit with two cuts; returns the pruning callback."""
    pruning = pruning or IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None, **DISTILLING)
    callbacks = [pruning, *others]
    if not isinstance(pruning, ChannelPruning):
        callbacks.insert(1, BasisDecomposition())
    trainer = make_trainer(folder, callbacks, **{"max_epochs": 3, **options})
    trainer.fit(module if model is None else model, datamodule=Stripes(batch_size=16))
    return pruning


def run(kind: type[Classifier], folder: Path, *others: Callback, pruning: Any = None, **options: Any) -> Any:
    """Weights and rounds of a run from the same start."""
    torch.manual_seed(0)
    module = kind()
    pruning = fit(module, folder, *others, pruning=pruning, **options)
    return dict(module.state_dict()), pruning.record.rounds


SAME: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 4}, {"accumulate_grad_batches": 2, "scaled": True}]


def plain() -> IterativeBasisPruning:
    return IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None)


@pytest.mark.parametrize(
    "options",
    slow_but([SAME[0], SAME[2]], SAME),
    ids=["plain", "accumulated", "accumulated_and_scaled"],
)
def test_the_same_run_as_with_the_loss_written_out(options: dict[str, Any], tmp_path: Path) -> None:
    scaled = options.pop("scaled", False)
    results = []
    for kind, pruning in ((Classifier, None), (Written, plain()), (Classifier, plain())):
        plugins = {"plugins": [Scaled()]} if scaled else {}
        results.append(run(kind, tmp_path, KeepTeacher(), pruning=pruning, **options, **plugins))
    (state, rounds), (expected, expected_rounds), (without, _) = results
    assert [r.ranks for r in rounds] == [r.ranks for r in expected_rounds]
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
    key = "network.3.weight"
    assert (without[key] - expected[key]).abs().max() > 3e-3


def test_weight_0_leaves_a_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(Classifier, tmp_path, pruning=plain())
    monkeypatch.setattr(SelfDistillation, "__init__", None)  # it is not even made
    pruning = IterativeBasisPruning(
        warmup_epochs=1, target=0.5, rounds=2, tolerance=None, distillation=0.0, distillation_temperature=9
    )
    state, _ = run(Classifier, tmp_path, pruning=pruning)
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


class Spread(Classifier):
    """Has no child that holds all parameters."""

    def __init__(self) -> None:
        super().__init__(spread=True)


def slow(*values: str) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("kind", ["manual", "spread", "network", *slow("network in place", "module", "spread module")])
def test_all_kinds_of_modules(kind: str, tmp_path: Path) -> None:
    expected, expected_rounds = run(Classifier, tmp_path)
    torch.compiler.reset()
    torch.manual_seed(0)
    module: Any = Manual() if kind == "manual" else Spread() if kind.startswith("spread") else Classifier()
    model: Any = module
    if kind == "network":
        module.network = torch.compile(module.network, backend="eager")
    elif kind == "network in place":
        module.network.compile(backend="eager")
    elif kind.endswith("module"):
        model = torch.compile(module, backend="eager")
    pruning = fit(module, tmp_path, model=model)
    assert [r.params for r in pruning.record.rounds] == [r.params for r in expected_rounds]
    for value, own in zip(expected.values(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)
    assert pruning.pruner.distillation.seen >= 12
    assert not module._forward_hooks and not getattr(module, "network", module)._forward_hooks


@pytest.fixture
def one_process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes down what a distributed run of one process sets up."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")
@pytest.mark.usefixtures("one_process_group")
def test_ddp_calls_the_module_itself_for_a_whole_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Spread()
    pruning = fit(module, tmp_path, strategy="ddp", use_distributed_sampler=False)
    assert pruning.pruner.distillation.seen == 1 + 12 and pruning.pruner.distillation.name == ""
    torch.distributed.destroy_process_group()
    expected, _ = run(Classifier, tmp_path)
    for value, own in zip(expected.values(), module.state_dict().values(), strict=True):
        torch.testing.assert_close(own, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChannelPruning(target=0.5, rounds=2, tolerance=None, **DISTILLING),
        lambda: ChannelPruning(criterion="channel_scaling", target=0.5, rounds=2, tolerance=None, **DISTILLING),
        lambda: DoublePruning(target=0.5, rounds=2, warmup_epochs=1, split=0.5, tolerance=None, **DISTILLING),
    ],
    ids=["channels", "factors", "double"],
)
def test_the_teacher_has_all_channels(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, images, keep = ResidualClassifier(), torch.randn(5, 1, 8, 8), KeepTeacher()

    class See(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                self.teacher = pruning.pruner.distillation._distiller.teacher

    see, pruning = See(), make()
    fit(module, tmp_path, keep, see, pruning=pruning)
    torch.testing.assert_close(see.teacher(images), keep.teacher(images))
    assert (
        module.network.stem.weight.shape[0] < 12 or pruning.record.rounds[-1].params < pruning.record.rounds[0].params
    )
    assert pruning.pruner.distillation._distiller is None  # let go at the end


class Direct(Classifier):
    """Calls its parts one by one."""

    def __init__(self) -> None:
        super().__init__(spread=True)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.rest(self.first(images))
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.rest(self.first(batch[0])), batch[1])


class WithDict(Classifier):
    """Its network returns a dict, a part of it class scores."""

    def __init__(self) -> None:
        super().__init__()

        class Wrapped(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.body = network

            def forward(self, images: Tensor) -> dict[str, Tensor]:
                return {"logits": self.body(images)}

        self.network = Wrapped(self.network)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.network(images)["logits"]  # type: ignore[call-overload]
        return output


@pytest.mark.parametrize(
    ("kind", "module", "message"),
    [
        (Direct, None, r"did not call the Direct itself: call it there \(`self\(...\)`"),
        (WithDict, None, r"'network' returned a dict.*`distillation_module`"),
        (Classifier, "network.0", r"'network.0' returned a tensor of shape \[16, 24, 8, 8\]"),
        (Classifier, "body", "`distillation_module` must be the dotted name .* got 'body'"),
    ],
)
def test_what_gives_no_class_scores_is_refused_at_once(
    kind: type[Classifier], module: str | None, message: str, tmp_path: Path
) -> None:
    pruning = IterativeBasisPruning(
        warmup_epochs=1, target=0.5, rounds=2, tolerance=None, distillation_module=module, **DISTILLING
    )
    with pytest.raises(ValueError, match=message):
        fit(kind(), tmp_path, pruning=pruning)
    assert len(pruning.record.rounds) < 2


def test_a_named_module_is_taken(tmp_path: Path) -> None:
    expected, _ = run(Classifier, tmp_path)
    pruning = IterativeBasisPruning(
        warmup_epochs=1, target=0.5, rounds=2, tolerance=None, distillation_module="network.body", **DISTILLING
    )
    state, _ = run(WithDict, tmp_path, pruning=pruning)
    for value, own in zip(expected.values(), state.values(), strict=True):
        torch.testing.assert_close(own, value)


def test_epochs_that_are_added_to_a_finished_run_learn_from_the_same_teacher(tmp_path: Path) -> None:
    first = fit(Classifier(), tmp_path)
    saved = torch.load(first.checkpoint_path, weights_only=True)["callbacks"]["IterativeBasisPruning"]
    assert saved["record"]["reference_state"] is not None and saved["record"]["chosen"] == 2
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None, **DISTILLING)
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], max_epochs=4)
    trainer.fit(Classifier(), datamodule=Stripes(batch_size=16), ckpt_path=first.checkpoint_path, weights_only=True)
    assert pruning.pruner is not None and pruning.pruner.distillation is not None
    assert pruning.pruner.distillation.seen == 6
