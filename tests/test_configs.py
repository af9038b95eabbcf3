"""Every YAML file in configs/ enrols itself: pieces compose, complete files run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import bsdp
from bsdp import cli

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
COMPLETE = [path for path in FILES if {"model", "data", "trainer"} <= yaml.safe_load(path.read_text()).keys()]
PIECES = [path for path in FILES if path not in COMPLETE and path.parent.name not in ("data", "experiment")]
# `finetune` and `prune_tuned` change other experiments; configs/data has its own tests in tests/datamodules.

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]

DIGITS: dict[str, Any] = {
    "class_path": "bsdp.datamodules.DigitsDataModule",
    "init_args": {"image_size": 32, "batch_size": 8, "augment": "crop", "samples_per_class": None, "val_fraction": 0.2},
}


def digits_for(data: dict[str, Any]) -> dict[str, Any]:
    """Digits in the place of a config's data; of both sides where there is a source beside the target."""
    sides = {key: DIGITS for key in ("source", "target") if key in data["init_args"]}
    return {**data, "init_args": {**data["init_args"], **sides, "budget": 64}} if sides else DIGITS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_every_file_says_what_it_is_for_and_how() -> None:
    for path in FILES:
        header = [line for line in path.read_text().splitlines()[:4] if line.startswith("#")]
        assert len(header) >= 2, f"{path.name} has no header"


@pytest.mark.filterwarnings("ignore:fewer examples times positions")  # of one small batch
@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "whole"])
@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_complete_file_runs(path: Path, small: bool, folder: Path) -> None:
    # Without the data and weights that do not ship: digits and random weights in their place, one batch.
    config = yaml.safe_load(path.read_text())
    model = config["model"]
    init = {**model["init_args"], "weights": "none", "num_classes": 10, "head": "original"}
    if small:
        init["backbone"] = "bsdp:resnet20"
    tiny = write(folder / "tiny.yaml", {"model": {**model, "init_args": init}, "data": digits_for(config["data"])})
    options = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]
    assert cli.main(["fit", "--config", str(path), "--config", tiny, *options]) == 0


@pytest.mark.parametrize("path", PIECES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_piece_composes(path: Path, folder: Path) -> None:
    model = {"init_args": {"backbone": "bsdp:resnet20", "weights": "none"}}
    tiny = write(folder / "tiny.yaml", {"model": model, "data": DIGITS})
    pruning = ["--config", str(CONFIGS / "callbacks" / "basis_pruning.yaml")] if path.parent.name == "logger" else []
    words = ["fit", "--config", str(CONFIGS / "base.yaml"), *pruning, "--config", str(path), "--config", tiny]
    assert cli.main([*words, "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0


def test_quickstart_from_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart as it ships, on two batches an epoch and with random weights."""
    wanted = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    for callback in wanted["trainer"]["callbacks"]:
        if callback["class_path"].endswith("IterativeBasisPruning"):
            callback["init_args"] |= {"tolerance": 0.99, "warmup_epochs": 2, "rounds": 3, "epochs_per_round": 1}
    wanted["model"]["init_args"]["weights"] = "none"
    wanted["trainer"] |= {"max_epochs": 6, "limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 2}
    assert cli.main(["fit", "--config", write(folder / "quick.yaml", wanted)]) == 0
    shown = capsys.readouterr().out
    for word in (
        "accuracy",
        "parameters",
        "MACs",
        "file",
        "latency",
        "original",
        "pruned",
        "ratio",
        "layer1",
    ):
        assert word in shown, word
    run = folder / "logs" / "quickstart" / "version_0"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.yaml", "metrics.csv", "summary.json", "pruning_curves.png", "pruned.safetensors", "pruned.ckpt"),
        "checkpoints",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= {
        *("accuracy_reference", "accuracy_pruned", "params_original", "params_pruned", "macs_original", "macs_pruned"),
        *("latency_ms_original", "latency_ms_pruned", "image_size", "seed", "layers"),
    }
    target = next(c["init_args"]["target"] for c in wanted["trainer"]["callbacks"] if "target" in c["init_args"])
    assert summary["params_pruned"] <= (1 - target) * summary["params_original"]
    assert summary["image_size"] == 16

    # the file names everything that is needed to use the network
    header = bsdp.read_metadata(run / "pruned.safetensors")
    assert header.keys() >= {"backbone", "num_classes", "class_names", "image_size", "mean", "std", "layers"}

    # and `test` gives the accuracy that the fit reported, with the run's config and without
    limit = "--trainer.limit_test_batches=2"
    for words in (["--config", str(run / "config.yaml")], []):
        assert cli.main(["test", "--ckpt_path", str(run / "pruned.ckpt"), *words, limit]) == 0
        tested = sorted(folder.glob("logs/**/test/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)[-1]
        header_row, values = (line.split(",") for line in tested.read_text().splitlines()[:2])
        accuracy = float(dict(zip(header_row, values, strict=True))["test_accuracy"])
        assert accuracy == pytest.approx(summary["accuracy_pruned"], abs=1e-6)
