"""The word compress of the command line, from the words to the files."""

import json
import re
from pathlib import Path

import pytest
import torch

import bsdp
from bsdp import cli
from bsdp.artifacts import load_artifact
from bsdp.backbones import build_backbone
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_surgery import remove_channels
from bsdp.datamodules import DigitsDataModule
from tests.helpers.tiny_run import write_run

QUICK = ("--images", 16, "--passes", 1, "--val-images", 40, "--image-size", 16)


@pytest.fixture(autouse=True)
def plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BSDP_DEBUG", raising=False)


def run(*words: object) -> int:
    return cli.main(["compress", *(str(word) for word in words)])


def test_files_of_a_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = build_backbone("bsdp:resnet20").class_names
    monkeypatch.setattr(DigitsDataModule, "CLASS_NAMES", names)  # as if they were CIFAR-10
    words = ("--backbone", "bsdp:resnet20", "--data", "digits", "--target", 0.5, "--output", tmp_path, *QUICK, "--test")
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert "What pruning gained" in out and "test accuracy" in out and "wrote pruned.safetensors" in out
    assert "scoring the bases" in err and "no accuracy" not in out

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.4 < summary["params_kept"] <= 0.5 and summary["reached_target"]
    assert summary["validation_reference"] is not None and summary["accuracy_pruned"] is not None
    assert summary["compression"]["examples"] == 16
    network = bsdp.load(
        build_backbone("bsdp:resnet20", num_classes=10, weights="none").network, tmp_path / "pruned.safetensors"
    )
    assert sum(p.numel() for p in network.parameters()) == summary["params_pruned"]
    artifact = load_artifact(tmp_path / "pruned.safetensors")
    assert artifact.metadata["image_size"] == 16 and artifact.metadata["class_names"] == list(names or ())

    assert run(*words) == 2  # what is there is not overwritten
    assert "--force" in capsys.readouterr().err
    before = (tmp_path / "summary.json").read_text()
    assert run(*words[:5], 0.3, *words[6:], "--force") == 0
    assert (tmp_path / "summary.json").read_text() != before


def test_as_many_classes_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--backbone", "bsdp:resnet20", "--data", "digits", "--target", 0.5, "--output", tmp_path, *QUICK)
    assert run(*words, "--test") == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "no accuracy" in line]
    assert "'airplane'" in line and "'0'" in line
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["validation_reference"] is None and summary["accuracy_pruned"] is None
    assert load_artifact(tmp_path / "pruned.safetensors").metadata["class_names"][0] == "airplane"
    assert run(*words, "--allocation", "taylor", "--force") == 2
    assert "`allocation=taylor` needs labels of the network's own classes" in capsys.readouterr().err


def test_a_network_that_names_no_classes_takes_those_of_the_data(tmp_path: Path) -> None:
    network = build_backbone("bsdp:resnet20").network
    weights = bsdp.save(network, tmp_path / "nameless.safetensors")
    words = ("--data", "digits", "--target", 0.5, "--output", tmp_path / "out", *QUICK)
    assert run("--backbone", "bsdp:resnet20", "--weights", weights, *words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["validation_reference"] is not None
    known = load_artifact(tmp_path / "out" / "pruned.safetensors").metadata
    assert known["class_names"] == list("0123456789")


def test_a_pruned_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "version_0")
    words = ("--ckpt", folder, "--data", "digits", "--target", 0.8, "--output", tmp_path / "out", *QUICK)
    assert run(*words) == 0
    assert "no accuracy: the network has 4 classes" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["params_kept"] <= 0.2
    assert summary["validation_reference"] is None  # 4 classes, the digits have 10
    known = load_artifact(tmp_path / "out" / "pruned.safetensors").metadata
    assert known["class_names"] == ["zero", "one", "two", "three"]
    with torch.no_grad():
        assert load_artifact(tmp_path / "out" / "pruned.safetensors").folded(torch.zeros(1, 3, 8, 8)).shape == (1, 4)


def test_a_network_that_was_pruned_before_is_not_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DigitsDataModule, "CLASS_NAMES", build_backbone("bsdp:resnet20").class_names)
    network = build_backbone("bsdp:resnet20").network
    groups = channel_groups(network, torch.zeros(1, 3, 16, 16))
    remove = {name: torch.arange(group.size // 2) for name, group in groups.items()}
    full = sum(p.numel() for p in network.parameters())
    remove_channels(network, plan_removal(network, torch.zeros(1, 3, 16, 16), groups, remove))
    facts = {"backbone": "bsdp:resnet20", "head": "original", "num_classes": 10, "image_size": 16}
    path = bsdp.save(network, tmp_path / "small.safetensors", metadata=facts)
    left = sum(p.numel() for p in network.parameters())
    words = ("--ckpt", path, "--data", "digits", "--output", tmp_path / "out", *QUICK, "--target")
    assert run(*words, 0.85) == 0
    out = capsys.readouterr().out
    assert f"as it was given, it has {left:,} parameters, val accuracy" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["params_original"] == full and summary["params_pruned"] <= 0.15 * full
    assert summary["validation_reference"] is None and summary["validation_pruned"] is not None
    assert sum(row["params_original"] for row in summary["layers"]) > 0.9 * full
    folded = load_artifact(tmp_path / "out" / "pruned.safetensors").folded
    assert sum(p.numel() for p in folded.parameters()) == summary["params_pruned"]

    for target, match in ((0.3, r"`target=0.3` is met already: .* 7\d"), (0.995, "`target=0.995` is out of reach")):
        assert run(*words, target, "--force") == 2
        assert re.search(match, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--data", "digits"), "either `--backbone`"),
        (("--data", "digits", "--backbone", "bsdp:resnet20", "--weights", "none"), "nothing to keep of random weights"),
        (("--data", "nothing", "--backbone", "bsdp:resnet20"), "`data`: there is no folder or YAML file 'nothing'"),
        (("--data", "{folder}", "--backbone", "bsdp:resnet20"), "has no folder `train` with one folder of images"),
        (("--data", "{file}", "--backbone", "bsdp:resnet20"), "does not name a data module"),
        (("--data", "digits", "--ckpt", "{run}/pruned.safetensors"), "folded layers only"),
        (("--data", "digits", "--ckpt", "{run}", "--allocation", "taylor"), "the network has 4 classes"),
    ],
)
def test_refusals(words: tuple[str, ...], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("data: {init_args: {}}")
    needed = any("{run}" in word for word in words)
    folder = write_run(tmp_path / "version_0") if needed else tmp_path
    given = [word.format(run=folder, file=file, folder=tmp_path) for word in words]
    assert run(*given, "--target", 0.5, "--output", tmp_path / "out", *QUICK) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_goes_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert run("--backbone", "bsdp:resnet20", "--data", "nothing", "--target", 0.5, "--output", tmp_path / "out") == 2
    assert "is a file, and a folder is to be made there" in capsys.readouterr().err
