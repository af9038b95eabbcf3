"""The summary of a run and the tables made of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bsdp.report import Measurements, summarize, write_summary
from bsdp.report_table import format_summary, grouped_layers, print_summary
from tests.helpers.records import make_record

MEASURED = Measurements(
    test_metric="test_accuracy",
    accuracy_reference=0.98,
    accuracy_pruned=0.975,
    file_bytes_original=2_000_000,
    file_bytes_pruned=500_000,
    latency_ms_original=3.0,
    latency_ms_pruned=2.0,
    latency_batch_size=1,
    latency_threads=2,
    latency_device="cpu",
)


def test_shares_are_those_of_the_chosen_round() -> None:
    record = make_record(layers=3, rounds=4, chosen=3)
    summary = summarize(record)
    assert summary["params_original"] == record.cost.original("params")
    assert summary["params_kept"] == record.rounds[3].params / record.cost.original("params")
    assert summary["macs_pruned"] == record.rounds[3].macs
    assert summary["chosen_round"] == 3
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2, 3, 4]
    assert all("ranks" not in entry for entry in summary["rounds"])


def test_layers_add_up_to_the_network() -> None:
    record = make_record(layers=5, rounds=3)
    summary = summarize(record)
    for total, fixed in (("params", record.cost.fixed_params), ("macs", record.cost.fixed_macs or 0)):
        assert fixed + sum(layer[total] for layer in summary["layers"]) == summary[f"{total}_pruned"]
        assert fixed + sum(layer[f"{total}_original"] for layer in summary["layers"]) == summary[f"{total}_original"]
    layer = summary["layers"][-1]
    assert layer["params_kept"] == layer["params"] / layer["params_original"]
    assert {layer["kind"] for layer in summary["layers"]} <= {"pair", "fused"}


def test_layer_names_are_those_of_the_exported_network() -> None:
    record = make_record(layers=2, rounds=1, prefix="model.")
    assert summarize(record)["layers"][0]["name"].startswith("model.")
    record.network = "model"
    assert [layer["name"] for layer in summarize(record)["layers"]] == ["layer1.0.conv1", "layer2.0.conv2"]


@pytest.mark.parametrize(
    ("mode", "value", "tolerance", "met"),
    [
        ("max", 0.97, 0.01, True),
        ("max", 0.95, 0.01, False),
        ("min", 0.99, 0.01, True),
        ("min", 1.5, 0.01, False),
        ("max", 0.5, None, None),
        ("max", None, 0.01, None),
    ],
)
def test_the_tolerance_is_met_or_not(mode: str, value: float | None, tolerance: float | None, met: bool | None) -> None:
    record = make_record(layers=2, rounds=1)
    record.mode, record.reference, record.tolerance = mode, 0.98, tolerance
    record.rounds[1] = replace(record.rounds[1], accuracy_best=value)
    assert summarize(record)["met_tolerance"] is met


def test_the_target_is_reached_or_not() -> None:
    record = make_record(layers=3, rounds=2)
    kept = record.rounds[2].params / record.cost.original("params")
    record.target = 1 - kept
    assert summarize(record)["reached_target"] is True
    record.target = 1 - kept + 0.01
    assert summarize(record)["reached_target"] is False


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([[1, 3, 32, 32]], 32),
        ([[1, 3, 32, 48]], [32, 48]),
        ([[1, 2, 100]], 100),
        ([[1, 5]], None),
        ([[0]], None),
        ([], None),
    ],
)
def test_the_image_size(shapes: list[list[int]], size: Any) -> None:
    record = make_record(layers=1, rounds=1)
    record.input_shapes = shapes
    summary = summarize(record)
    assert summary["image_size"] == size
    assert summary["input_shapes"] == ([] if shapes == [[0]] else shapes)


def test_the_json_has_no_nan_and_replaces_whole_files(tmp_path: Path) -> None:
    record = make_record(layers=2, rounds=1)
    record.rounds[1] = replace(record.rounds[1], accuracy_before=float("nan"))
    summary = summarize(record, replace(MEASURED, accuracy_pruned=float("inf")))
    path = write_summary(summary, tmp_path / "new" / "summary.json")
    read = json.loads(path.read_text())
    assert read["accuracy_pruned"] is None and read["rounds"][1]["accuracy_before"] is None
    before = path.read_text()
    with pytest.raises(TypeError):
        write_summary({**summary, "bad": object()}, path)
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]


def test_an_empty_record_is_refused() -> None:
    record = make_record(layers=1, rounds=1)
    record.rounds.clear()
    with pytest.raises(ValueError, match="`record`"):
        summarize(record)


def test_the_table_says_what_was_gained() -> None:
    record = make_record(layers=3, rounds=4, chosen=3)
    text = format_summary(summarize(record, replace(MEASURED, notes=("no [bold] test",))))
    rows = {line.strip().split("  ")[0]: line for line in text.splitlines()}
    assert "98.00 %" in rows["test accuracy"] and "97.50 %" in rows["test accuracy"]
    assert "-0.50 points" in rows["test accuracy"]
    assert f"{record.rounds[3].params:,}" in rows["parameters"]
    assert "2.00 MB" in rows["file size"] and "25.0 % (4x smaller)" in rows["file size"]
    assert "66.7 % (1.5x faster)" in rows["latency"]
    assert "round 3 of 4, the smallest within the tolerance" in text
    assert "tolerance 1 point: met" in text
    assert "Note: no [bold] test" in text


def test_the_table_without_measurements_shows_the_validation() -> None:
    record = make_record(layers=2, rounds=2, measured_macs=False)
    record.monitor, record.mode, record.chosen = "val_loss", "min", 0
    text = format_summary(summarize(record))
    assert "val loss" in text and "accuracy" not in text
    assert "no smaller one met the tolerance" in text
    slower = summarize(record, replace(MEASURED, latency_ms_pruned=6.0))
    assert "200.0 % (2x slower)" in format_summary(slower)


@pytest.mark.parametrize("layers", [1, 21, 55, 200])
def test_the_report_fits_into_100_columns_and_about_60_lines(layers: int) -> None:
    text = format_summary(summarize(make_record(layers=layers, rounds=3), MEASURED))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert len(text.splitlines()) <= 65


def test_output_that_is_not_unicode_gets_ascii() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(summarize(make_record(layers=3, rounds=2), MEASURED), console=Console(file=stream, width=100))
    stream.flush()
    assert "##" in stream.buffer.getvalue().decode("ascii")


def _layer(name: str, rank: int = 2, kind: str = "pair") -> dict[str, Any]:
    return {"name": name, "kind": kind, "rank": rank, "full_rank": 8, "params": 10 * rank, "params_original": 100}


def test_short_models_keep_a_row_per_layer() -> None:
    rows = grouped_layers([_layer("a.0"), _layer("a.1", kind="fused")], limit=2)
    assert [(row["name"], row["count"]) for row in rows] == [("a.0", 1), ("a.1", 1)]


def test_layers_of_one_block_come_together() -> None:
    layers = [
        _layer(f"stage.{i}.{part}", rank=i + 1, kind=kind)
        for i in range(3)
        for part, kind in (("a", "pair"), ("b", "fused"))
    ]
    rows = grouped_layers(layers, limit=4)
    assert [row["name"] for row in rows] == ["stage.0", "stage.1", "stage.2"]
    assert rows[2]["forms"] == {"fused": 1, "pair": 1}
    assert [rows[2][key] for key in ("count", "rank", "full_rank", "params", "params_original")] == [2, 6, 16, 60, 200]


@pytest.mark.parametrize("limit", [3, 7, 36])
def test_no_layer_is_lost_in_groups(limit: int) -> None:
    flat = [_layer(str(i), rank=1 + i % 8) for i in range(100)]
    deep = [_layer(f"stage{i % 4}.{i}.conv", rank=1 + i % 8) for i in range(100)]
    for layers in (flat, deep):
        rows = grouped_layers(layers, limit=limit)
        assert limit / 3 <= len(rows) <= limit
        assert sum(row["count"] for row in rows) == 100
        assert sum(row["params"] for row in rows) == sum(layer["params"] for layer in layers)
