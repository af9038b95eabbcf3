"""Methods at several sizes: what runs, which size is chosen, and the verdict."""

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks._frontier import is_peer, markdown, points, smallest, verdict
from benchmarks._frontier_plot import figure
from benchmarks._methods import at_target, build_method, build_methods, read_task
from benchmarks._reports import report
from benchmarks._tables import read_rows
from tests.helpers.fake_fits import FakeFits

Row = dict[str, Any]


def words(tmp_path: Path, *more: str) -> list[str]:
    methods = ["--methods", "basis,tp_l1", "--targets", "0.5,0.9"]
    return ["--task", "digits", *methods, "--seeds", "0,1", "--output", str(tmp_path / "out"), *more]


def row(method: str, target: float | None, seed: int, validation: float, accuracy: float, **more: Any) -> Row:
    kept = 1.0 if target is None else 1.0 - target
    sizes = {"params_ratio": kept, "macs_ratio": kept, "latency_ratio": None, "accuracy_reference": None}
    ids = {"task": "t", "method": method, "target": target, "seed": seed, "epochs": 9, "minutes": 1.0}
    return {**ids, "validation": validation, "accuracy": accuracy, **sizes, **more}


def both(method: str, target: float | None, validation: tuple[float, float], accuracy: float, **more: Any) -> list[Row]:
    return [row(method, target, seed, value, accuracy, **more) for seed, value in enumerate(validation)]


TUNED = both("finetune", None, (0.95, 0.96), 0.94)


# --- runs


def test_every_method_runs_at_every_size(fits: FakeFits, tmp_path: Path) -> None:
    assert compare.main(words(tmp_path, "--data.samples_per_class", "50")) == 0
    one = ["finetune", "basis@0.5", "basis@0.9", "tp_l1@0.5", "tp_l1@0.9"]
    assert fits.fits() == [(label, seed) for seed in "01" for label in one]
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [(r["method"], r["target"]) for r in rows[:3]] == [("finetune", None), ("basis", 0.5), ("basis", 0.9)]
    assert {(r["task"], r["samples_per_class"]) for r in rows} == {("digits_50_per_class", 50)}
    assert (rows[0]["validation"], rows[1]["validation"], rows[1]["validation_reference"]) == (0.2, 0.88, 0.89)
    fits.calls.clear()
    assert compare.main(words(tmp_path, "--data.samples_per_class", "50")) == 0
    assert fits.calls == []


