"""`WandbPruningCurves`: an offline run is read back; nothing else imports wandb."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from bsdp.callbacks.pruning_report import PruningReport
from bsdp.callbacks.wandb_curves import WandbPruningCurves
from tests.helpers.pruning_runs import Classifier, OneCut, Stripes, make_trainer
from tests.helpers.wandb_offline import history, read_records, step_metrics, summary

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, no network, no settings of the person who runs the tests, and no run left open."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_home"))
    yield
    wandb.teardown()


def test_an_offline_run_has_curves_axes_tables_and_summary(tmp_path: Path) -> None:
    cut, report = OneCut(), PruningReport(latency_repeats=1, plot=False)
    loggers = [CSVLogger(tmp_path, name="runs"), WandbLogger(project="bsdp", save_dir=tmp_path, offline=True)]
    # Before the callback that prunes: the order must not matter.
    trainer = make_trainer(tmp_path, [WandbPruningCurves(), cut, report], logger=loggers)
    trainer.fit(Classifier(), datamodule=Stripes())
    wandb.teardown()  # unlike `finish`, it waits until the file is written
    records, rounds = read_records(tmp_path), cut.record.rounds

    axes = step_metrics(records)
    assert axes["pruning/val_accuracy_vs_params_kept"] == "pruning/params_kept"
    assert axes["pruning/val_accuracy_vs_macs_kept"] == "pruning/macs_kept"
    assert axes["pruning/rank/*"] == "pruning/round"

    rows = history(records)
    points = [row for row in rows if "pruning/val_accuracy_vs_params_kept" in row]
    assert [row["pruning/val_accuracy_vs_params_kept"] for row in points] == [r.accuracy_best for r in rounds]
    assert [row["pruning/val_accuracy_vs_macs_kept"] for row in points] == [r.accuracy_best for r in rounds]
    for kind in ("params", "macs"):
        assert [row[f"pruning/{kind}_kept"] for row in points] == [cut.record.kept(r, kind) for r in rounds]
    for name in ("0.0", "0.2"):  # layer names hold dots, which must stay in one key
        assert [row[f"pruning/rank/{name}"] for row in points] == [r.ranks[name] for r in rounds]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(steps)

    values = summary(records)
    assert report.summary is not None
    plain = {k: v for k, v in report.summary.items() if isinstance(v, (str, int, float))}
    assert {f"pruning/{key}": value for key, value in plain.items()}.items() <= values.items()
    for name, columns, count in (("result", 4, 6), ("rounds", 13, 3), ("layers", 11, 2)):
        assert (values[f"pruning/{name}/ncols"], values[f"pruning/{name}/nrows"]) == (columns, count)
    (table,) = tmp_path.rglob("media/table/pruning/result_*.table.json")
    data = {row[0]: row[1:] for row in json.loads(table.read_text())["data"]}
    assert data["parameters"][:2] == [report.summary["params_original"], report.summary["params_pruned"]]
    assert data["test_accuracy"][:2] == [report.summary["accuracy_reference"], report.summary["accuracy_pruned"]]
    (picture,) = tmp_path.rglob("media/images/pruning/curves_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


class _Run:
    """The part of a W&B run that the callback uses."""

    def __init__(self, name: str = "one") -> None:
        self.id = name
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        assert not self.rows, "an axis is defined after the first row"
        self.axes[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)


class _Recorder(WandbPruningCurves):
    """Logs to a run that only keeps what it gets."""

    def __init__(self, run: _Run, **options: Any) -> None:
        super().__init__(**options)
        self.run = run

    def setup(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _runs(self, trainer: Any) -> list[Any]:
        return [self.run]


class _Breaks(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("power cut")


def _rounds(run: _Run) -> list[int]:
    return [row["pruning/round"] for row in run.rows if "pruning/round" in row]


def test_a_round_is_logged_once_it_is_over_and_an_interrupted_one_at_once(tmp_path: Path) -> None:
    run, seen = _Run(), []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(_rounds(run))

    trainer = make_trainer(tmp_path, [OneCut(), _Recorder(run, picture=False), Watch()], max_epochs=4)
    trainer.fit(Classifier(), datamodule=Stripes())
    assert seen == [[], [], [0], [0, 1]] and _rounds(run) == [0, 1, 2, 3]

    run = _Run()
    trainer = make_trainer(tmp_path, [OneCut(), _Recorder(run), _Breaks()], max_epochs=4)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(Classifier(), datamodule=Stripes())
    assert _rounds(run) == [0, 1] and run.summary == {}


def test_axes_are_named_after_the_monitor_of_the_real_callback(tmp_path: Path) -> None:
    run = _Run()
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.4, monitor="val_loss", mode="min", tolerance=10.0)
    callbacks = [
        _Recorder(run),
        BasisDecomposition(),
        pruning,
    ]  # the pruning callback has no record before its own hook
    make_trainer(tmp_path, callbacks).fit(Classifier(), datamodule=Stripes())
    assert run.axes["pruning/val_loss_vs_params_kept"] == "pruning/params_kept"
    assert [row["pruning/val_loss_vs_params_kept"] for row in run.rows[:-1]] == [
        r.accuracy_best for r in pruning.record.rounds
    ]
    assert run.summary["pruning/params_kept"] == pruning.record.rounds[-1].params / pruning.record.cost.original()


def test_a_resumed_fit_repeats_nothing_in_the_same_run_and_all_in_another() -> None:
    cut, module = OneCut(known_inputs=False), Classifier()
    cut.setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    for epoch in range(3):
        cut._add_round(module, epoch)
    trainer: Any = SimpleNamespace(callbacks=[cut])
    first = _Recorder(_Run("one"))
    first._log_rounds(trainer, over=True)
    state = json.loads(json.dumps(first.state_dict()))
    for name, expected in (("one", [2]), ("two", [0, 1, 2])):
        resumed = _Recorder(_Run(name))
        resumed.load_state_dict(state)
        resumed._log_rounds(trainer, over=False)
        assert _rounds(resumed.run) == expected


def test_without_macs_validation_or_lines_the_rest_is_logged() -> None:
    cut = OneCut(known_inputs=False, monitor="val/accuracy")
    module = Classifier()
    cut.setup(SimpleNamespace(), module, "fit")  # type: ignore[arg-type]
    cut._add_round(module, 0)
    values = WandbPruningCurves(prefix="p", rank_lines=False)._values(cut.record, cut.record.rounds[0])
    assert values == {"p/round": 0, "p/params_kept": 1.0}
    cut.record.update_last(accuracy_best=0.5)
    values = WandbPruningCurves(prefix="p", rank_lines=False)._values(cut.record, cut.record.rounds[0])
    assert values == {"p/round": 0, "p/params_kept": 1.0, "p/val_accuracy_vs_params_kept": 0.5}


def test_a_trainer_without_wandb_is_refused_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [WandbPruningCurves(), OneCut()])
    with pytest.raises(ValueError, match=r"`WandbLogger`.*CSVLogger.*configs/logger/wandb.yaml"):
        trainer.fit(Classifier(), datamodule=Stripes())
    trainer = make_trainer(tmp_path, [WandbPruningCurves(), OneCut()], fast_dev_run=True)
    trainer.fit(Classifier(), datamodule=Stripes())


def test_the_configuration_adds_logger_and_callback_to_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's own
    monkeypatch.setattr(sys, "argv", ["fit"])  # LightningCLI warns when it is given arguments besides these
    base = tmp_path / "base.yaml"
    base.write_text("trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.ModelSummary\n")
    configs = [str(base), str(ROOT / "configs/logger/csv.yaml"), str(ROOT / "configs/logger/wandb.yaml")]
    args = [word for config in configs for word in ("--config", config)]
    parsed = LightningCLI(BoringModel, run=False, args=args, seed_everything_default=False).config.trainer
    assert [c.class_path.rpartition(".")[2] for c in parsed.callbacks] == ["ModelSummary", "WandbPruningCurves"]
    assert [logger.class_path.rpartition(".")[2] for logger in parsed.logger] == ["CSVLogger", "WandbLogger"]
    assert parsed.logger[1].init_args.offline is True
