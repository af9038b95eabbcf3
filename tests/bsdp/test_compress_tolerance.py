"""Compression without training to the smallest network that is good enough."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import cli, compression_cutting
from bsdp.backbones import build_backbone
from bsdp.compression_cutting import CompressionTrial
from bsdp.datamodules import DigitsDataModule
from bsdp.stats import count_macs
from tests.helpers.latencies import table_of


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )


def images(seed: int = 1) -> Tensor:
    return torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kept(model: nn.Module) -> float:
    """Worth as much as it is large."""
    return size(model) / size(network())


def compressed(evaluate: Callable[[nn.Module], float] | None, model: nn.Module | None = None, **options: Any) -> Any:
    given: dict[str, Any] = {"passes": 1, "compensate": False, **options}
    return bsdp.compress(model or network(), images(), evaluate=evaluate, **given)


def test_the_largest_cut_within_the_tolerance_is_found() -> None:
    result = compressed(kept, tolerance=0.4)
    assert result.reference == 1.0
    assert 0.6 <= result.stats.params_kept < 0.63
    assert size(result.folded) == result.stats.params
    assert result.value == pytest.approx(result.stats.params_kept)

    tolerated = [trial.removed for trial in result.trials if trial.tolerated]
    others = [trial.removed for trial in result.trials if not trial.tolerated]
    assert max(tolerated) == pytest.approx(1.0 - result.stats.params_kept)
    assert max(tolerated) < 0.4 < min(others)
    assert len(result.trials) <= 6
    assert 0.4 - max(tolerated) < 0.02
    assert f"worth {result.value:.4g} of 1, the smallest tolerated of {len(result.trials)} tried" in str(result)


def test_other_budgets_are_searched_in_their_own_units() -> None:
    lines: list[str] = []
    result = compressed(
        lambda net: float(count_macs(net, images()[:1])), tolerance=4e4, target_kind="macs", progress=lines.append
    )
    whole = count_macs(network(), images()[:1])
    assert result.stats.macs is not None and whole - 4e4 <= result.stats.macs < whole
    assert all(trial.value == pytest.approx(whole * (1.0 - trial.removed)) for trial in result.trials)
    assert all(trial.tolerated == (trial.value >= whole - 4e4) for trial in result.trials)
    assert any(line.endswith("too much") for line in lines) and any(line.endswith("tolerated") for line in lines)


def test_a_target_that_is_tolerated_is_enough() -> None:
    seen: list[nn.Module] = []

    def evaluate(net: nn.Module) -> float:
        assert not net.training and not torch.is_grad_enabled()
        seen.append(net)
        return kept(net)

    model = network().train()
    result = compressed(evaluate, model, tolerance=0.4, target=0.2)
    assert [trial.tolerated for trial in result.trials] == [True]
    assert 0.75 < result.stats.params_kept <= 0.8
    assert len(seen) == 2 and model.training
    again = compressed(evaluate, result.model, tolerance=0.4, target=0.3)
    assert again.stats.params_kept <= 0.7
    assert not any(isinstance(module, bsdp.BasisPair) for net in seen for module in net.modules())


def test_a_target_that_is_not_tolerated_bounds_the_search() -> None:
    result = compressed(kept, tolerance=0.1, target=0.5)
    assert result.trials[0].removed >= 0.5 and not result.trials[0].tolerated
    assert max(trial.removed for trial in result.trials[1:]) < 0.5
    assert 0.9 <= result.stats.params_kept < 0.93


def test_a_network_that_was_pruned_before_is_searched_from_there() -> None:
    first = compressed(None, target=0.5)
    result = compressed(kept, first.model, tolerance=0.2)
    assert 0.28 <= result.stats.params_kept < 0.33
    assert result.trials[0].removed > 0.7  # halfway from there to the smallest


def test_cuts_that_are_worth_nothing_are_passed_over() -> None:
    def evaluate(net: nn.Module) -> float:
        return kept(net) if kept(net) > 0.7 else float("nan")

    lines: list[str] = []
    result = compressed(evaluate, tolerance=1.0, progress=lines.append)
    assert 0.7 < result.stats.params_kept < 0.73
    assert any(trial.value is None and not trial.tolerated for trial in result.trials)
    assert any("not fit for use: `evaluate` gave nan" in line for line in lines)


def test_errors_of_the_measure_are_not_swallowed() -> None:
    def evaluate(net: nn.Module) -> float:
        if size(net) < size(network()):
            raise ValueError("my own mistake")
        return 1.0

    with pytest.raises(ValueError, match="my own mistake"):
        compressed(evaluate, tolerance=0.5)


def test_networks_that_fail_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("it broke.")

    monkeypatch.setattr(compression_cutting, "truncate", fail)
    with pytest.raises(ValueError, match=r"no cut is tolerated; .* not fit for use \(no compressed network .*it broke"):
        compressed(kept, tolerance=0.5)


def test_nothing_is_cut_and_evaluated_twice() -> None:
    ranks: list[tuple[int, ...]] = []
    worths: list[float] = []

    def evaluate(net: nn.Module) -> float:
        ranks.append(tuple(p.numel() for p in net.parameters()))
        worths.append(1.0 if len(worths) == 0 else 0.9 + 0.01 * (len(worths) % 3))
        return worths[-1]

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    result = compressed(evaluate, model, tolerance=0.085, exclude=["4"], target_kind="macs")
    assert len(set(ranks)) == len(ranks) == len(result.trials) + 1
    chosen = max((trial for trial in result.trials if trial.tolerated), key=lambda trial: trial.removed)
    assert result.value == chosen.value


def test_a_fall_of_exactly_the_tolerance_in_single_precision_is_tolerated() -> None:
    right = torch.tensor([0.91, 0.90])  # 5e-8 more than a hundredth apart
    values = iter([float(right[0]), float(right[1])])
    result = compressed(lambda _: next(values), tolerance=0.01, target=0.2)
    assert result.value == float(right[1]) and result.reference == float(right[0])


def test_a_small_range_is_tried_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 300))
    result = compressed(lambda _: 1.0, model, tolerance=0.0, exclude=["2"])
    assert 0.98 < result.stats.params_kept < 1.0 and len(result.trials) == 1


def test_what_has_nothing_to_lose_is_refused_before_it_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("bsdp.compress"), "basis_scores", None)

    def never(_: nn.Module) -> float:
        raise AssertionError

    work = network()
    bsdp.decompose(work)
    slow = table_of(work, speed=0.01)
    with pytest.raises(ValueError, match=r"has no latency to lose: .*no decomposed layer is faster as a pair"):
        compressed(never, tolerance=0.5, target_kind="latency", latency_table=slow)
    for pair in bsdp.named_pairs(work).values():
        pair.keep(torch.arange(1))
    with pytest.raises(ValueError, match=r"has no params to lose: with rank 1 .*none can be cut"):
        compressed(never, work, tolerance=0.5)
    with pytest.raises(ValueError, match="is out of reach"):
        compressed(never, tolerance=0.5, target=0.999)


@pytest.mark.parametrize(
    ("evaluate", "options", "match"),
    [
        (0.9, {"tolerance": 0.1}, "`evaluate` must be a function of a network, got float"),
        (lambda _: None, {"tolerance": 0.1}, "`evaluate` must give a number, .* got NoneType"),
        (lambda _: torch.zeros(2), {"tolerance": 0.1}, "`evaluate` must give a number, .* got Tensor"),
        (kept, {"tolerance": 0.1, "latency_table": 3}, "`latency_table` must be a LatencyTable or a file, got int"),
    ],
)
def test_things_of_another_type_are_refused(evaluate: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        compressed(evaluate, **options)


@pytest.mark.parametrize(
    ("evaluate", "options", "match"),
    [
        (kept, {"tolerance": 0.0}, r"`tolerance=0.0`: no cut is tolerated; with .*% of the params gone, .* worth 0\.9"),
        (lambda net: 1.0 if size(net) == size(network()) else float("nan"), {"tolerance": 0.5}, "is not fit for use"),
        (lambda _: float("inf"), {"tolerance": 0.5}, "`evaluate` gave inf for the original"),
        (kept, {"tolerance": -0.1}, "`tolerance`"),
        (kept, {"tolerance": 0.1, "target": 1.5}, "`target`"),
        (kept, {"target": 0.5}, "`tolerance` is a fall of what `evaluate` gives"),
        (None, {"tolerance": 0.5}, "`tolerance` is a fall of what `evaluate` gives"),
        (None, {}, "give `target`, the share to remove, or `tolerance`"),
    ],
)
def test_refusals(evaluate: Callable[[nn.Module], float] | None, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compressed(evaluate, **options)


def test_the_word_searches_by_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", "--backbone", "bsdp:resnet20", "--data", "digits", "--tolerance", "0.1"]
    words += ["--images", "16", "--passes", "1", "--image-size", "16", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "`tolerance` needs labels of the network's own classes" in capsys.readouterr().err
    monkeypatch.setattr(DigitsDataModule, "CLASS_NAMES", build_backbone("bsdp:resnet20").class_names)
    assert cli.main([*words, "--val-images", "0"]) == 2
    assert "give some (`--val-images`)" in capsys.readouterr().err
    assert cli.main([word if word != "0.1" else "1" for word in words]) == 2
    assert "`tolerance` is a fraction, 0.01 for one point" in capsys.readouterr().err
    assert cli.main([*words[:5], *words[7:]]) == 2
    assert "give `--target`, the share to remove, `--tolerance`" in capsys.readouterr().err
    elsewhere = [*words, "--data", "cifar10", "--data-dir", str(tmp_path / "none")]
    assert cli.main([*elsewhere, "--latency-table", str(tmp_path / "none.json")]) == 2
    assert "`latency_table`: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    command = importlib.import_module("bsdp.compress_command")
    monkeypatch.setattr(command, "_accuracy", lambda net, _: size(bsdp.fold(net)) / 272_474)
    assert cli.main([*words, "--val-images", "40"]) == 0
    out = capsys.readouterr().out
    assert "target: none but the tolerance; reached: " in out and "tolerance 10 points: met" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tolerance"] == 0.1 and summary["met_tolerance"]
    assert summary["target"] is None and summary["reached_target"] is None
    compression = summary["compression"]
    assert (compression["reference"], compression["value"]) == pytest.approx(
        (summary["validation_reference"], summary["validation_pruned"])
    )
    assert summary["validation_reference"] == 1.0 and 0.9 <= summary["validation_pruned"] < 0.93
    trials = [CompressionTrial(**trial) for trial in summary["compression"]["trials"]]
    best = max((trial for trial in trials if trial.tolerated), key=lambda trial: trial.removed)
    assert best.value == pytest.approx(summary["validation_pruned"])
    assert best.removed == pytest.approx(1.0 - summary["params_kept"])
    assert not any("validation images is" in note for note in summary["notes"])

    words[-1] = str(tmp_path / "few")
    assert cli.main([*words, "--val-images", "5"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "one of the 5 validation images is 20 points of accuracy, more than the tolerance" in out
