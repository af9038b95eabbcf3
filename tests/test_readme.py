"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import bsdp
from bsdp import cli
from tests.helpers.pruning_runs import Classifier, Stripes, small_network
from tests.helpers.tiny_run import write_run

README = Path(__file__).parents[1] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:no pruned model was within")
def test_drop_in_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = blocks()[0]
    assert len(example.splitlines()) < 15
    real = lightning.Trainer

    def trainer(**options: Any) -> lightning.Trainer:
        return real(**options, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    monkeypatch.setattr(lightning, "Trainer", trainer)
    model = Classifier()
    exec(compile(example, str(README), "exec"), {"model": model, "data": Stripes()})
    assert bsdp.named_pairs(model)
    monkeypatch.setattr(lightning, "Trainer", real)

    loading = {"bsdp": bsdp, "MyNetwork": small_network}
    exec(compile(blocks()[1], str(README), "exec"), loading)
    assert not bsdp.named_pairs(loading["network"])  # type: ignore[arg-type]


def commands(word: str) -> list[list[str]]:
    """The words of every command of that name in the README."""
    return [line.split() for line in re.findall(rf"^bsdp ({word} .*)$", README.read_text(), flags=re.MULTILINE)]


def test_deploying_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "logs" / "run" / "version_0")
    assert [len(commands(word)) for word in ("export", "describe", "benchmark")] == [1, 1, 1]
    assert cli.main(commands("export")[0]) == 0 and Path("logs/run/version_0/model.onnx").is_file()
    assert cli.main(commands("describe")[0]) == 0
    assert cli.main([*commands("benchmark")[0], "--repeats", "1"]) == 0
    assert "speed-up / MAC reduction" in capsys.readouterr().out
    images = torch.zeros(1, 1, 8, 8)
    exec(compile(blocks()[2], str(README), "exec"), {"bsdp": bsdp, "network": small_network(), "images": images})
    assert "largest difference from PyTorch" in capsys.readouterr().out and Path("model.onnx").is_file()


def test_training_free_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in blocks() if "bsdp.compress(" in block)
    loader = [torch.randn(24, 1, 8, 8)]
    names = {"bsdp": bsdp, "network": small_network(), "loader": loader, "val_images": loader[0]}
    names["val_labels"] = small_network()(loader[0]).argmax(1)
    exec(compile(example, str(README), "exec"), names)
    assert "output change" in capsys.readouterr().out


def test_files_and_commands_exist() -> None:
    text = README.read_text()
    root = README.parent
    for name in re.findall(r"--config (configs/[\w/.-]+)", text):
        assert (root / name).is_file(), name
    for name in re.findall(r"--config ((?:base|data|callbacks|logger)[\w/-]*)", text):
        assert (root / "configs" / f"{name}.yaml").is_file(), name
    for name in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (root / name).exists(), name
    for command in ("pip install uv && uv run train.py fit --config configs/quickstart.yaml", "uv run pytest"):
        assert command in text
    assert "US 12,288,160 B2" in text
