"""`PruningReport`: what it measures, that it leaves everything as it was, and that it never fails a finished fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from lightning.pytorch import Callback, LightningModule

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from bsdp.callbacks._run_folder import run_folder, unused_path
from bsdp.callbacks.pruning_report import PruningReport, _test_name
from tests.helpers.pruning_runs import Classifier, OneCut, Stripes, make_trainer, small_network

REQUIRED = [
    *("accuracy_reference", "accuracy_pruned", "params_original", "params_pruned", "macs_original", "macs_pruned"),
    *("latency_ms_original", "latency_ms_pruned", "image_size", "seed", "layers"),
]


def _report(folder: Path, module: Any = None, *, cut: OneCut | None = None, **options: Any) -> tuple[Any, Any, Any]:
    """Fit with a report; the module, the trainer and the report."""
    module = Classifier() if module is None else module
    report = PruningReport(**{"latency_repeats": 1, "plot": False, **options})
    trainer = make_trainer(folder, [report, cut or OneCut()])
    trainer.fit(module, datamodule=Stripes())
    return module, trainer, report


def _read(trainer: Any) -> dict[str, Any]:
    def refuse(value: str) -> None:
        raise AssertionError(f"{value} is not JSON")

    text = (run_folder(trainer) / "summary.json").read_text()
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


@pytest.mark.parametrize("spread", [False, True])
def test_the_summary_counts_the_folded_networks(tmp_path: Path, spread: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    module, trainer, report = _report(tmp_path, Classifier(spread=spread), plot=True, latency_batch_size=3)
    summary = _read(trainer)
    assert summary == report.summary
    assert set(REQUIRED) <= set(summary)
    module.load_state_dict(trainer.callbacks[1].record.reference_state)
    networks = {
        "original": bsdp.fold(module if spread else module.network),
        "pruned": bsdp.load(Classifier(spread=spread) if spread else small_network(), tmp_path / "pruned.safetensors"),
    }
    for name, network in networks.items():
        assert summary[f"params_{name}"] == sum(p.numel() for p in network.parameters())
        analysis = FlopCountAnalysis(network.eval(), torch.zeros(1, 1, 8, 8)).unsupported_ops_warnings(False)
        assert summary[f"macs_{name}"] == analysis.uncalled_modules_warnings(False).total()
        assert summary[f"latency_ms_{name}"] > 0
    assert summary["file_bytes_pruned"] == (tmp_path / "pruned.safetensors").stat().st_size
    metadata = {"class_names": ["row"] * 4}  # as in the pruned file
    original = bsdp.save(networks["original"], tmp_path / "original.safetensors", metadata=metadata)
    assert summary["file_bytes_original"] == original.stat().st_size
    assert (summary["image_size"], summary["seed"], summary["latency_batch_size"]) == (8, 7, 3)
    names = ["first.0", "first.2"] if spread else ["0.0", "0.2"]
    assert [layer["name"] for layer in summary["layers"]] == names
    assert [len(summary["rounds"]), summary["chosen_round"]] == [3, 2]
    assert (run_folder(trainer) / "pruning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_real_run_reports_the_accuracy_of_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruning = IterativeBasisPruning(target=0.6, tolerance=0.3, rounds=2, warmup_epochs=4)
    report = PruningReport(latency_repeats=1)
    module = Classifier()
    trainer = make_trainer(tmp_path, [report, BasisDecomposition(), pruning], max_epochs=8)
    trainer.fit(module, datamodule=Stripes())
    summary = _read(trainer)
    fresh = Classifier()
    bsdp.load_checkpoint(fresh, str(run_folder(trainer) / "pruned.ckpt"))
    tester = make_trainer(tmp_path, [], logger=False)
    (result,) = tester.test(fresh, datamodule=Stripes(), verbose=False)
    assert result["test_accuracy"] == summary["accuracy_pruned"]
    fresh.load_state_dict(pruning.record.reference_state or {})
    (result,) = tester.test(fresh, datamodule=Stripes(), verbose=False)
    assert result["test_accuracy"] == summary["accuracy_reference"] != summary["accuracy_pruned"]
    assert summary["params_pruned"] == sum(p.numel() for p in bsdp.fold(module.network).parameters())
    assert summary["met_tolerance"] and summary["reached_target"] and summary["params_kept"] <= 0.4
    printed = capsys.readouterr().out
    assert "test accuracy" in printed and str(run_folder(trainer) / "pruning_curves.png") in printed


class _Snapshot(Callback):
    """Keeps what the report must leave alone."""

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}
        self.modes = [module.training for module in pl_module.modules()]
        self.random = torch.get_rng_state()


@pytest.mark.parametrize("broken", [False, True])
def test_module_data_and_random_state_stay_as_they_were(tmp_path: Path, broken: bool) -> None:
    module, data, before, cut = Classifier(broken=broken), Stripes(), _Snapshot(), OneCut()
    parameters = dict(module.named_parameters())
    trainer = make_trainer(tmp_path, [PruningReport(latency_repeats=1, plot=False), cut, before])
    trainer.fit(module, datamodule=data)
    assert module.trainer is trainer and data.trainer is trainer
    after = module.state_dict()
    assert list(after) == list(before.state)
    assert all(torch.equal(after[key], before.state[key]) for key in after)
    assert [m.training for m in module.modules()] == before.modes
    assert torch.equal(torch.get_rng_state(), before.random)
    assert module.network[3].weight is parameters["network.3.weight"]
    assert "configure_callbacks" not in vars(module)


def test_a_failing_test_step_costs_the_accuracies_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, trainer, _ = _report(tmp_path, Classifier(broken=True))
    summary = _read(trainer)
    assert summary["accuracy_reference"] is None and summary["accuracy_pruned"] is None
    assert summary["latency_ms_pruned"] > 0
    assert len([note for note in summary["notes"] if "RuntimeError: no [good] test" in note]) == 2
    assert "no [good] test" in capsys.readouterr().out


class _Untested(Classifier):
    test_step = LightningModule.test_step  # type: ignore[assignment]


def test_without_a_test_step_the_accuracies_are_null(tmp_path: Path) -> None:
    _, trainer, _ = _report(tmp_path, _Untested())
    summary = _read(trainer)
    assert summary["accuracy_pruned"] is None
    assert summary["notes"] == ["the models were not tested: _Untested has no `test_step`"]


def test_loaders_given_to_fit_mean_that_there_is_no_test_data(tmp_path: Path) -> None:
    data = Stripes()
    data.setup("fit")
    trainer = make_trainer(tmp_path, [PruningReport(latency_repeats=0, plot=False), OneCut()])
    trainer.fit(Classifier(), data.train_dataloader(), data.val_dataloader())
    summary = _read(trainer)
    assert summary["accuracy_pruned"] is None and summary["latency_ms_original"] is None
    assert summary["notes"] == ["the models were not tested: Classifier has no `test_dataloader`"]


class _Companion(Callback):
    def on_test_start(self, trainer: Any, pl_module: LightningModule) -> None:
        raise AssertionError("a callback of the module acts in the report's test")


class _Talkative(Classifier):
    """Uses its logger in the test and brings a callback along."""

    def configure_callbacks(self) -> list[Callback]:
        return [_Companion()]

    def on_test_epoch_end(self) -> None:
        assert self.logger is not None
        self.logger.experiment.add_image("picture", torch.zeros(1))
        self.log("dice", 0.5)


def test_modules_that_log_by_hand_or_bring_callbacks_are_tested(tmp_path: Path) -> None:
    _, trainer, _ = _report(tmp_path, _Talkative(), test_metric="dice")
    summary = _read(trainer)
    assert (summary["test_metric"], summary["accuracy_pruned"], summary["notes"]) == ("dice", 0.5, [])
    assert not list(tmp_path.rglob("version_1"))


def test_an_unknown_test_metric_is_explained(tmp_path: Path) -> None:
    _, trainer, _ = _report(tmp_path, test_metric="f1")
    notes = _read(trainer)["notes"]
    assert "the test logs ['test_accuracy', 'test_loss'], not 'f1': name one of them as `test_metric`" in notes[0]


def test_a_loss_is_reported_as_a_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, trainer, _ = _report(tmp_path, cut=OneCut(monitor="val_loss", mode="min"))
    summary = _read(trainer)
    assert summary["test_metric"] == "test_loss"
    assert summary["accuracy_pruned"] > summary["accuracy_reference"]
    printed = capsys.readouterr().out
    assert "test loss" in printed and "accuracy" not in printed


def test_an_unknown_input_costs_macs_and_latency_only(tmp_path: Path) -> None:
    _, trainer, _ = _report(tmp_path, cut=OneCut(known_inputs=False))
    summary = _read(trainer)
    nulls = {key for key in REQUIRED if summary[key] is None} - {"seed"}
    assert nulls == {"macs_original", "macs_pruned", "latency_ms_original", "latency_ms_pruned", "image_size"}
    assert "set `example_input_array`" in summary["notes"][0]


class _LateInput(OneCut):
    """Knows the input's shape although the cost was measured without."""

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.record.input_shapes = [[1, 1, 8, 8]]


