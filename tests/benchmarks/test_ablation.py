"""``benchmarks/ablation.py`` on fits that are not run: which variants, what each one changes, which tables."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import bsdp.callbacks
from benchmarks import ablation
from benchmarks._ablation_tables import markdown
from benchmarks._ideas import ALL, IDEAS, PLAIN, ablation_methods, variants
from benchmarks._methods import EXPERIMENTS, Method, read_task
from benchmarks._tables import read_rows
from bsdp.task import TransferTask
from tests.helpers.fake_fits import FakeFits

Config = dict[str, Any]


def words(tmp_path: Path, *more: str) -> list[str]:
    return ["--task", "digits", "--seeds", "0", "--epochs", "20", "--output", str(tmp_path / "out"), *more]


def methods() -> dict[str, Method]:
    return {method.name: method for method in ablation_methods(read_task("digits", {}, 20), target=0.6)}


def settings_of(method: Method) -> Config:
    """Every setting of a method's model and callbacks by ``model.NAME`` or ``CALLBACK.NAME``."""
    config = method.stages[0]
    found = {f"model.{key}": value for key, value in config["model"]["init_args"].items()}
    for callback in config["trainer"]["callbacks"]:
        kind = callback["class_path"].rsplit(".", 1)[-1]
        found |= {f"{kind}.{key}": value for key, value in callback["init_args"].items()}
    return found


# --- variants


def test_every_idea_is_alone_and_beside_the_others_under_names_of_its_own() -> None:
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names) == 2 + 2 * len(IDEAS)
    assert names[0] == PLAIN and names[1 + len(IDEAS)] == ALL
    assert list(methods()) == ["finetune", *names]
    assert {name for name in names if name.startswith("without_")} == {f"without_{i.name}" for i in IDEAS if i.in_all}


def test_a_variant_differs_from_its_frame_in_just_its_idea() -> None:
    made = methods()
    for variant in variants():
        if variant.idea is None:
            continue
        own, frame = settings_of(made[variant.name]), settings_of(made[variant.frame])
        changed = {key for key in own.keys() | frame.keys() if own.get(key) != frame.get(key)}
        gone = [key for idea in IDEAS if idea.name in variant.idea.instead_of for key in idea.settings]
        allowed = {*variant.idea.settings, *((*variant.idea.beside, *gone) if variant.frame == ALL else ())}
        assert changed and changed <= allowed, variant.name
        if variant.frame == PLAIN or not variant.idea.in_all:
            assert changed >= set(variant.idea.settings) - {"BasisDecomposition.metric"}, variant.name
        data = [made[name].stages[0]["data"] for name in (variant.name, variant.frame)]
        assert data[0] == data[1]


def test_leaving_an_idea_out_of_all_gives_what_plain_has_there() -> None:
    made = {name: settings_of(method) for name, method in methods().items()}
    for idea in IDEAS:
        if idea.in_all:
            for key in idea.settings:
                left_out, plain, every = (made[name].get(key) for name in (f"without_{idea.name}", PLAIN, ALL))
                assert left_out == plain != every, (idea.name, key)


def test_every_variant_is_accepted_by_the_classes_and_goes_to_the_target_whatever_happens() -> None:
    for method in methods().values():
        if method.name == "finetune":
            continue
        _, decomposition, pruning = method.stages[0]["trainer"]["callbacks"]
        bsdp.callbacks.BasisDecomposition(**decomposition["init_args"])
        settings = bsdp.callbacks.IterativeBasisPruning(**pruning["init_args"]).settings
        assert (settings.target, settings.tolerance, settings.target_kind) == (0.6, None, "params")
        assert (settings.warmup_epochs, pruning["init_args"]["rounds"], settings.epochs_per_round) == (6, 6, 1)
    model = {key: v for key, v in methods()[ALL].stages[0]["model"]["init_args"].items() if key != "optimizer"}
    assert TransferTask(**model, num_classes=10).lr_restart_epoch == 6


def test_training_weights_has_the_optimizer_of_the_experiment_that_trains_them() -> None:
    experiment = yaml.safe_load((EXPERIMENTS / "bases_tuned.yaml").read_text())
    assert settings_of(methods()["alone_weights"])["model.optimizer"] == experiment["model"]["init_args"]["optimizer"]


