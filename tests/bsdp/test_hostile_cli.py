"""The command line with checkpoints and files that mean harm: one paragraph, code 2, nothing on disk changed."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bsdp import cli
from tests.bsdp.test_cli import TINY, refused
from tests.helpers.hostile import WRITERS, Payload
from tests.helpers.marks import slow_but

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A short pruning run, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    config = copy.deepcopy(TINY)
    config["trainer"] |= {"max_epochs": 2, "default_root_dir": str(folder / "logs")}
    config["trainer"]["callbacks"] = [
        {"class_path": "bsdp.callbacks.BasisDecomposition"},
        {
            "class_path": "bsdp.callbacks.IterativeBasisPruning",
            "init_args": {"target": 0.3, "warmup_epochs": 1, "tolerance": None, "save_pruned": False},
        },
    ]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["fit", "--config", str(folder / "tiny.yaml")]) == 0
    run = folder / "logs" / "tiny" / "version_0"
    return run, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def contents(folder: Path) -> dict[Path, bytes]:
    """All files, but for the settings that the logger notes down whenever a run begins."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "hparams.yaml"}


Change = Callable[[dict[str, Any]], object]
FIRST = "network.conv1"
LIES: dict[str, tuple[Change, tuple[str, ...], str]] = {
    "rank": (
        lambda c: c["bsdp"]["pairs"].update({FIRST: {"rank": -1}}),
        ("test",),
        "gives layer 'network.conv1' the rank -1",
    ),
    "rank in fit": (
        lambda c: c["bsdp"]["pairs"].update({FIRST: {"rank": -1}}),
        ("fit",),
        "gives layer 'network.conv1' the rank -1",
    ),
    "shape": (
        lambda c: c["state_dict"].update({"network.fc.bias": torch.zeros(3)}),
        ("validate",),
        "`ckpt_path`: the checkpoint does not fit the model: 'network.fc.bias' has shape (3,)",
    ),
    "nan": (
        lambda c: c["state_dict"]["network.fc.bias"].fill_(torch.nan),
        ("predict",),
        "`ckpt_path`: the checkpoint holds NaN or infinity in 'network.fc.bias'",
    ),
    "missing": (lambda c: c["state_dict"].pop("network.fc.bias"), ("test",), "it lacks ['network.fc.bias']"),
    "settings": (lambda c: c.update(hyper_parameters=[1]), ("test",), "its `hyper_parameters` is no table"),
    "class": (
        lambda c: c["hyper_parameters"].update(_class_path="os.system"),
        ("fit",),
        'key "model": ',
    ),
    "optimizer": (
        lambda c: c["hyper_parameters"].update(optimizer={"class_path": "subprocess.run", "init_args": {"args": "ls"}}),
        ("fit",),
        'key "model": ',
    ),
    "unknown_setting": (lambda c: c["hyper_parameters"].update(zzz=3), ("test",), "unexpected keyword argument 'zzz'"),
    "callback_state": (
        lambda c: c["callbacks"].update({"IterativeBasisPruning": {"scheduled": 1}}),
        ("fit",),
        "`ckpt_path` cannot be restored (KeyError",
    ),
    "optimizer_state": (lambda c: c.update(optimizer_states=5), ("fit",), "`ckpt_path` cannot be restored (TypeError"),
    "version": (lambda c: c.pop("pytorch-lightning_version"), ("test",), "`ckpt_path` cannot be restored (KeyError"),
    "step": (lambda c: c.update(global_step="x"), ("fit",), "its `global_step` is 'x'"),
}


@pytest.mark.parametrize("lie", slow_but(LIES.keys() - {"rank in fit", "missing", "optimizer_state"}, LIES))
def test_checkpoints_that_lie_change_nothing(
    lie: str, finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, good = finished
    change, words, message = LIES[lie]
    bad = copy.deepcopy(good)
    change(bad)
    path = run / "checkpoints" / "bad.ckpt"
    torch.save(bad, path)
    before = contents(run)
    for word in words:
        more = ["--trainer.max_epochs=3"] if word == "fit" else []
        text = refused([word, "--ckpt_path", str(path), *more], capsys)
        assert message in text and len(text) < 1500
    after = contents(run)
    assert {name: after[name] for name in before} == before
    assert {name.name for name in after.keys() - before.keys()} <= {"config.resume-1.yaml"}
    for name in after.keys() - before.keys():
        name.unlink()


@pytest.mark.parametrize(
    ("word", "writer"),
    slow_but(zip(cli.TRAINER_WORDS, WRITERS, strict=True), itertools.product(cli.TRAINER_WORDS, WRITERS)),
)
def test_no_word_unpickles_a_checkpoint(
    word: str, writer: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(finished[0].parents[2] / "tiny.yaml")
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    WRITERS[writer]({"state_dict": {}, "hyper_parameters": {"head_lr": Payload(marker)}}, path)
    text = refused([word, "--config", config, "--ckpt_path", str(path)], capsys)
    assert "cannot be read" in text and "weights_only" not in text
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 90, b"hello", b"\x80\x02."], ids=str)
def test_damaged_checkpoints(
    content: bytes, finished: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(content)
    text = refused(["test", "--config", str(finished[0] / "config.yaml"), "--ckpt_path", str(path)], capsys)
    assert f"{path} cannot be read as a file of torch.save" in text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_weight_file_is_unpickled(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    torch.save({"fc.weight": Payload(marker)}, path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    text = refused(["fit", "--config", str(tmp_path / "tiny.yaml"), "--model.weights", str(path)], capsys)
    assert "`weights`: " in text and "cannot be read as a weight file" in text
    assert not marker.exists()


YAMLS: dict[str, tuple[bytes, str]] = {
    "list": (b"[1, 2]", "Unexpected config"),
    "syntax": (b"a: [1", "Problems parsing config"),
    "tabs": (b"a:\n\t- b", "Problems parsing config"),
    "binary": (b"\xff\xfe\x00\x01", "give a YAML file in UTF-8"),
    "tag": (b"name: !!python/object/apply:os.mkdir [marker]", "could not determine a constructor for the tag"),
    "unknown": (b"zzz: 3", "does not accept option 'zzz'"),
    "class": (b"data: {class_path: os.system}", 'key "data": '),
    "callbacks": (b"trainer: {callbacks: [5]}", 'key "trainer.callbacks"'),
    "memory": (b"model: {init_args: {num_classes: 1000000000000}}", "not enough memory"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_configurations_that_cannot_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = YAMLS[name]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "other.yaml").write_bytes(content)
    assert message in refused(["fit", "--config", "tiny.yaml", "--config", "other.yaml"], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.yaml", "other.yaml"}
