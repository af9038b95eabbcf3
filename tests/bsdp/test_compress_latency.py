"""Compression without training to a share of a measured time."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import cli
from bsdp.stored_times import TABLE_FILE
from tests.helpers.latencies import table_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    ).eval()


def images() -> Tensor:
    return torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def table(**options: Any) -> bsdp.LatencyTable:
    model = network()
    bsdp.decompose(model, example_input=images()[:1])
    return table_of(model, **options)


def compressed(model: nn.Module | None = None, **options: Any) -> bsdp.CompressionResult:
    given: dict[str, Any] = {"target": 0.3, "target_kind": "latency", "passes": 1, **options}
    return bsdp.compress(model or network(), images(), **given)


def test_a_share_of_the_time_of_the_table_goes() -> None:
    times = table(slow=("2",))
    result = compressed(latency_table=times)

    kept = times.fixed_ns + sum(
        layer.fused_ns if (rank := result.ranks[name]) > layer.pair_limit else layer.pair(rank)
        for name, layer in times.layers.items()
    )
    assert result.latency_kept == pytest.approx(kept / times.original_ns)
    assert 0.5 < result.latency_kept <= 0.7
    assert result.ranks["2"] == 16 and result.ranks["4"] < 16  # the pair of the first is slower at any rank
    assert isinstance(result.folded[2], nn.Conv2d) and isinstance(result.folded[4], nn.Sequential)
    assert f"by the latency table {result.latency_kept:.1%} of the time kept" in str(result)
    assert result.latency_table is times
    torch.testing.assert_close(result.folded.eval()(images()), result.model.eval()(images()))


def test_a_file_says_the_same(tmp_path: Path) -> None:
    file = table().save(tmp_path / "times.json")
    ranks = [compressed(latency_table=given).ranks for given in (table(), file, str(file))]
    assert ranks[0] == ranks[1] == ranks[2]


def test_layers_that_are_no_faster_stay_whole_by_any_budget() -> None:
    result = compressed(target_kind="params", latency_table=table(slow=("4",)))
    assert result.ranks["4"] == 16 and result.ranks["2"] < 16
    assert result.stats.params_kept <= 0.7
    without = compressed(target_kind="params")
    assert without.ranks["4"] < 16 and without.latency_kept is None


def test_times_are_measured_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(importlib.import_module("bsdp.compress"), "measure_latency_table", spy(asked))
    lines: list[str] = []
    result = compressed(latency_batch_size=4, progress=lines.append)
    assert asked == [([1, 3, 8, 8], 4)]
    assert "timing 3 layers" in lines
    assert result.latency_table is not None and result.latency_kept is not None and result.latency_kept <= 0.7
    compressed(target_kind="params")
    compressed(latency_table=table())
    assert len(asked) == 1


def spy(asked: list[Any]) -> Any:
    """What measures, with times that nobody measured."""

    def measured(model: nn.Module, example: tuple[Tensor, ...], *, batch_size: int) -> bsdp.LatencyTable:
        asked.append((list(example[0].shape), batch_size))
        return table_of(model)

    return measured


def test_of_a_network_that_was_pruned_before_the_time_with_its_channels_counts() -> None:
    model, work = network(), network()
    for net in (model, work):
        groups = bsdp.channel_groups(net, images()[:1])
        half = {name: torch.arange(group.size // 2) for name, group in groups.items()}
        bsdp.remove_channels(net, bsdp.plan_removal(net, images()[:1], groups, half))
    bsdp.decompose(work, example_input=images()[:1])
    result = compressed(model, latency_table=table_of(work), target=0.2)
    assert result.latency_kept is not None and 0.6 < result.latency_kept <= 0.8
    again = compressed(result.model, latency_table=table_of(work), target=0.3)
    assert again.latency_kept is not None and again.latency_kept <= 0.7
    with pytest.raises(ValueError, match=r"is met already: .* of the original's latency"):
        compressed(again.model, latency_table=table_of(work), target=0.3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"latency_table": table(fixed=100_000)}, "`target=0.3` is out of reach: .* of the latency would be gone"),
        ({"latency_table": table(speed=0.01)}, "by the latency table no decomposed layer is"),
        ({"latency_table": table(), "exclude": ["4"]}, "the latency table is of another network"),
        ({"latency_batch_size": 0}, "`latency_batch_size`"),
        ({"latency_batch_size": 4, "latency_table": table()}, "measured with a batch size of 2: leave one of them out"),
    ],
)
def test_refusals(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compressed(**options)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`latency_table`: no such file: .*none\.json"):
        compressed(latency_table=tmp_path / "none.json")


def test_the_word_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(importlib.import_module("bsdp.compress"), "measure_latency_table", spy(asked))
    words = [
        "compress",
        "--backbone",
        "bsdp:resnet20",
        "--data",
        "digits",
        "--target",
        "0.3",
        "--target-kind",
        "latency",
    ]
    words += ["--images", "16", "--passes", "1", "--val-images", "0", "--image-size", "16"]

    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / TABLE_FILE).touch()
    assert cli.main([*words, "--output", str(tmp_path / "kept")]) == 2
    assert f"{TABLE_FILE}' exists" in capsys.readouterr().err and not asked

    assert cli.main([*words, "--output", str(tmp_path / "out"), "--latency-batch-size", "2"]) == 0
    assert asked == [([1, 3, 16, 16], 2)]
    out = capsys.readouterr().out
    assert f"wrote pruned.safetensors, summary.json and {TABLE_FILE} to" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["target_kind"] == "latency" and summary["reached_target"]
    assert 0.6 < summary["latency_kept"] <= 0.7

    written = tmp_path / "out" / TABLE_FILE
    assert bsdp.LatencyTable.load(written).original_ns > 0
    assert cli.main([*words, "--output", str(tmp_path / "again"), "--latency-table", str(written)]) == 0
    assert len(asked) == 1 and not (tmp_path / "again" / TABLE_FILE).exists()
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["latency_kept"] == summary["latency_kept"]
