"""Runs of the command line that are stopped at any moment and resumed end as if they had never been stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bsdp import cli
from tests.helpers.marks import slow_but
from tests.helpers.resuming import (
    StopAt,
    StopInWrite,
    Stopped,
    differences,
    outcome,
    words_of,
    write_configuration,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

ROOT = Path(__file__).parents[1]
Reference = Callable[..., dict[str, Any]]

# Cuts are made as the epochs 2, 3 and 4 begin; an epoch has four batches.
MOMENTS: list[tuple[str, int, int | None]] = [
    ("on_train_batch_end", 1, 1),  # in the warm-up
    ("on_train_epoch_start", 2, None),  # at the first cut
    ("on_train_batch_start", 2, 3),  # in its epoch
    ("on_before_optimizer_step", 3, None),
    ("on_validation_end", 3, None),
    ("on_train_epoch_end", 4, None),  # before the checkpoint
    ("on_train_end", 5, None),
    ("on_fit_end", 5, None),
]
WRITES = [
    *(("last.ckpt", epoch, when) for epoch, when in ((1, "during"), (2, "before"), (2, "after"))),
    ("epoch=", 3, "after"),  # the checkpoint of the epoch, when the last one is still to be written
    ("last.ckpt", 4, "after"),
    ("pruned.ckpt", 5, "during"),
    ("pruned.ckpt", 5, "before"),
    ("pruned.safetensors", 5, "before"),
    ("summary.json", 5, "before"),
]


def fit(folder: Path, *words: str) -> int:
    return cli.main(["fit", "--config", str(folder / "net.yaml"), f"--trainer.default_root_dir={folder}", *words])


def fit_until_stopped(folder: Path, *words: str) -> None:
    with pytest.raises(Stopped):
        fit(folder, *words)


def run_of(folder: Path) -> Path:
    (run,) = (folder / "net").iterdir()  # and no second folder
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What a run without a stop leaves; made once for the same settings."""
    made: dict[str, dict[str, Any]] = {}

    def make(*words: str, **trainer: Any) -> dict[str, Any]:
        key = f"{words}{trainer}"
        if key not in made:
            folder = tmp_path_factory.mktemp("reference")
            write_configuration(folder, **trainer)
            assert fit(folder, *words) == 0
            made[key] = outcome(run_of(folder))
        return made[key]

    return make


def assert_resumes_exactly(folder: Path, stops: list[list[str]], expected: dict[str, Any], *words: str) -> None:
    """Stop a run again and again, each time further on; its end must be the expected one."""
    resume: list[str] = []
    for stopper in stops:
        fit_until_stopped(folder, *words, *stopper, *resume)
        resume = ["--ckpt_path", "last"]
    assert fit(folder, *words, *resume) == 0
    assert differences(expected, outcome(run_of(folder))) == []


@pytest.mark.parametrize("moments", slow_but([MOMENTS[2::3]], [MOMENTS, MOMENTS[2::3]]), ids=["all", "some"])
def test_stops_in_a_row(tmp_path: Path, reference: Reference, moments: list[tuple[str, int, int | None]]) -> None:
    write_configuration(tmp_path)
    stops = [words_of(StopAt, hook=hook, epoch=epoch, batch=batch) for hook, epoch, batch in moments]
    expected = reference()
    assert len(expected["pruner"]["record"]["rounds"]) == 4
    assert_resumes_exactly(tmp_path, stops, expected)


@pytest.mark.parametrize("writes", slow_but([WRITES[::3]], [WRITES, WRITES[::3]]), ids=["all", "some"])
def test_stops_while_files_are_written(
    tmp_path: Path, reference: Reference, writes: list[tuple[str, int, str]]
) -> None:
    write_configuration(tmp_path)
    stops = [words_of(StopInWrite, file=file, epoch=epoch, when=when) for file, epoch, when in writes]
    assert_resumes_exactly(tmp_path, stops, reference())


def test_what_a_killed_process_leaves_is_cleared_away(tmp_path: Path, reference: Reference) -> None:
    """As a process that is killed while it writes leaves it, see below: half a file under another name."""
    write_configuration(tmp_path)
    fit_until_stopped(tmp_path, *words_of(StopAt, hook="on_train_epoch_end", epoch=2))
    run = run_of(tmp_path)
    (run / "checkpoints" / ".last.ckpt.partial").write_bytes(b"half of it")
    (run / ".pruned.ckpt.partial").write_bytes(b"half of it")
    assert fit(tmp_path, "--ckpt_path", "last") == 0
    assert differences(reference(), outcome(run)) == []
    assert not list(run.rglob("*.partial"))


