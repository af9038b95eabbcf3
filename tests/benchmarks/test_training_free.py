"""The comparison of methods that do not train."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_free
from benchmarks._tables import write_rows
from benchmarks.training_free import METHODS, Case, main, markdown
from tests.helpers.pruning_runs import small_network


def row(**changes: Any) -> dict[str, Any]:
    values = {"accuracy": 0.8, "params_ratio": 0.5, "macs_ratio": 0.4, "minutes": 0.1, "accuracy_reference": 0.9}
    return {"task": "a", "method": "ours", "seed": 0, **values, **changes}


def test_table_has_means_ranges_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = row(method="cap", accuracy=None, failed="no graph")
    write_rows(tmp_path / "rows.json", [row(), row(seed=1, accuracy=0.6), failed])
    assert main(["--show", str(tmp_path / "rows.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| a | ours | 0, 1 | 90.00% | 70.00% (60.00% to 80.00%) | 50.0% | 40.0% | 6.0 |"
    assert lines[3] == "| a | cap | 0 | 90.00% | failed: no graph | - | - | - |"
    assert len(markdown([]).splitlines()) == 2


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--methods", "ours,theirs"])
    assert "unknown 'theirs'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["svd", "svd_hull", "energy", "ours", "ours_taylor", "only_recalibrated"])
def test_methods_meet_the_target(method: str) -> None:
    torch.manual_seed(0)
    network, images = small_network().eval(), torch.randn(36, 1, 8, 8)
    small = METHODS[method](Case(copy.deepcopy(network), images, torch.arange(36) % 4, target=0.4))
    assert 0.3 < small.params_ratio <= 0.6 and small.macs_ratio < 1.0
    assert small.network(images).shape == (36, 4)


def test_rows_are_kept_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def run(_network: object, _data: object, method: str, seed: int) -> dict[str, Any]:
        made.append((method, seed))
        return {"accuracy": 0.5}

    monkeypatch.setattr(training_free, "_run", run)
    monkeypatch.setattr(training_free, "accuracy", lambda *_: 0.9)
    monkeypatch.setattr(training_free.CIFAR10DataModule, "prepare_data", lambda _: None)
    monkeypatch.setattr(training_free.CIFAR10DataModule, "setup", lambda _: None)
    path = tmp_path / "rows.json"
    training_free.measure(["resnet20"], ["svd"], [0], path)
    training_free.measure(["resnet20"], ["svd", "ours"], [0, 1], path)
    assert made == [("svd", 0), ("ours", 0), ("svd", 1), ("ours", 1)]
    assert [r["accuracy_reference"] for r in training_free.read_rows(path)] == [0.9] * 4
