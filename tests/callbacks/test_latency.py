"""`IterativeBasisPruning` with latency tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning, PruningReport
from bsdp.callbacks import _latency as latency
from tests.helpers.latencies import table_of
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer, small_network
from tests.helpers.resuming import SaveAt, Stopped

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def hand_made(*, speed: float = 1.0, slow: tuple[str, ...] = ("0.0",)) -> bsdp.LatencyTable:
    network = small_network()
    bsdp.decompose(network)
    table = table_of(network, slow=slow, speed=speed, fixed=200)
    return replace(table, input_shapes=((1, 1, 8, 8),))


def pruning(**options: Any) -> IterativeBasisPruning:
    settings = {
        "target": 0.3,
        "target_kind": "latency",
        "rounds": 2,
        "warmup_epochs": 1,
        "tolerance": None,
        "save_pruned": False,
    }
    return IterativeBasisPruning(**{**settings, **options})


def fit(folder: Path, callback: IterativeBasisPruning, *others: Any, ckpt: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    module = Classifier()
    trainer = make_trainer(folder, [callback, BasisDecomposition(), *others], **options)
    trainer.fit(module, datamodule=Stripes(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    return module, trainer


def test_a_run_keeps_the_budget_of_a_given_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(latency, "measure_latency_table")
    path = hand_made().save(tmp_path / "table.json")
    callback = pruning(latency_table=str(path))
    module, trainer = fit(tmp_path, callback, PruningReport(latency_repeats=0, plot=False))
    record = callback.record
    assert record.kept(record.rounds[-1], "latency") <= 0.7  # type: ignore[operator]
    assert next(pair.rank for pair in bsdp.named_pairs(module).values()) == 9
    logged = trainer.callback_metrics
    assert logged["bsdp/latency"] == record.rounds[-1].latency
    assert logged["bsdp/latency_kept"] == pytest.approx(record.kept(record.rounds[-1], "latency"))
    report = next(c for c in trainer.callbacks if isinstance(c, PruningReport))
    assert report.summary is not None and report.summary["latency_kept"] == record.kept(record.rounds[-1], "latency")
    assert not list(tmp_path.rglob("latency_table.json"))


def test_the_table_is_measured_once_and_saved_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def measure(network: torch.nn.Module, example: tuple[torch.Tensor, ...], **options: Any) -> bsdp.LatencyTable:
        calls.append({"shape": tuple(example[0].shape), **options})
        return hand_made()

    monkeypatch.setattr(latency, "measure_latency_table", measure)
    callback = pruning(latency_batch_size=4)
    with pytest.raises(Stopped):
        fit(tmp_path, callback, SaveAt("on_train_epoch_end", 1))
    assert calls == [{"shape": (1, 1, 8, 8), "batch_size": 4}]
    (file,) = tmp_path.rglob("latency_table.json")
    assert bsdp.LatencyTable.load(file) == hand_made() == callback.latency.table
    monkeypatch.delattr(latency, "measure_latency_table")
    # Another table now lies where the run is told to look; it goes on with its own.
    other = hand_made(speed=3.0, slow=()).save(tmp_path / "other.json")
    resumed = pruning(latency_table=str(other))
    module, _ = fit(tmp_path, resumed, ckpt=tmp_path / "kept.ckpt")
    assert resumed.latency.table == hand_made()
    elsewhere = pruning(latency_table=str(tmp_path / "gone.json"))
    fit(tmp_path / "elsewhere", elsewhere, ckpt=tmp_path / "kept.ckpt")
    assert elsewhere.latency.table == hand_made()
    monkeypatch.setattr(latency, "measure_latency_table", measure, raising=False)
    whole = pruning()
    expected, _ = fit(tmp_path / "whole", whole)
    assert [r.ranks for r in resumed.record.rounds] == [r.ranks for r in whole.record.rounds]
    assert [r.latency for r in resumed.record.rounds] == [r.latency for r in whole.record.rounds]
    limits = [pair.pair_limit for pair in bsdp.named_pairs(module).values()]
    assert limits == [pair.pair_limit for pair in bsdp.named_pairs(expected).values()] == [0, 19]


def test_a_table_decides_what_is_a_pair_in_other_budgets(tmp_path: Path) -> None:
    path = hand_made().save(tmp_path / "table.json")
    callback = pruning(target_kind="params", latency_table=str(path), target=0.4)
    module, _ = fit(tmp_path, callback)
    first, second = bsdp.named_pairs(module).values()
    assert first.rank == 9 and second.rank < 20
    assert callback.record.kept(callback.record.rounds[-1], "params") <= 0.6  # type: ignore[operator]


def test_a_table_of_another_input_size_warns_once(tmp_path: Path) -> None:
    path = replace(hand_made(), input_shapes=((1, 1, 64, 64),)).save(tmp_path / "table.json")
    with pytest.warns(UserWarning, match=r"inputs of \[1, 64, 64\], .* gets \[1, 8, 8\]") as caught:
        fit(tmp_path, pruning(latency_table=str(path)))
    assert sum("latency table" in str(warning.message) for warning in caught) == 1


def test_ranks_are_multiples(tmp_path: Path) -> None:
    callback = pruning(target_kind="params", target=0.3, rank_multiple=4, rounds=1)
    module, _ = fit(tmp_path, callback, max_epochs=2)
    ranks = [pair.rank for pair in bsdp.named_pairs(module).values()]
    assert ranks != [9, 24] and all(rank % 4 == 0 or rank == full for rank, full in zip(ranks, (9, 24), strict=True))


def test_a_fast_dev_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(latency, "measure_latency_table")
    callback = pruning()
    module = Classifier()
    module.example_input_array = torch.zeros(1, 1, 8, 8)
    trainer = make_trainer(tmp_path, [callback, BasisDecomposition()], fast_dev_run=True)
    trainer.fit(module, datamodule=Stripes())
    assert callback.latency.table is None and not list(tmp_path.rglob("*.json"))


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    def refused(message: str, table: bsdp.LatencyTable | None, **options: Any) -> None:
        path = tmp_path / "table.json"
        if table is not None:
            table.save(path, force=True)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fit(tmp_path, pruning(latency_table=str(path), **options), SaveAt("on_train_batch_start", 0))

    refused("`latency_table`: no such file", None)
    refused("`target=0.99` is out of reach: .* of the latency would be gone", hand_made(), target=0.99)
    refused("`latency_batch_size=4` .* measured with a batch size of 2", hand_made(), latency_batch_size=4)
    network = small_network()
    bsdp.decompose(network, include=["0.2"])
    refused("only the network has '0.0'", replace(table_of(network), input_shapes=()))
    with pytest.raises(ValueError, match="`latency_batch_size` must be at least 1"):
        pruning(latency_batch_size=0)


def test_a_network_of_unknown_input_is_refused(tmp_path: Path) -> None:
    class Odd(Classifier):
        def forward(self, images: torch.Tensor, flag: int) -> torch.Tensor:  # type: ignore[override]
            return self.network(images)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0], 1), batch[1])

    trainer = make_trainer(tmp_path, [pruning(), BasisDecomposition()], limit_val_batches=0)
    with pytest.raises(ValueError, match=r"needs the shape of the input, but .*`example_input_array`"):
        trainer.fit(Odd(), datamodule=Stripes())
