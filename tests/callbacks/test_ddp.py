"""Distributed runs: two processes on the CPU (gloo), started by Lightning's own launcher.

One launch for all tests that run by default, one more for the slow ones.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ddp_run import SCENARIOS
from tests.helpers.marks import slow_but

Results = Callable[[str], list[dict[str, Any]]]

# What is left out differs from one of these in a setting of DDP or of the scores, or in that all goes well.
QUICK = ("plain", "energy", "nan", "disagree", "examples", "broken", "channel", "double")
SLOW = tuple(name for name in SCENARIOS if name not in QUICK)
ALL = slow_but(QUICK, SCENARIOS)


def some(*names: str) -> list[Any]:
    return slow_but([name for name in names if name in QUICK], names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What both processes saw of a scenario."""
    seen: dict[str, list[dict[str, Any]]] = {}

    def result(name: str) -> list[dict[str, Any]]:
        if name not in seen:
            seen.update(launch(folder, QUICK if name in QUICK else SLOW))
        return seen[name]

    return result


def launch(folder: Path, names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Run scenarios one after another; gives what both processes saw of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.helpers.ddp_run", str(folder), *names]
    log = folder / f"log-{next(iter(names))}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=600)
        finally:
            with suppress(ProcessLookupError):  # both processes: one that hangs must not outlive the test
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, log.read_text()[-9000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)] for name in names}


