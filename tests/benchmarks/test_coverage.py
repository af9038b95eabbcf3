"""Architectures through all steps of ``benchmarks/coverage.py``: a few of them by default, all with ``-m slow``."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bsdp
from benchmarks import coverage
from benchmarks.coverage import Row, check, find_cases, read_rows
from benchmarks.coverage_models import Case, timm_families, torchvision_cases

# The quickest of most styles: plain, residual, grouped, depthwise, shuffled channels, attention, a convolution as the
# head, weights that are standardised. Lists of images, dictionaries of outputs and clips have small networks below.
SOME_OF_TORCHVISION = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"]
SOME_OF_TIMM = ["test_byobnet", "test_convnext", "test_mambaout", "test_nfnet", "test_vit"]


def passes(name: str, library: str) -> Row:
    (case,) = find_cases([name], library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries whose models these are
        row = check(case)
    assert row.result == "pass"
    assert row.decomposed > 0
    assert row.params_kept is not None and row.params_kept < 1.0
    assert row.macs_kept is not None and row.macs_kept < 1.0
    return row


@pytest.mark.parametrize("name", SOME_OF_TORCHVISION)
def test_some_of_torchvision_pass(name: str) -> None:
    passes(name, "torchvision")


@pytest.mark.parametrize("name", SOME_OF_TIMM)
def test_some_of_the_timm_families_pass(name: str) -> None:
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


class Detector(Net):
    """Takes a list of images and gives dictionaries; needs targets in training, as those of torchvision do."""

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        scores = super().forward(torch.stack(images))
        if not self.training:
            return {"labels": scores.argmax(1), "scores": scores}
        assert targets is not None
        return {"loss": (scores - torch.stack(targets)).square().mean()}


def test_lists_of_images_targets_and_dictionaries_go_through() -> None:
    images = ([torch.ones(3, 8, 8)],)
    row = check(Case("own", "detector", Detector, lambda _: images, lambda _: (*images, [torch.ones(4)])))
    assert (row.result, row.decomposed) == ("pass", 1) and (row.macs_kept or 1.0) < 1.0


def test_clips_go_through() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(3, 16, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 4))

    row = check(Case("own", "clips", build, lambda batch: (torch.randn(batch, 3, 4, 8, 8),)))
    assert (row.result, row.decomposed) == ("pass", 1) and (row.macs_kept or 1.0) < 1.0


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
