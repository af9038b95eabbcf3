"""`ChannelPruning` with budgets of latency."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bsdp
from bsdp.callbacks import BasisDecomposition, ChannelPruning, IterativeBasisPruning, PruningReport
from bsdp.callbacks import _latency as latency
from tests.callbacks.test_channel_resume import go, outcome
from tests.helpers.channel_runs import ResidualClassifier, ResidualNet, check, fit
from tests.helpers.latencies import table_of, widths_of
from tests.helpers.pruning_runs import Stripes, make_trainer
from tests.helpers.resuming import SaveAt, differences

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
EXAMPLE = torch.zeros(1, 1, 8, 8)
BUDGET = {"target_kind": "latency", "target": 0.5}


def hand_made(**options: Any) -> bsdp.ChannelLatencyTable:
    return widths_of(ResidualNet(), EXAMPLE, fixed=100, **options)


def test_a_run_keeps_the_budget_of_a_given_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(latency, "measure_channel_latency_table")
    path, module = hand_made().save(tmp_path / "table.json"), ResidualClassifier()
    report = PruningReport(latency_repeats=0, plot=False)
    trainer, callback, watch = fit(module, tmp_path, report, pruning={**BUDGET, "latency_table": str(path)})
    check(module, callback, watch)
    last = callback.record.rounds[-1]
    assert last.latency == hand_made().of(module.network) <= 0.5 * hand_made().original_ns
    assert trainer.callback_metrics["bsdp/latency"] == last.latency
    assert report.summary is not None and report.summary["latency_kept"] == last.latency / hand_made().original_ns
    assert callback.settings.ranking_of_channels == "per_cost"
    assert not list(tmp_path.rglob("latency_table*.json"))


def test_the_table_is_measured_once_and_a_resumed_run_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def measure(network: Any, example: tuple[torch.Tensor, ...], **options: Any) -> bsdp.ChannelLatencyTable:
        calls.append({"shape": tuple(example[0].shape), "channels": network.stem.out_channels, **options})
        return hand_made()

    monkeypatch.setattr(latency, "measure_channel_latency_table", measure)
    options: dict[str, Any] = {"pruning": {**BUDGET, "latency_batch_size": 4, "exclude": ["head"]}}
    stop = SaveAt("on_train_epoch_end", 2, go_on=True)  # after a cut
    module, callback, trainer, _ = go(tmp_path / "whole", "taylor_2019", stop, **options)
    expected = outcome(module, callback, trainer)
    assert calls == [{"shape": (1, 1, 8, 8), "channels": 12, "batch_size": 4, "exclude": ("head",)}]
    (file,) = (tmp_path / "whole").rglob("latency_table.json")
    assert bsdp.ChannelLatencyTable.load(file) == hand_made() == callback.latency.table
    assert [entry["latency"] for entry in expected["rounds"]] == sorted(
        (entry["latency"] for entry in expected["rounds"]), reverse=True
    )
    monkeypatch.delattr(latency, "measure_channel_latency_table")
    (checkpoint,) = (tmp_path / "whole").rglob("kept.ckpt")
    # Another table now lies where the run is told to look, or none; it goes on with its own.
    other = replace(hand_made(), fixed_ns=7).save(tmp_path / "other.json")
    for name, table in (("resumed", None), ("other", str(other)), ("gone", str(tmp_path / "gone.json"))):
        options = {"pruning": {**BUDGET, "latency_table": table}}
        module, callback, trainer, _ = go(tmp_path / name, "taylor_2019", ckpt=checkpoint, **options)
        assert differences(expected, outcome(module, callback, trainer)) == []
        assert callback.latency.table == hand_made()


def test_a_table_is_measured_in_earnest(tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, _ = fit(module, tmp_path, pruning={"target_kind": "latency", "target": 0.02}, max_epochs=3)
    assert callback.latency.table.layers.keys() == hand_made().layers.keys()
    assert callback.record.kept(callback.record.rounds[-1], "latency") <= 0.98


def test_a_fast_dev_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(latency, "measure_channel_latency_table")
    callback = ChannelPruning(target_kind="latency", tolerance=None)
    make_trainer(tmp_path, [callback], fast_dev_run=True).fit(ResidualClassifier(), datamodule=Stripes())
    assert callback.latency.table is None and not list(tmp_path.rglob("*.json"))


def test_a_file_that_is_not_there_is_missed_before_data_are_read(tmp_path: Path) -> None:
    class Unread(Stripes):
        def train_dataloader(self) -> Any:
            raise AssertionError("the data were read")

    callbacks = [
        ChannelPruning(target_kind="latency", latency_table=str(tmp_path / "gone.json")),
        IterativeBasisPruning(target_kind="latency", latency_table=str(tmp_path / "gone.json")),
    ]
    for callback, others in zip(callbacks, ([], [BasisDecomposition()]), strict=True):
        with pytest.raises(FileNotFoundError, match="`latency_table`: no such file"):
            make_trainer(tmp_path, [callback, *others]).fit(ResidualClassifier(), datamodule=Unread())


def test_another_fit_measures_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [hand_made(), replace(hand_made(), fixed_ns=200)]
    monkeypatch.setattr(latency, "measure_channel_latency_table", lambda *_, **__: tables.pop(0))
    callback = ChannelPruning(target_kind="latency", target=0.3, rounds=1, tolerance=None, save_pruned=False)
    for fixed in (100, 200):
        trainer = make_trainer(tmp_path, [callback], max_epochs=2)
        trainer.fit(ResidualClassifier(), datamodule=Stripes())
        assert callback.latency.table is not None and callback.latency.table.fixed_ns == fixed
    make_trainer(tmp_path, [callback], fast_dev_run=True).fit(ResidualClassifier(), datamodule=Stripes())
    assert callback.latency.table is None


def test_a_run_of_another_budget_goes_on_with_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = {"before": ("on_train_epoch_end", 1), "after": ("on_train_epoch_end", 2)}
    saving = [SaveAt(*moment, file=f"{key}.ckpt", go_on=True) for key, moment in moments.items()]  # type: ignore[arg-type]
    go(tmp_path, "taylor_2019", *saving, pruning={"target_kind": "macs", "target": 0.5})
    table = str(hand_made().save(tmp_path / "table.json"))
    for key in moments:
        module, callback, *_ = go(
            tmp_path / key, "taylor_2019", ckpt=tmp_path / f"{key}.ckpt", pruning={**BUDGET, "latency_table": table}
        )
        rounds = callback.record.rounds
        assert rounds[0].latency == hand_made().original_ns
        assert all(entry.latency is not None for entry in rounds)
        assert rounds[-1].latency == hand_made().of(module.network) <= 0.5 * hand_made().original_ns
    monkeypatch.delattr(latency, "measure_channel_latency_table")
    with pytest.raises(ValueError, match="the times of the original network are missing"):
        go(tmp_path / "none", "taylor_2019", ckpt=tmp_path / "after.ckpt", pruning=BUDGET)


def test_a_pruned_module_can_be_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure_channel_latency_table", lambda net, example, **_: widths_of(net, example[0]))
    module = ResidualClassifier()
    fit(module, tmp_path, pruning={**BUDGET, "target": 0.3})
    before = module.network.stem.out_channels
    _, callback, _ = fit(module, tmp_path, pruning={**BUDGET, "target": 0.2, "criterion": "l1"})
    assert callback.latency.table.layers["stem"].outputs[-1] == before
    assert callback.record.kept(callback.record.rounds[-1], "latency") <= 0.8


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    path, early = tmp_path / "table.json", SaveAt("on_train_batch_start", 0)

    def refused(message: str, table: Any, *, decomposition: Any = None, **options: Any) -> None:
        if table is not None:
            table.save(path, force=True)
        pruning = {**BUDGET, "latency_table": str(path), **options}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(ResidualClassifier(), tmp_path, early, pruning=pruning, decomposition=decomposition)

    refused("`latency_table`: no such file", None)
    refused(r"`target=0.5` is out of reach: .* of the latency would be gone", replace(hand_made(), fixed_ns=10**6))
    refused("only the network has", replace(hand_made(), layers={}))
    refused("`target_kind: latency` of channels counts with times of plain layers", hand_made(), decomposition={})
    refused("leave `BasisDecomposition` out", None, decomposition={}, latency_table=None)
    network = ResidualNet()
    bsdp.decompose(network)
    refused("times by 'ranks', which goes with `IterativeBasisPruning`", table_of(network))
    refused("`latency_table` goes with `target_kind: latency`, not 'macs'", hand_made(), target_kind="macs")
    with pytest.raises(ValueError, match="`latency_batch_size` must be at least 1"):
        ChannelPruning(latency_batch_size=0)


def test_a_table_of_another_input_size_warns(tmp_path: Path) -> None:
    path = replace(hand_made(), input_shapes=((1, 1, 64, 64),)).save(tmp_path / "table.json")
    with pytest.warns(UserWarning, match=r"inputs of \[1, 64, 64\], .* gets \[1, 8, 8\].*--by widths"):
        fit(ResidualClassifier(), tmp_path, pruning={**BUDGET, "latency_table": str(path)})


def test_bases_do_not_take_times_by_width(tmp_path: Path) -> None:
    path = hand_made().save(tmp_path / "table.json")
    callback = IterativeBasisPruning(target_kind="latency", latency_table=str(path), tolerance=None)
    with pytest.raises(ValueError, match="times by 'widths', which goes with `ChannelPruning`"):
        make_trainer(tmp_path, [callback, BasisDecomposition()]).fit(ResidualClassifier(), datamodule=Stripes())