def assert_equal_everywhere(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    assert first["world_size"] == second["world_size"] == 2
    for key in ("ranks", "rounds", "chosen", "stopped"):
        assert first[key] == second[key], key
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


@pytest.mark.parametrize("name", ALL)
def test_same_ranks_records_and_weights_in_both_processes(results: Results, name: str) -> None:
    assert_equal_everywhere(results(name))


@pytest.mark.parametrize("name", some("plain", "unused", "energy", "norm", "nan", "curvature", "examples"))
def test_the_model_shrinks_and_learns_on_with_its_momentum(results: Results, name: str) -> None:
    for result in results(name):
        sizes = [entry["bases"] for entry in result["rounds"]]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        assert list(result["rounds"][-1]["ranks"].values()) == result["ranks"]
        assert all(entry["fits"] for entry in result["momentum"]) and result["momentum"][-1]["any"]
        assert result["losses"][-1] < result["losses"][0]


def test_scores_are_the_mean_of_both_processes(results: Results) -> None:
    first, second = results("plain")
    for ours, theirs in zip(first["reductions"], second["reductions"], strict=True):
        a, b = ours["before"]["scores"], theirs["before"]["scores"]
        assert not torch.equal(a, b)  # DDP had averaged the gradients; the test trebles the scores of one process
        torch.testing.assert_close(ours["after"]["scores"], (a + b) / 2)
        assert torch.equal(ours["after"]["scores"], theirs["after"]["scores"])


@pytest.mark.parametrize("name", some("curvature", "examples"))
def test_scores_of_other_images_in_each_process_are_averaged(results: Results, name: str) -> None:
    first, second = results(name)
    unequal = 0
    for ours, theirs in zip(first["reductions"], second["reductions"], strict=True):
        assert torch.equal(ours["after"]["scores"], theirs["after"]["scores"])
        a, b = ours["before"]["scores"], theirs["before"]["scores"]
        if a is not None and b is not None:
            unequal += not torch.equal(a, b)
            torch.testing.assert_close(ours["after"]["scores"], (a + b) / 2)
    assert unequal >= (1 if name == "examples" else 0)
    steps = {"curvature": [2, 2], "examples": [48, 48]}  # batches or images of one process
    assert first["steps"] == second["steps"] == steps[name]


def test_feature_statistics_are_the_mean_of_both_processes(results: Results) -> None:
    first, second = results("energy")
    unequal = 0
    for ours, theirs in zip(first["reductions"], second["reductions"], strict=True):
        for name, a in ours["before"]["squares"].items():
            b = theirs["before"]["squares"][name]
            unequal += not torch.equal(a, b)
            torch.testing.assert_close(ours["after"]["squares"][name], (a + b) / 2)
            assert torch.equal(ours["after"]["squares"][name], theirs["after"]["squares"][name])
    assert unequal >= 2 * 3  # two layers in three epochs before the last cut saw other images in each process


def test_one_process_without_statistics_keeps_those_of_both(results: Results) -> None:
    text = "the batch norms keep their statistics after this cut"
    for result in results("broken"):
        found = [warning for warning in result["warnings"] if text in warning]
        assert len(found) <= 1  # the other cuts recalibrate
    assert any(f"{text}: the training batches of another process" in w for w in results("broken")[0]["warnings"])


@pytest.mark.slow
def test_statistics_of_both_processes_need_no_warning(results: Results) -> None:
    for result in results("measured"):
        assert not any("the batch norms keep their statistics" in warning for warning in result["warnings"])


def test_the_monitored_value_is_the_mean_of_both_processes(results: Results) -> None:
    first, second = results("plain")
    means = [(a + b) / 2 for a, b in zip(first["monitored"], second["monitored"], strict=True)]
    assert first["monitored"] != second["monitored"]
    bests = [entry["accuracy_best"] for entry in first["rounds"]]
    assert bests == pytest.approx([means[0], means[1], max(means[2:])])


def test_one_process_below_the_tolerance_stops_both(results: Results) -> None:
    for result in results("disagree"):
        assert result["stopped"]
        assert result["chosen"] == 0
        assert len(result["rounds"]) == 2
        assert result["ranks"] == [9, 24]


def test_nan_in_one_process_costs_the_step_or_the_round_in_both(results: Results) -> None:
    for result in results("nan"):
        # Of the 3 steps of the warm-up, the broken one counts nowhere; the next epoch brings none, which skips the
        # second round; the scores of the epochs since the last cut then decide.
        assert result["steps"] == [2, 0, 3]
        assert [entry["epoch"] for entry in result["rounds"]] == [0, 1, 3]
        assert any("pruning round 2 is skipped" in text for text in result["warnings"])
        assert all(value.isfinite().all() for value in result["state"].values())


@pytest.mark.parametrize("name", some("norm", "broken"))
def test_batch_norms_that_follow_the_data_do_so_in_both(results: Results, name: str) -> None:
    for result in results(name):
        assert result["state"]["network.0.1.running_mean"].any()


def test_resume(results: Results) -> None:
    for result in results("plain"):
        resumed = result["resumed"]
        assert resumed["ranks"] == result["ranks"]
        for name, value in result["state"].items():
            assert torch.equal(value, resumed["state"][name]), name


@pytest.mark.parametrize("name", ALL)
def test_files_are_written_once(results: Results, folder: Path, name: str) -> None:
    first, second = results(name)
    assert first["files"] == second["files"]
    found = sorted(path.name for path in (folder / name).rglob("pruned*") if "resumed" not in path.parts)
    assert found == ["pruned.ckpt", "pruned.safetensors"]


def test_one_process_reports(results: Results) -> None:
    first, second = results("plain")
    assert first["summary"]["accuracy_pruned"] is not None
    assert second["summary"] is None


def test_our_logged_values_need_no_advice(results: Results) -> None:
    advice = [text for name in QUICK for result in results(name) for text in result["warnings"]]
    assert any("sync_dist" in text and "val_accuracy" in text for text in advice)  # the module's own, on purpose
    assert not [text for text in advice if "bsdp/" in text]


@pytest.mark.parametrize("name", some("channel", "factors", "double"))
def test_channels_shrink_in_both(results: Results, name: str) -> None:
    for result in results(name):
        sizes = [entry["params"] for entry in result["rounds"]]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
        assert sum(result["rounds"][-1]["channels"].values()) < sum(result["rounds"][0]["channels"].values())


def test_channel_scores_are_those_of_both_processes(results: Results) -> None:
    first, second = results("channel")
    assert torch.equal(first["sums"][0], second["sums"][0]) and first["sums"][0].any()


def test_one_decision_on_the_split_from_the_images_of_both(results: Results) -> None:
    first, second = results("double")
    assert first["own"] != second["own"]
    assert first["tried"][-1] and first["tried"] == second["tried"]
