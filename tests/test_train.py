"""``python train.py`` from end to end: a fit in a process of its own, what is quicker in this one."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bsdp import cli

TRAIN = Path(__file__).parents[1] / "train.py"
CONFIG = {
    "name": "tiny",
    "model": {"init_args": {"backbone": "bsdp:resnet20", "weights": "none"}},
    "data": {"class_path": "bsdp.datamodules.DigitsDataModule", "init_args": {"image_size": 8}},
    "trainer": {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_test_batches": 1},
}


def train(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TRAIN), *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_fit_then_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    fitted = train(tmp_path, "fit", "--config", "base", "--config", "tiny.yaml")
    assert fitted.returncode == 0, fitted.stderr
    run = tmp_path / "logs" / "tiny" / "version_0"
    assert f"Run folder: {run}" in fitted.stdout
    assert "litlogger" not in fitted.stdout + fitted.stderr and "Deprecat" not in fitted.stderr

    assert cli.main(["test", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert "test_accuracy" in capsys.readouterr().out


def test_a_mistake_gives_code_2_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "fit", "--config", "nowhere.yaml"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert leaving.value.code == 2
    shown = capsys.readouterr().err
    assert "`config`: 'nowhere.yaml' is no file" in shown and "Traceback" not in shown
