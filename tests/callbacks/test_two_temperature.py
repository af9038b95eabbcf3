"""`TwoTemperaturePruning` in real, tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import bsdp
from bsdp.callbacks import BasisDecomposition, PruningReport, TwoTemperaturePruning
from bsdp.rank_patterns import RankPattern, load_pattern, save_pattern
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer, small_network
from tests.helpers.resuming import StopAt, Stopped, differences

FULL = {"0.0": 9, "0.2": 24}


class Learner(Classifier):
    """With momentum; ``val_accuracy`` is given for each epoch, if at all."""

    def __init__(self, values: list[float] | None = None) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.values is None:
            super().validation_step(batch, batch_idx)
        else:
            self.log("val_accuracy", self.values[self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def learner(seed: int = 3, **options: Any) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Learner(**options)


def pruning(**options: Any) -> TwoTemperaturePruning:
    return TwoTemperaturePruning(**{"target": 0.6, "search_epochs": 2, "interval": 1, "tolerance": None, **options})


def fit(
    folder: Path,
    module: LightningModule,
    callback: Callback,
    *others: Callback,
    resume: Path | None = None,
    **options: Any,
) -> Trainer:
    trainer = make_trainer(folder, [callback, BasisDecomposition(), *others], **{"max_epochs": 5, **options})
    weights_only = {} if resume is None else {"weights_only": True}
    trainer.fit(module, datamodule=Stripes(), ckpt_path=resume, **weights_only)
    return trainer


def ranks(module: LightningModule) -> dict[str, int]:
    return {n.removeprefix("network."): p.rank for n, p in bsdp.named_pairs(module).items()}


def pattern_file(folder: Path, ranks: dict[str, int], full: dict[str, int] | None = None) -> str:
    return str(save_pattern(RankPattern(ranks, full or FULL), folder / "given.json"))


def test_a_search_ends_in_a_network_of_the_wanted_size_and_a_structure(tmp_path: Path) -> None:
    module, callback, report = learner(), pruning(), PruningReport(latency_repeats=0, plot=False)
    trainer = fit(tmp_path, module, callback, report)
    record = callback.record
    assert [r.epoch for r in record.rounds] == [0, 3]
    last = record.rounds[-1]
    assert 0.25 < last.params / record.original("params") <= 0.4
    assert last.ranks == ranks(module)
    assert last.params == sum(p.numel() for p in bsdp.fold(module.network).parameters())
    folder = Path(str(trainer.log_dir))
    assert callback.structure_path == folder / "structure.json"
    assert load_pattern(folder / "structure.json") == RankPattern(last.ranks, FULL)
    assert json.loads((folder / "summary.json").read_text())["params_pruned"] == last.params
    saved = bsdp.load(small_network, folder / "pruned.safetensors")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(saved(images), module.eval()(images), rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks for m in module.modules())


class Watch(Callback):
    """Counts the gates that act in training and in validation, by epoch."""

    def __init__(self) -> None:
        self.training: list[int] = []
        self.validation: list[int] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.training.append(hooks(pl_module, "multiply"))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.validation.append(hooks(pl_module, "multiply"))


def hooks(module: nn.Module, name: str) -> int:
    return sum(h.__name__ == name for m in module.modules() for h in m._forward_hooks.values())


def test_gates_act_in_the_search_only(tmp_path: Path) -> None:
    module, watch = learner(), Watch()
    fit(tmp_path, module, pruning(), watch, num_sanity_val_steps=1)
    assert watch.training == [0] * 3 + [2] * 6 + [0] * 6  # three batches an epoch, two layers
    assert watch.validation == [0] + [0] * 2 + [2] * 4 + [0] * 4
    assert hooks(module, "multiply") == 0


def test_the_reference_is_the_model_before_the_search(tmp_path: Path) -> None:
    module, callback = learner(values=[0.5, 0.9, 0.8, 0.495, 0.6]), pruning(tolerance=0.01)
    fit(tmp_path, module, callback)
    record = callback.record
    assert record.reference == pytest.approx(0.5) and record.chosen == 1
    assert record.rounds[1].accuracy_before == pytest.approx(0.8)


def test_logged_values(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Take(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            keys = ("bsdp/gates_open", "bsdp/gates_cost", "bsdp/penalty")
            seen.append({k: float(trainer.logged_metrics[k]) for k in keys if k in trainer.logged_metrics})

    fit(tmp_path, learner(), pruning(learning_rate=4.0), Take(), max_epochs=4)
    assert [len(values) for values in seen[:2]] == [0, 3]
    assert 0.0 < seen[2]["bsdp/gates_open"] < 1.0
    assert 0.0 < seen[2]["bsdp/gates_cost"] <= 1.0


def test_a_fixed_penalty_closes_gates_as_it_says(tmp_path: Path) -> None:
    shares = []
    for penalty in (0.0, 1e6):
        callback = pruning(penalty=penalty, learning_rate=2.0)
        closed: list[float] = []
        fit(tmp_path / str(penalty), learner(), callback, AtCut(callback, closed), max_epochs=4)
        shares += closed
    assert shares[0] > 0.5 > shares[1]


class AtCut(Callback):
    """Takes the share of open gates at the end of the search."""

    def __init__(self, callback: TwoTemperaturePruning, closed: list[float]) -> None:
        self.callback, self.closed = callback, closed

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = self.callback._searcher().basis.gates
        if trainer.current_epoch == 2 and gates is not None:
            self.closed.append(float((gates.theta > 0).float().mean()))


@pytest.mark.parametrize("moment", [("on_train_epoch_end", 1), ("on_validation_end", 2)])
def test_a_search_is_resumed_exactly(tmp_path: Path, moment: Any) -> None:
    whole, callback = learner(), pruning(interval=2)
    fit(tmp_path / "whole", whole, callback)

    class Save(StopAt):
        def _stop(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            if not trainer.sanity_checking and trainer.current_epoch == self.epoch:
                trainer.save_checkpoint(tmp_path / "kept.ckpt", weights_only=False)
            super()._stop(trainer, module, *args)

    stopped = learner()
    with pytest.raises(Stopped):
        fit(tmp_path, stopped, pruning(interval=2), Save(*moment))
    assert hooks(stopped, "multiply") == 0
    module, resumed = learner(seed=4), pruning(interval=2)
    fit(tmp_path / "resumed", module, resumed, resume=tmp_path / "kept.ckpt")
    assert differences(dict(whole.state_dict()), dict(module.state_dict())) == []
    assert resumed.record.rounds == callback.record.rounds
    assert resumed.structure_path is not None and callback.structure_path is not None
    assert load_pattern(resumed.structure_path) == load_pattern(callback.structure_path)


# --- transfer of a structure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["mean_square", "energy"])
def test_a_structure_is_cut_without_a_search(tmp_path: Path, importance: Any) -> None:
    module, report = learner(), PruningReport(latency_repeats=0, plot=False)
    given = pattern_file(tmp_path, {"0.0": 4, "0.2": 6})
    callback = pruning(structure=given, importance=importance, target_kind="macs")
    trainer = fit(tmp_path, module, callback, report, max_epochs=2)
    assert ranks(module) == {"0.0": 4, "0.2": 6}
    record = callback.record
    assert [r.epoch for r in record.rounds] == [0, 1]
    assert record.target == pytest.approx(1.0 - record.rounds[1].params / record.original("params"))
    assert callback.structure_path is None
    assert not (Path(str(trainer.log_dir)) / "structure.json").exists()


def test_a_structure_is_cut_at_once(tmp_path: Path) -> None:
    given = pattern_file(tmp_path, {"0.0": 4, "0.2": 6})
    callback = pruning(structure=given, importance="magnitude", warmup_epochs=0)
    seen: list[dict[str, int]] = []

    class Take(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
            seen.append(ranks(pl_module))

    fit(tmp_path, learner(), callback, Take(), max_epochs=1)
    assert seen[0] == {"0.0": 4, "0.2": 6}


def test_the_weakest_bases_go_in_a_transfer(tmp_path: Path) -> None:
    module = learner()
    fit(tmp_path, module, pruning(structure=pattern_file(tmp_path, {"0.0": 4, "0.2": 6}), importance="magnitude",
        warmup_epochs=0), max_epochs=1)  # fmt: skip
    other = learner()
    bsdp.decompose(other.network, exclude=["3"])
    for name, pair in bsdp.named_pairs(other.network).items():
        kept = bsdp.named_pairs(module.network)[name]
        torch.testing.assert_close(kept.scaling.sigma, pair.scaling.sigma[: kept.rank])  # an SVD's are sorted


def test_a_found_structure_is_transferred_to_other_weights(tmp_path: Path) -> None:
    first = pruning()
    fit(tmp_path / "first", learner(), first)
    module = learner(seed=8)
    second = pruning(structure=str(first.structure_path), tolerance=0.9)
    fit(tmp_path / "second", module, second, max_epochs=3)
    assert ranks(module) == first.record.rounds[-1].ranks


def test_a_transfer_is_resumed_after_its_cut(tmp_path: Path) -> None:
    given = pattern_file(tmp_path, {"0.0": 4, "0.2": 6})
    module, callback = learner(), pruning(structure=given)
    trainer = fit(tmp_path, module, callback, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "kept.ckpt", weights_only=False)
    again = learner(seed=5)
    fit(tmp_path / "again", again, pruning(structure=given), resume=tmp_path / "kept.ckpt", max_epochs=3)
    assert ranks(again) == {"0.0": 4, "0.2": 6}


@pytest.mark.parametrize(
    ("ranks_given", "full", "message"),
    [
        ({"0.0": 4}, {"0.0": 9}, "only the network has the decomposed layer '0.2'"),
        ({"0.0": 4, "0.2": 6}, {"0.0": 9, "0.2": 16}, "layer '0.2' had the full rank 16 and has 24 here"),
        (FULL, FULL, "makes the network no smaller"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused_before_training(
    tmp_path: Path, ranks_given: Any, full: Any, message: str
) -> None:
    callback, watch = pruning(structure=pattern_file(tmp_path, ranks_given, full)), Watch()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, learner(), callback, watch)
    assert watch.training == watch.validation == []


def test_a_missing_file_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    module = learner()
    with pytest.raises(FileNotFoundError, match="no such file"):
        fit(tmp_path, module, pruning(structure=str(tmp_path / "none.json")))
    assert not bsdp.named_pairs(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 0, "tolerance": 0.01}, "`warmup_epochs` must be at least 1 with a `tolerance`"),
        ({"search_epochs": 0}, "`search_epochs` must be at least 1"),
        ({"hard": 0.1}, "`hard` no less than it"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"penalty": -1.0}, "`penalty` must be at least 0"),
        ({"interval": 0}, "`interval` must be at least 1"),
        ({"target": 1.0}, "`target` is a share"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(**options)


def test_a_search_needs_its_epochs_decomposed_layers_and_a_target_in_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 4 epochs"):
        fit(tmp_path, learner(), pruning(), max_epochs=3)
    with pytest.raises(ValueError, match=r"`target=0\.999` is out of reach"):
        fit(tmp_path, learner(), pruning(target=0.999))
    trainer = make_trainer(tmp_path, [pruning()], max_epochs=5)
    with pytest.raises(ValueError, match="found no decomposed layer"):
        trainer.fit(learner(), datamodule=Stripes())
