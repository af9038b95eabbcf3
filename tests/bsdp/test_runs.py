"""Which checkpoint a run goes on from, and how checkpoints get onto the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from bsdp.callbacks._checkpoint_io import WholeFileIO, write_whole_checkpoints
from bsdp.callbacks._random_states import random_states, restore_random_states
from bsdp.resume import LastCheckpoint
from bsdp.runs import find_checkpoint
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer


def run(root: Path, name: str, checkpoints: Iterable[str], *, age: int = 0) -> Path:
    """A run folder whose checkpoints are the older the later they are named; those called ``bad`` are damaged."""
    folder = root / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    os.utime(folder / "config.yaml", (-100 - age, -100 - age))
    for i, file in enumerate(checkpoints):
        path = folder / "checkpoints" / file.removeprefix("bad ")
        torch.save({"state_dict": {"weight": torch.zeros(100)}}, path)
        if file.startswith("bad "):
            path.write_bytes(path.read_bytes()[:500])
        os.utime(path, (-i - age, -i - age))
    return folder / "checkpoints"


def test_a_damaged_last_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    folder = run(tmp_path, "net/version_0", ["bad last.ckpt", "bad epoch=3.ckpt", "epoch=2.ckpt", "epoch=1.ckpt"])
    run(tmp_path, "net/version_1", ["last.ckpt"], age=10)
    with pytest.warns(UserWarning) as warned:
        assert find_checkpoint("last", root=tmp_path) == folder / "epoch=2.ckpt"
    texts = [str(warning.message) for warning in warned]
    assert len(texts) == 2
    for text, name in zip(texts, ("last.ckpt", "epoch=3.ckpt"), strict=True):
        assert str(folder / name) in text and f"goes on from {str(folder / 'epoch=2.ckpt')!r}" in text


def test_the_last_checkpoint_comes_before_others_of_its_run(tmp_path: Path) -> None:
    folder = run(tmp_path, "net/version_0", ["epoch=2.ckpt", "last.ckpt", ".last.ckpt.partial"])
    assert find_checkpoint("last", root=tmp_path) == folder / "last.ckpt"


def test_a_run_with_damaged_checkpoints_only_is_an_error(tmp_path: Path) -> None:
    folder = run(tmp_path, "net/version_0", ["bad last.ckpt", "bad epoch=1.ckpt"])
    run(tmp_path, "net/version_1", ["last.ckpt"], age=10)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*last\.ckpt.*epoch=1\.ckpt") as error:
        find_checkpoint("last", root=tmp_path)
    assert str(folder) in str(error.value)


def test_a_later_run_without_any_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    older = run(tmp_path, "net/version_1", ["last.ckpt"], age=10)
    run(tmp_path, "net/version_0", [], age=-99)
    with pytest.raises(FileNotFoundError, match=r"version_0', ended before its first checkpoint.*last\.ckpt"):
        find_checkpoint("last", root=tmp_path, name="net")
    os.utime(tmp_path / "net/version_0/config.yaml", (-200, -200))
    assert find_checkpoint("last", root=tmp_path, name="net") == older / "last.ckpt"


def saved_by(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Let the write of a checkpoint fail: halfway, or as it is moved."""
    real = torch.save

    def half(content: Any, file: Any) -> None:
        real(content, file)
        file.truncate(100)
        raise KeyboardInterrupt

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((torch, "save", half) if at == "write" else (os, "replace", fail)))


@pytest.mark.parametrize("at", ["write", "move"])
def test_interrupted_writes_leave_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path, writer = tmp_path / "new folder" / "a.ckpt", WholeFileIO()
    writer.save_checkpoint({"value": torch.ones(3)}, path)
    saved_by(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"value": torch.zeros(3)}, str(path))
    assert torch.equal(torch.load(path, weights_only=True)["value"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]


def test_only_what_lightning_chose_itself_is_replaced(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for plugin in (Own(), AsyncCheckpointIO()):
        trainer = make_trainer(tmp_path, [], plugins=[plugin])
        write_whole_checkpoints(trainer)
        assert trainer.strategy.checkpoint_io is plugin
    trainer = make_trainer(tmp_path, [])
    write_whole_checkpoints(trainer)
    assert type(trainer.strategy.checkpoint_io) is WholeFileIO


@pytest.mark.parametrize(
    ("options", "within", "ends"),
    [
        ({}, [], [3, 6]),
        ({"check_val_every_n_epoch": 2}, [], [3, 6]),
        ({"limit_val_batches": 0}, [], [3, 6]),
        ({"val_check_interval": 1}, [1, 2, 4, 5], [3, 6]),
        ({"max_steps": 5}, [], [3, 5]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, [2, 4], [3, 6]),
    ],
)
def test_last_is_of_every_epochs_end(
    tmp_path: Path, options: dict[str, Any], within: list[int], ends: list[int]
) -> None:
    saved: dict[bool, list[int]] = {False: [], True: []}

    class Note(Callback):
        def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
            epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            saved[epoch["processed"] > epoch["completed"]].append(checkpoint["global_step"])

    settings = {"max_epochs": 2, "enable_checkpointing": True, **options}
    make_trainer(tmp_path, [Note(), LastCheckpoint()], **settings).fit(Classifier(), datamodule=Stripes())
    assert (saved[False], saved[True]) == (within, ends)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]


def test_random_states_go_through_a_file(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]

    draw()  # half of the normal numbers that Python and NumPy make by twos
    torch.save(random_states(), tmp_path / "states.pt")
    expected = [draw() for _ in range(3)]
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert [draw() for _ in range(3)] == expected