def test_the_learning_rate_starts_anew_where_another_warm_up_is_asked_for() -> None:
    task = read_task("digits", {"callbacks.IterativeBasisPruning.warmup_epochs": 4}, 20)
    made = {m.name: settings_of(m) for m in ablation_methods(task, target=0.6, names=["alone_restart"])}
    assert list(made) == ["finetune", PLAIN, "alone_restart", ALL]
    assert made["alone_restart"]["model.lr_restart_epoch"] == made[ALL]["model.lr_restart_epoch"] == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", "1.5"], "`--target` must be a share between 0 and 1, .* got 1.5"),
        (["--methods", "alone_magic"], "`--methods`: unknown 'alone_magic'; give some of plain, "),
        (["--epochs", "2"], "'plain' cannot run in the 2 epochs .* needs 3"),
        (["--callbacks.IterativeBasisPruning.schedule", "cubic"], "'alone_cubic' would be the same as 'plain'"),
        (["--seeds", "0,0"], "`--seeds` must be different whole numbers"),
        (["--targets", "0.5"], "unknown option `--targets`"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    more: list[str], message: str, fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(words(tmp_path, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert fits.calls == []


# --- runs and tables


def test_runs_go_on_where_they_were_stopped_and_end_with_the_table(fits: FakeFits, tmp_path: Path) -> None:
    asked = words(tmp_path, "--methods", "alone_hull")
    fits.interrupt_after = 2
    assert ablation.main(asked) == 130
    fits.interrupt_after = None
    fits.calls.clear()
    assert ablation.main(asked) == 0
    assert fits.fits() == [("alone_hull@0.7", "0"), ("all@0.7", "0")]
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [(row["method"], row["target"]) for row in rows] == [
        ("finetune", None),
        (PLAIN, 0.7),
        ("alone_hull", 0.7),
        (ALL, 0.7),
    ]
    assert (tmp_path / "out" / "table.md").read_text() == markdown(rows)
    assert "/ablation/out/alone_hull@0.7/" in rows[2]["folder"]


def row(method: str, seed: int, validation: float | None, **more: Any) -> Config:
    ids = {"task": "t", "method": method, "seed": seed, "target": None if method == "finetune" else 0.7}
    values = {"validation": validation, "accuracy": 0.5, "params_ratio": 0.3, "macs_ratio": 0.4, "minutes": 1.0}
    return {**ids, **values, **more}


def test_the_tables_compare_with_the_frame_seed_by_seed() -> None:
    rows = [row("finetune", 0, 0.9), row(PLAIN, 1, 0.70), row(PLAIN, 0, 0.60), row(ALL, 0, 0.80), row(ALL, 1, 0.82)]
    rows += [row("alone_fisher", 0, 0.63), row("alone_fisher", 1, 0.72)]
    rows += [row("without_fisher", 0, 0.79), row("without_fisher", 1, 0.83)]
    rows += [row("with_second_order", 0, 0.805), row("with_second_order", 2, 0.9)]
    rows.append({**row("alone_l1", 0, None), "accuracy": None, "failed": "no"})
    text = markdown(rows)
    assert text.startswith("### t, 70% of the parameters to go\n")
    kept = "50.00% | 30.0% | 40.0% | 1.0 |"
    assert f"| plain | the frame | 0, 1 | 65.00% (60.00% to 70.00%) |  | {kept}" in text
    change = "+2.50 (+2.00 to +3.00)"
    assert f"| alone_fisher | with fisher | 0, 1 | 67.50% (63.00% to 72.00%) | {change} | {kept}" in text
    assert (
        f"| without_fisher | without fisher | 0, 1 | 81.00% (79.00% to 83.00%) | +0.00 (-1.00 to +1.00) | {kept}"
        in text
    )
    # Nothing is said where the frame has no run of a seed.
    assert "| with_second_order | with second_order instead of fisher | 0, 2 | 85.25% (80.50% to 90.00%) | - |" in text
    assert "| fisher | scores by single examples | +2.50 (+2.00 to +3.00) | " in text
    assert "Unpruned, all weights fine-tuned for as long: validation 90.00%, test 50.00%." in text
    assert "- t, alone_l1@0.7, seed 0: no" in text and "| alone_l1 |" not in text
    assert "hull" not in text


def test_an_idea_whose_absence_costs_accuracy_helps() -> None:
    rows = [row(ALL, 0, 0.80), row("without_cubic", 0, 0.77), row("with_hull", 0, 0.81)]
    text = markdown(rows)
    assert "| cubic | much is cut at first, little at last | - | +3.00 | all - all without it |" in text
    assert "| hull | ranking on the convex hull of importance and cost | - | +1.00 | instead of per_cost |" in text


def test_targets_have_tables_of_their_own_and_rows_of_other_commands_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = markdown([row(PLAIN, 0, 0.7), row(PLAIN, 0, 0.6, target=0.8), row("basis", 0, 0.9)])
    assert re.findall(r"### t, (\d+)%|\| plain \| the frame \| 0 \| (\S+)", text) == [
        *(("70", ""), ("", "70.00%"), ("80", ""), ("", "60.00%"))
    ]
    assert "90.00%" not in text
    assert markdown([row("basis", 0, 0.9)]) == "No variant has finished.\n"
    (tmp_path / "results.json").write_text("[]")
    assert ablation.main(["--show", str(tmp_path / "results.json")]) == 0
    assert capsys.readouterr().out == "No variant has finished.\n"