def test_macs_the_record_lacks_are_counted(tmp_path: Path) -> None:
    _, trainer, _ = _report(tmp_path, cut=_LateInput(known_inputs=False))
    counted = _read(trainer)
    _, trainer, _ = _report(tmp_path / "other")
    recorded = _read(trainer)
    assert counted["macs_original"] == recorded["macs_original"]
    assert counted["macs_pruned"] == recorded["macs_pruned"] < recorded["macs_original"]


def test_a_trainer_in_which_nothing_prunes_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [PruningReport()])
    with pytest.raises(ValueError, match=r"`PruningReport`.*IterativeBasisPruning"):
        trainer.fit(Classifier(), datamodule=Stripes())
    assert trainer.global_step == 0


def test_a_fast_dev_run_reports_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [report := PruningReport(), OneCut()], fast_dev_run=True)
    trainer.fit(Classifier(), datamodule=Stripes())
    assert report.summary is None and not list(tmp_path.rglob("summary*.json"))


@pytest.mark.parametrize("option", ["latency_batch_size", "latency_repeats"])
def test_negative_settings_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"`{option}`"):
        PruningReport(**{option: -1})


def test_the_test_metric_is_named_after_the_monitor() -> None:
    changed = {
        "val_accuracy": "test_accuracy",
        "val/acc": "test/acc",
        "validation_f1": "test_f1",
        "valid_loss": "test_loss",
    }
    assert {name: _test_name(name) for name in changed} == changed
    assert [_test_name(name) for name in ("eval_loss", "value")] == ["eval_loss", "value"]


def test_the_run_folder_is_that_of_the_csv_logger_or_the_root(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [])
    assert run_folder(trainer) == tmp_path / "runs" / "version_0"
    assert run_folder(make_trainer(tmp_path, [], logger=False)) == tmp_path


def test_files_of_an_earlier_run_stay_and_those_of_a_resumed_one_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert unused_path(path) == path
    path.touch()
    (tmp_path / "summary-v1.json").touch()
    assert unused_path(path) == tmp_path / "summary-v2.json"
    trainer = make_trainer(tmp_path, [], logger=False)
    assert unused_path(path, trainer=trainer) == tmp_path / "summary-v2.json"
    trainer.ckpt_path = tmp_path / "checkpoints" / "last.ckpt"
    assert unused_path(path, trainer=trainer) == path
    trainer.ckpt_path = tmp_path.parent / "last.ckpt"
    assert unused_path(path, trainer=trainer) == tmp_path / "summary-v2.json"
