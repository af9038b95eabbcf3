"""Architectures through all steps of ``benchmarks/coverage.py``: a tenth of them by default, all with ``-m slow``."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from benchmarks import coverage
from benchmarks.coverage import Row, check, find_cases, read_rows
from benchmarks.coverage_models import Case, timm_families, torchvision_cases

# One of every kind and most styles: plain, residual, dense, grouped, depthwise, shuffled channels, attention of several
# sorts, weights that are standardised or read by other code, dictionaries of outputs, lists of images, clips.
TORCHVISION_TENTH = [
    "lraspp_mobilenet_v3_large",
    "mc3_18",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "ssdlite320_mobilenet_v3_large",
]
TIMM_TENTH = [
    "convit_tiny",
    "edgenext_xx_small",
    "ghostnet_050",
    "levit_128s",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_mambaout",
    "test_nfnet",
    "test_vit",
]


def passes(name: str, library: str, inputs: Callable[[int], tuple[Any, ...]] | None = None) -> Row:
    (case,) = find_cases([name], library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries whose models these are
        row = check(case if inputs is None else dataclasses.replace(case, inputs=inputs))
    assert row.result == "pass"
    assert row.decomposed > 0
    assert row.params_kept is not None and row.params_kept < 1.0
    assert row.macs_kept is not None and row.macs_kept < 1.0
    return row


@pytest.mark.parametrize("name", TORCHVISION_TENTH)
def test_a_tenth_of_torchvision_passes(name: str) -> None:
    clips = (lambda batch: (torch.randn(batch, 3, 4, 32, 32),)) if name == "mc3_18" else None  # an eighth of the time
    passes(name, "torchvision", clips)


@pytest.mark.parametrize("name", TIMM_TENTH)
def test_a_tenth_of_the_timm_families_passes(name: str) -> None:
    passes(name, "timm")


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.model for row in read_rows("torchvision")])
def test_all_of_torchvision_passes(name: str) -> None:
    passes(name, "torchvision")


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.model for row in read_rows("timm")])
def test_all_of_the_timm_families_pass(name: str) -> None:
    passes(name, "timm")


def test_the_kept_rows_are_of_every_model_and_family() -> None:
    assert {row.model for row in read_rows("torchvision")} == {case.name for case in torchvision_cases()}
    known = {f"timm {family}" for family in timm_families()}
    assert {row.family for row in read_rows("timm")} == known


def test_the_kept_rows_reach_the_targets() -> None:
    assert [row.model for row in read_rows("torchvision") if row.result != "pass"] == []
    assert sum(row.result == "pass" for row in read_rows("timm")) >= 95


# --- what the check itself notices


class Net(nn.Module):
    """The plain case, with a switch for everything that may go wrong."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault, self.calls = fault, 0
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.fault == "train" and self.training:
            raise RuntimeError("only for looking")
        features = self.conv(images).relu()
        if self.fault == "decompose" and isinstance(self.conv, bsdp.BasisPair):
            features = features * 1.01
        if self.fault == "fold" and isinstance(self.conv, nn.Sequential):
            features = features * 1.01
        return self.head(features.mean((2, 3)))


def case(fault: str = "") -> Case:
    return Case("own", "net", lambda: Net(fault), lambda batch: (torch.ones(batch, 3, 8, 8),))


def test_a_sound_network_passes_and_gets_smaller() -> None:
    row = check(case())
    assert (row.result, row.dtype, row.decomposed, row.skipped) == ("pass", "float32", 1, {HEAD: 1})
    # 8 bases of 27 weights, mapped to 16 channels, against 16 filters of 27 weights; the head has 68 parameters.
    assert row.params_kept == round((8 * (27 + 16) + 16 + 68) / (16 * 27 + 16 + 68), 4)
    assert row.macs_kept == round((36 * 8 * (27 + 16) + 64) / (36 * 16 * 27 + 64), 4)


HEAD = "it is the head (the last layer of the model); name it in `include` to decompose it"


@pytest.mark.parametrize("fault", ["decompose", "train", "fold"])
def test_what_goes_wrong_is_named_with_its_step(fault: str) -> None:
    row = check(case(fault))
    assert row.result.startswith(f"{fault}: ")
    reason = "RuntimeError: only for looking" if fault == "train" else "relative error"
    assert reason in row.result
    assert row.dtype == ("float32" if fault == "train" else "float64")  # a difference is looked at twice


def test_rows_survive_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "RESULTS", tmp_path)
    rows = [check(case()), Row("own", "other", result="build: no")]
    coverage.write_rows("timm", rows)
    assert read_rows("timm") == rows
    versions = json.loads((tmp_path / "coverage_timm.json").read_text())["versions"]
    assert versions["torch"] == torch.__version__.partition("+")[0]


def test_an_unknown_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="neither torchvision nor timm has a model 'resnet19'"):
        find_cases(["resnet19"])
