"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
import pytest

import bsdp
from tests.helpers.pruning_runs import Classifier, Stripes, small_network

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