def test_a_method_that_cannot_run_is_left_out_with_the_reason(
    fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits.fails = {"trial:tp_l1@0.5"}
    assert compare.main(words(tmp_path)) == 0
    assert {label for label, _ in fits.fits()} == {"finetune", "basis@0.5", "basis@0.9"}
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [(r["method"], r["accuracy"]) for r in rows if "skipped" in r] == [("tp_l1", None)]
    shown = capsys.readouterr().out
    assert "left out: tp_l1: bsdp fit: error: no graph" in shown
    assert "- digits, tp_l1: bsdp fit: error: no graph" in shown
    fits.fails.clear()
    assert compare.main(words(tmp_path)) == 0  # tried again; the reason is gone
    assert not any("skipped" in r for r in read_rows(tmp_path / "out" / "results.json"))
    assert ("tp_l1@0.9", "1") in fits.fits()


def test_without_the_baseline_nothing_runs(fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits.fails = {"trial:finetune"}
    assert compare.main(words(tmp_path)) == 2
    assert "finetune: bsdp fit: error: no graph" in capsys.readouterr().err
    assert fits.fits() == []


def test_a_target_holds_for_all_stages_and_overrules_the_tolerance() -> None:
    task = read_task("digits", {"callbacks.IterativeBasisPruning.tolerance": 0.02}, 30)
    method = at_target(build_method("channel+basis", task), 0.9)
    assert (method.name, method.label, method.target) == ("channel+basis", "channel+basis@0.9", 0.9)
    given = [callback["init_args"] for stage in method.stages for callback in stage["trainer"]["callbacks"]]
    pruned = [(a["target"], a["tolerance"]) for a in given if "target" in a]
    assert pruned == [(pytest.approx(1 - 0.1**0.5), None)] * 2
    peer = at_target(build_method("tp_taylor", task), 0.9).stages[0]["trainer"]["callbacks"][0]["init_args"]
    assert peer["target"] == 0.9
    assert "tolerance" not in peer


def test_a_method_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="`--targets`: 'cap' has no target"):
        build_methods(["cap"], read_task("digits", {}, 30), [0.5])


@pytest.mark.parametrize("targets", ["0.5,0.5", "1.0", "half", "0"])
def test_sizes_are_shares(targets: str, fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(words(tmp_path, "--targets", targets)) == 2
    assert "`--targets` must be different shares" in capsys.readouterr().err


def test_another_network_size_or_number_of_images_is_another_task(fits: FakeFits, tmp_path: Path) -> None:
    more = ["--model.backbone", "torchvision:mobilenet_v2", "--data.samples_per_class", "10", "--data.image_size", "64"]
    assert compare.main(words(tmp_path, "--seeds", "0", *more)) == 0
    tasks = {r["task"] for r in read_rows(tmp_path / "out" / "results.json")}
    assert tasks == {"digits_mobilenet_v2_64px_10_per_class"}


# --- the choice


def test_the_choice_is_made_on_validation_images_over_the_seeds() -> None:
    rows = [
        *TUNED,
        *both("a", 0.5, (0.95, 0.96), 0.80),
        *both("a", 0.7, (0.935, 0.96), 0.70),  # 0.75 points below in the mean, although 1.5 with one seed
        *both("a", 0.9, (0.935, 0.954), 0.99),  # 1.05 below, the best on test images
    ]
    chosen = smallest([p for p in points(rows) if p.method == "a"], "params_ratio")
    assert chosen is not None
    assert (chosen.target, chosen.below) == (0.7, pytest.approx(0.75))
    assert chosen.below_test == pytest.approx(24.0)
    assert "| a | both | 0.7 | 70.00% | +0.75 | +24.00 | 30.0% | 30.0% | - | - | 1.0 |" in markdown(rows)


def test_the_bar_is_the_higher_of_the_two_baselines_of_each_seed() -> None:
    rows = [*TUNED, *both("a", 0.5, (0.945, 0.955), 0.9, validation_reference=0.97)]
    assert points(rows)[1].below == pytest.approx(2.0)
    assert smallest(points(rows)[1:], "params_ratio") is None
    assert "| a | - | none |" in markdown(rows)


def test_nothing_is_chosen_where_a_seed_has_no_baseline() -> None:
    rows = [TUNED[0], *both("a", 0.5, (0.95, 0.96), 0.9)]
    assert points(rows)[1].below is None
    assert smallest(points(rows)[1:], "params_ratio") is None


def test_the_smallest_by_macs_may_be_another_one() -> None:
    rows = [*TUNED, *both("a", 0.5, (0.95, 0.96), 0.9, macs_ratio=0.2), *both("a", 0.7, (0.95, 0.96), 0.9)]
    own = points(rows)[1:]
    assert [p.target for key in ("params_ratio", "macs_ratio") if (p := smallest(own, key))] == [0.7, 0.5]
    text = markdown(rows)
    assert "| a | parameters | 0.7 |" in text
    assert "| a | MACs | 0.5 |" in text


def test_the_table_has_the_accuracy_at_each_size() -> None:
    rows = [*TUNED, row("a", 0.5, 0, 0.95, 0.9), row("a", 0.5, 1, 0.96, 0.92), row("tp_l1", 0.9, 0, 0.5, 0.4)]
    text = markdown(rows)
    assert "| a | 91.00% (90.00% to 92.00%) (50.0% / 50.0%, 2 seeds) | - |" in text
    assert "| tp_l1 | - | 40.00% (10.0% / 10.0%, 1 seed) |" in text
    assert "fine-tuned: 94.00% (seeds 0, 1; 9 epochs)" in text


# --- the verdict


@pytest.mark.parametrize(
    ("macs", "outcome"), [(0.1, "ratios 0.33 and 0.50, .* is met"), (0.15, "ratios 0.33 and 0.75, .* is missed")]
)
def test_ours_needs_two_thirds_of_both_against_the_best_peers(macs: float, outcome: str) -> None:
    rows = [*TUNED, *both("ours", 0.9, (0.95, 0.96), 0.9, macs_ratio=macs)]
    rows += both("tp_l1", 0.7, (0.95, 0.96), 0.9)  # the best peer in parameters
    rows += both("paper", 0.5, (0.95, 0.96), 0.9, macs_ratio=0.2)  # the best peer in MACs
    rows += both("tp_taylor", 0.95, (0.5, 0.5), 0.99)  # too far below on validation images
    line = verdict(points(rows)).text
    assert "30.0% of the parameters (tp_l1@0.7) and 20.0% of the MACs (paper@0.5)" in line
    assert re.search(outcome, line)


def test_where_no_peer_is_near_the_unpruned_network_is_the_peer() -> None:
    rows = [*TUNED, *both("ours", 0.5, (0.95, 0.96), 0.9), *both("tp_l1", 0.5, (0.8, 0.8), 0.8)]
    line = verdict(points(rows)).text
    assert "100.0% of the parameters (unpruned)" in line
    assert "ratios 0.50 and 0.50" in line


def test_without_a_network_of_ours_within_a_point_there_is_no_ratio() -> None:
    found = verdict(points([*TUNED, *both("ours", 0.5, (0.8, 0.8), 0.8)]))
    assert (found.text, found.met, found.params) == ("No network of ours is within 1 point.", False, None)


def test_one_network_of_ours_has_to_be_ahead_in_both() -> None:
    rows = [*TUNED, *both("tp_l1", 0.5, (0.95, 0.96), 0.9)]
    rows += both("ours", 0.8, (0.95, 0.96), 0.9, macs_ratio=0.45)
    rows += both("ours", 0.5, (0.95, 0.96), 0.9, macs_ratio=0.1)
    rows += both("ours", 0.7, (0.95, 0.96), 0.9, macs_ratio=0.3)
    found = verdict(points(rows))
    assert (found.met, found.params, found.macs) == (True, pytest.approx(0.6), pytest.approx(0.6))
    assert "ours@0.7" in found.text


def test_several_tasks_are_counted() -> None:
    one = [*TUNED, *both("ours", 0.9, (0.95, 0.96), 0.9), *both("tp_l1", 0.5, (0.95, 0.96), 0.9)]
    other = [{**r, "task": "u"} for r in [*TUNED, *both("ours", 0.5, (0.95, 0.96), 0.9)]]
    worse = [{**r, "task": "v"} for r in [*TUNED, *both("ours", 0.3, (0.95, 0.96), 0.9)]]
    assert "is met on 2 of 3 tasks" in markdown([*one, *other, *worse])


def test_peers_are_the_methods_of_others_and_variants_of_them() -> None:
    names = ["tp_taylor", "tp_l1_long", "finetune+taylor_2019", "paper", "basis", "finetune+prune_tuned", "double"]
    assert [is_peer(name) for name in names] == [True] * 4 + [False] * 3


def test_the_picture_has_a_line_per_method() -> None:
    rows = [*TUNED, *both("a", 0.5, (0.9, 0.9), 0.9), *both("a", 0.9, (0.9, 0.9), 0.8)]
    axes = figure(rows).axes[0]
    drawn = {container.get_label(): container.lines[0] for container in axes.containers}
    assert drawn["a"].get_xdata().tolist() == pytest.approx([10.0, 50.0])
    assert drawn["a"].get_ydata().tolist() == pytest.approx([80.0, 90.0])
    with pytest.raises(ValueError, match="one task, got those of"):
        figure([*rows, {**rows[0], "task": "u"}])


def test_rows_with_and_without_sizes_can_be_shown_together() -> None:
    plain = {**row("basis", None, 0, 0.9, 0.9), "task": "u"}
    text = report([*TUNED, *both("a", 0.5, (0.95, 0.96), 0.9), plain])
    assert "| u | basis | 0 |" in text
    assert "### t" in text
    assert "| t | finetune" not in text
