"""`CompensatedPruning` in real fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.callbacks import BasisDecomposition, CompensatedPruning, PruningReport
from bsdp.channel_group import UntraceableError
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer, small_network


def run(folder: Path, callbacks: list[Any], *, data: Any = None, epochs: int = 3, **options: Any) -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    trainer = make_trainer(folder, callbacks, max_epochs=epochs, **options)
    trainer.fit(module, datamodule=Stripes() if data is None else data)
    return module


def test_prunes_once_after_the_fit(tmp_path: Path) -> None:
    callback, report = CompensatedPruning(tolerance=0.1, data_fraction=1.0), PruningReport(latency_repeats=0)
    module = run(tmp_path, [report, callback])
    first, second = callback.record.rounds
    assert callback.record.chosen == 1
    assert second.params < first.params
    assert sum(second.channels.values()) < sum(first.channels.values()) == 40
    assert module.network[0][0].out_channels == second.channels["0.0"]
    assert second.accuracy_after is not None and callback.record.reference is not None
    assert second.accuracy_after >= callback.record.reference - 0.1

    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert summary["params_pruned"] == sum(p.numel() for p in module.parameters()) == second.params
    assert summary["accuracy_pruned"] == pytest.approx(second.accuracy_after)  # test and validation are the same here
    details = summary["compensation"]
    assert details["kept"] == {"0.0": [second.channels["0.0"], 16], "0.2": [second.channels["0.2"], 24]}
    assert details["value"] == pytest.approx(second.accuracy_after)
    assert 2 <= details["evaluations"] <= 13

    images = torch.randn(5, 1, 8, 8)
    loaded = bsdp.load(Classifier().network, callback.weights_path)
    torch.testing.assert_close(loaded(images), module.network(images))
    other = Classifier()
    bsdp.load_checkpoint(other, callback.checkpoint_path)
    torch.testing.assert_close(other(images), module(images))


class WithoutForward(LightningModule):
    """Its steps call the network in it; so must whoever wants its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_module_without_a_forward_of_its_own(tmp_path: Path) -> None:
    callback = CompensatedPruning(tolerance=0.2)
    make_trainer(tmp_path, [callback], max_epochs=2).fit(WithoutForward(), datamodule=Stripes())
    assert callback.record.rounds[1].params < callback.record.rounds[0].params


def test_starts_from_the_best_epoch_and_only_removes(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", [])
    callback = CompensatedPruning(tolerance=0.0, max_ratio=0.01)  # nothing can go
    module = run(tmp_path / "pruned", [callback])
    best = max(r.accuracy_best or 0.0 for r in callback.record.rounds)
    assert callback.record.reference == pytest.approx(best)
    assert [tuple(p.shape) for p in module.parameters()] == [tuple(p.shape) for p in plain.parameters()]
    state = callback.record.reference_state
    assert state is not None
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_a_target_without_labels(tmp_path: Path) -> None:
    callback = CompensatedPruning(tolerance=None, target=0.5)
    run(tmp_path, [callback], data=Unlabelled())
    kept = callback.record.kept(callback.record.rounds[-1], "params")
    assert kept is not None and 0.3 < kept <= 0.5
    assert callback.record.chosen == 1


def test_a_finished_run_is_not_pruned_again(tmp_path: Path) -> None:
    callback = CompensatedPruning(tolerance=0.3)
    run(tmp_path / "first", [callback], epochs=2)
    widths = callback.record.rounds[-1].channels
    again = CompensatedPruning(tolerance=0.3)
    trainer = make_trainer(tmp_path / "second", [again], max_epochs=4)
    module = Classifier()
    bsdp.load_checkpoint(module, callback.checkpoint_path)
    trainer.fit(module, datamodule=Stripes(), ckpt_path=callback.checkpoint_path, weights_only=True)
    assert trainer.current_epoch == 4
    assert again.record.rounds[-1].channels == widths
    assert module.network[0][0].out_channels == widths["0.0"]


class Unlabelled(Stripes):
    """Validation batches with one number too many."""

    def val_dataloader(self) -> Any:
        images, labels = self.examples.tensors
        return DataLoader(TensorDataset(images, labels, labels), 48)


class Swapping(nn.Sequential):
    """A channel split that the graph does not follow."""

    def forward(self, images: Tensor) -> Tensor:
        first, second = self[0](images).view(len(images), 2, 2, -1).transpose(1, 2).flatten(1).chunk(2, 1)
        output: Tensor = self[1](torch.cat([second, first.flip(1)], 1))
        return output


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no validation": ({"trainer": {"limit_val_batches": 0}}, Stripes, "no validation loader"),
    "no labels": ({}, Unlabelled, r"\(images, labels\)"),
    "decomposed": ({"callbacks": [BasisDecomposition()]}, Stripes, "decomposed"),
    "target": ({"target": 0.97}, Stripes, "out of reach"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(case: str, tmp_path: Path) -> None:
    options, data, words = REFUSED[case]
    arguments = {key: value for key, value in options.items() if key not in ("callbacks", "trainer")}
    module = Classifier()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    callbacks = [CompensatedPruning(**arguments), *options.get("callbacks", [])]
    trainer = make_trainer(tmp_path, callbacks, **options.get("trainer", {}))
    with pytest.raises(ValueError, match=words):
        trainer.fit(module, datamodule=data())
    assert trainer.global_step == 0
    if case != "decomposed":
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_untraceable_is_refused_before_training(tmp_path: Path) -> None:
    module = Classifier()
    module.network = Swapping(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 8)), nn.Linear(8, 4))
    trainer = make_trainer(tmp_path, [CompensatedPruning()])
    with pytest.raises(UntraceableError):
        trainer.fit(module, datamodule=Stripes())
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tolerance": None}, "`target`"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"data_fraction": 0.0}, "data_fraction"),
        ({"max_ratio": 1.0}, "max_ratio"),
        ({"max_positions": 0}, "max_positions"),
        ({"target": 1.2}, "target"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CompensatedPruning(**arguments)
