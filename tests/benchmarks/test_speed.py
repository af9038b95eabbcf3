"""`benchmarks/speed.py`: its parts on the smallest inputs; what they say of speed is not tested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import speed
from benchmarks._runs import commit
from benchmarks._speed_common import Row, markdown, milliseconds
from benchmarks._speed_training import _peak_memory


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(folder: Path, *words: str) -> list[Row]:
    file = folder / "rows.json"
    speed.main([*words, "--repeats", "1", "--output", str(file)])
    rows: list[Row] = json.loads(file.read_text())
    return rows


def test_scales_are_compared_at_every_share(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "scales", "--networks", "bsdp:resnet20,8,2")
    assert [row["trains"] for row in rows] == [
        "all weights",
        *(
            f"scales at {share} of the rank{how}"
            for how in ("", ", lean norms")
            for share in ("1", "0.75", "0.5", "0.25")
        ),
    ]
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1.0
    weights = [row["weights_mb"] for row in rows[1:5]]
    assert all(lean["peak_mb"] < plain["peak_mb"] for plain, lean in zip(rows[1:5], rows[5:], strict=True))
    assert weights == sorted(weights, reverse=True) and all(row["peak_mb"] > 0 for row in rows)


def test_callbacks_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = rows_of(tmp_path, "callbacks", "--networks", "bsdp:resnet20,8,2", "--batches", "1")
    assert row["ratio"] == row["seconds_with"] / row["seconds_without"] and row["method"] == "basis"


@pytest.mark.slow
def test_folded_networks_keep_more_in_the_same_time(tmp_path: Path) -> None:
    words = ("folded", "--networks", "bsdp:resnet20,8", "--batch-sizes", "2", "--engines", "eager")
    rows = {row["selection"]: row for row in rows_of(tmp_path, *words, "--selections", "multiples,latency")}
    assert list(rows) == ["multiples", "latency"]
    for row in rows.values():
        assert row["speed_up_per_mac"] == pytest.approx(row["speed_up"] / row["mac_reduction"])
        assert 0 < row["energy_kept"] < 1 or row["selection"] == "latency"
    assert rows["multiples"]["mac_reduction"] >= 2


def test_networks_that_lost_channels_are_timed(tmp_path: Path) -> None:
    words = ("folded", "--networks", "bsdp:resnet20,8", "--batch-sizes", "1", "--engines", "eager", "--repeats", "1")
    rows = {row["selection"]: row for row in rows_of(tmp_path, *words, "--selections", "channels,uniform")}
    for row in rows.values():
        assert 1.95 < row["mac_reduction"] < 2.2 and 0.4 < row["energy_kept"] < 0.9
        assert row["command"].startswith("python benchmarks/speed.py folded --networks bsdp:resnet20,8")
        assert row["commit"] == commit()
    assert rows["channels"]["energy_kept"] > rows["uniform"]["energy_kept"]


@pytest.mark.slow
def test_networks_that_lost_channels_by_time_are_timed(tmp_path: Path) -> None:
    words = ("folded", "--networks", "bsdp:resnet20,8", "--batch-sizes", "1", "--engines", "channels_last")
    selections = ("--selections", "channel_latency,channel_half_time", "--repeats", "1")
    rows = {row["selection"]: row for row in rows_of(tmp_path, *words, *selections)}
    assert rows["channel_half_time"]["mac_reduction"] > 1 and 0 < rows["channel_half_time"]["energy_kept"] < 1
    assert rows["channel_latency"]["energy_kept"] > rows["channel_half_time"]["energy_kept"]


def test_the_profile_covers_the_whole_pass(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "profile", "--networks", "bsdp:resnet20,8", "--batch-sizes", "1")
    assert sum(row["share_of_original_time"] for row in rows) == pytest.approx(1.0)
    assert sum(row.get("layers", 0) for row in rows) == 21


def test_decomposing_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import _speed_decompose

    row = _speed_decompose.measure("bsdp:resnet20", "activation", 1)
    assert row["layers"] == 21 and row["seconds"] > 0 and row["seconds_statistics"] > 0
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        calls.append(command[3:])
        return type("Done", (), {"returncode": 0, "stdout": f"noise\n{json.dumps(row)}\n"})

    monkeypatch.setattr(_speed_decompose, "subprocess", SimpleNamespace(run=run))
    rows_of(tmp_path, "decompose", "--networks", "bsdp:resnet20")
    assert calls == [["bsdp:resnet20", metric, "4", "1"] for metric in ("euclidean", "activation")]


def test_layers_side_by_side_are_timed(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    rows = rows_of(tmp_path, "parallel", "--networks", "bsdp:resnet20", "--repeats", "1")
    assert {row["what"]: row["threads"] for row in rows} == {"alone": 1, "inside": 2, "side by side": 2}
    assert all(row["layers"] == 21 and row["seconds"] > 0 for row in rows)
    torch.set_num_threads(threads)


def test_rows_that_are_measured_again_replace_the_old_ones() -> None:
    old = [{"network": "a", "batch_size": 1, "ms": 1.0}, {"network": "a", "batch_size": 32, "ms": 2.0}]
    assert speed.merged(old, [{"network": "a", "batch_size": 1, "ms": 3.0}]) == [old[1], {**old[0], "ms": 3.0}]


def test_a_stopped_part_leaves_the_rows_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def growth(_options: object) -> Iterator[Row]:
        yield {"what": "a", "size": 1, "seconds": 3.0}
        raise KeyboardInterrupt

    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"what": "a", "size": size, "seconds": 1.0, "threads": 1} for size in (1, 2)]))
    monkeypatch.setitem(speed.PARTS, "growth", growth)
    with pytest.raises(KeyboardInterrupt):
        speed.main(["growth", "--output", str(file)])
    assert [(row["size"], row["seconds"]) for row in json.loads(file.read_text())] == [(2, 1.0), (1, 3.0)]


def test_words() -> None:
    assert speed.network("bsdp:resnet20") == ("bsdp:resnet20", 64, 32)
    assert speed.network("bsdp:resnet20,32") == ("bsdp:resnet20", 32, 32)
    assert speed.network("bsdp:resnet20,32,8") == ("bsdp:resnet20", 32, 8)
    with pytest.raises(SystemExit):
        speed.parser().parse_args(["folded", "--engines", "steam"])


def test_tables_and_peaks() -> None:
    assert markdown([{"a": 1.23456, "b": None}, {"a": "x"}]) == "| a | b |\n| --- | --- |\n| 1.23 | - |\n| x | - |"
    assert markdown([]) == "nothing was measured"
    kept: list[torch.Tensor] = []

    def two_at_a_time() -> None:
        kept.append(torch.empty(1000, dtype=torch.float32))
        for _ in range(3):
            torch.empty(2000, dtype=torch.float32)

    assert 12_000 <= _peak_memory(two_at_a_time) <= 13_000
    assert set(milliseconds({"a": two_at_a_time}, repeats=1)) == {"a"}
