"""Compression without training to the smallest network that is good enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import cli
from bsdp.backbones import build_backbone
from bsdp.compression_cutting import Trial
from bsdp.datamodules import DigitsDataModule
from bsdp.stats import count_macs


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
    assert f"worth {result.value:.4g} of 1, the smallest of {len(result.trials)} tried" in str(result)


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
    assert seen[0] is model and model.training
    assert not any(isinstance(module, bsdp.BasisPair) for module in seen[1].modules())


def test_a_target_that_is_not_tolerated_bounds_the_search() -> None:
    result = compressed(kept, tolerance=0.1, target=0.5)
    assert result.trials[0].removed >= 0.5 and not result.trials[0].tolerated
    assert max(trial.removed for trial in result.trials[1:]) < 0.5
    assert 0.9 <= result.stats.params_kept < 0.93


def test_a_network_that_was_pruned_before_is_searched_from_there() -> None:
    first = compressed(None, target=0.5)
    result = compressed(kept, first.model, tolerance=0.2)
    assert 0.3 <= result.stats.params_kept < 0.35
    assert all(trial.removed > 0.5 for trial in result.trials)


def test_cuts_that_are_worth_nothing_are_passed_over() -> None:
    def evaluate(net: nn.Module) -> float:
        return kept(net) if kept(net) > 0.7 else float("nan")

    lines: list[str] = []
    result = compressed(evaluate, tolerance=1.0, progress=lines.append)
    assert 0.7 < result.stats.params_kept < 0.73
    assert any(trial.value is None and not trial.tolerated for trial in result.trials)
    assert any("not fit for use: `evaluate` gave nan" in line for line in lines)


@pytest.mark.parametrize(
    ("evaluate", "options", "match"),
    [
        (kept, {"tolerance": 0.0}, r"`tolerance=0.0`: no cut is tolerated; with .*% of the params gone, .* worth 0\.9"),
        (lambda net: 1.0 if size(net) == size(network()) else float("nan"), {"tolerance": 0.5}, "is not fit for use"),
        (lambda _: float("inf"), {"tolerance": 0.5}, "`evaluate` gave inf"),
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
    assert not (tmp_path / "out").exists()

    assert cli.main([*words, "--val-images", "40"]) == 0
    assert "tolerance 10 points: met" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tolerance"] == 0.1 and summary["met_tolerance"] and summary["reached_target"]
    assert summary["validation_pruned"] >= summary["validation_reference"] - 0.1 - 1e-9
    trials = [Trial(**trial) for trial in summary["compression"]["trials"]]
    best = max((trial for trial in trials if trial.tolerated), key=lambda trial: trial.removed)
    assert best.value == pytest.approx(summary["validation_pruned"])
    assert best.removed == pytest.approx(1.0 - summary["params_kept"])