def kill(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own, which is going to kill itself."""
    words = ("fit", "--config", str(folder / "net.yaml"), f"--trainer.default_root_dir={folder}", *words)
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


KILLS = {
    "step": words_of(StopAt, hook="on_after_backward", epoch=3, kill=True),
    "last": words_of(StopInWrite, file="last.ckpt", epoch=2, when="during", kill=True),
    "pruned": words_of(StopInWrite, file="pruned.ckpt", epoch=5, when="during", kill=True),
    "weights": words_of(StopInWrite, file="pruned.safetensors", epoch=5, when="before", kill=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("names", [("last",), ("step",), ("pruned", "weights")])
def test_killed_processes(tmp_path: Path, reference: Reference, names: tuple[str, ...]) -> None:
    runs = {}
    for name in names:
        (tmp_path / name).mkdir()
        write_configuration(tmp_path / name)
        runs[name] = kill(tmp_path / name, *KILLS[name])
    for name, process in runs.items():
        assert process.wait(timeout=300) == -signal.SIGKILL, name
        run = run_of(tmp_path / name)
        assert (run / ".pruned.ckpt.partial").exists() is (name == "pruned")
        assert (run / "checkpoints" / ".last.ckpt.partial").exists() is (name == "last")
        assert fit(tmp_path / name, "--ckpt_path", "last") == 0
        assert differences(reference(), outcome(run)) == []
        assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(
    ("words", "trainer", "moments"),
    [
        pytest.param(["--data.num_workers=2"], {}, [MOMENTS[2]], id="workers"),
        pytest.param(
            ["--data.num_workers=2"], {}, [MOMENTS[0], MOMENTS[2]], id="workers twice", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--model.schedule=plateau"], {}, [("on_train_epoch_start", 2, None)], id="plateau", marks=pytest.mark.slow
        ),
        pytest.param([], {"val_check_interval": 0.5}, [("on_train_batch_end", 2, 2)], id="validations"),
        pytest.param([], {"val_check_interval": 0.5}, [MOMENTS[4]], id="last validation", marks=pytest.mark.slow),
        pytest.param(
            [], {"check_val_every_n_epoch": 2}, [MOMENTS[1], MOMENTS[5]], id="rare validations", marks=pytest.mark.slow
        ),
        pytest.param(
            [], {"accumulate_grad_batches": 3}, [MOMENTS[0], MOMENTS[3]], id="accumulation", marks=pytest.mark.slow
        ),
    ],
)
def test_settings(
    tmp_path: Path,
    reference: Reference,
    words: list[str],
    trainer: dict[str, Any],
    moments: list[tuple[str, int, int | None]],
) -> None:
    if "check_val_every_n_epoch" in trainer:
        words = [*words, "--trainer.callbacks.tolerance=null"]
    write_configuration(tmp_path, **trainer)
    stops = [words_of(StopAt, hook=hook, epoch=epoch, batch=batch) for hook, epoch, batch in moments]
    expected = reference(*(word for word in words if "workers" not in word), **trainer)
    assert_resumes_exactly(tmp_path, stops, expected, *words)


@pytest.mark.parametrize("step", slow_but([6], [3, 6, 9, 12]))
def test_checkpoint_of_any_step(tmp_path: Path, reference: Reference, step: int) -> None:
    write_configuration(tmp_path)
    every = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3, "save_top_k": -1}}
    words = ["--trainer.callbacks+", json.dumps(every)]
    assert fit(tmp_path, *words) == 0
    run = run_of(tmp_path)
    (checkpoint,) = (run / "checkpoints").glob(f"*step={step}.ckpt")
    shutil.copy(checkpoint, run / "checkpoints" / "any.ckpt")
    assert fit(tmp_path, *words, "--ckpt_path", str(run / "checkpoints" / "any.ckpt")) == 0
    assert differences(reference(), outcome(run)) == []


def test_finished_runs_can_be_resumed(tmp_path: Path, reference: Reference) -> None:
    plateau = "--model.schedule=plateau"
    write_configuration(tmp_path)
    assert fit(tmp_path, plateau) == 0
    run = run_of(tmp_path)
    (run / "summary.json").unlink()
    assert fit(tmp_path, plateau, "--ckpt_path", "last") == 0
    different = differences(reference(plateau), outcome(run))
    # The step that the schedule would make after the last epoch is of no use, and is not made up for.
    assert [name for name in different if not name.startswith(("/pruned optimizer_states", "/pruned lr_sch"))] == []
    assert fit(tmp_path, plateau, "--ckpt_path", "last", "--trainer.max_epochs=7") == 0
    rows = outcome(run)["rows"]
    assert rows[: len(reference(plateau)["rows"])] == reference(plateau)["rows"]
    for column in ("val_loss", "train_loss_epoch", "bsdp/params"):
        assert [row["epoch"] for row in rows if row[column]] == list("0123456")


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "on_before_zero_grad",
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
    ],
)
@pytest.mark.parametrize("interval", [1.0, 0.25])
def test_one_stop(tmp_path: Path, reference: Reference, hook: str, epoch: int, interval: float) -> None:
    write_configuration(tmp_path, val_check_interval=interval)
    stops = [words_of(StopAt, hook=hook, epoch=epoch)]
    assert_resumes_exactly(tmp_path, stops, reference(val_check_interval=interval))
