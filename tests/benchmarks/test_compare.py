"""``benchmarks/compare.py`` on fits that are not run: which configurations, which runs, which rows, which table."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _runs, compare
from benchmarks._methods import EXPERIMENTS, PEERS, TASKS, build_method, build_methods, compose, read_task
from benchmarks._reports import write_report
from benchmarks._runs import RunFailed
from benchmarks._session import alone_in
from benchmarks._tables import below_baseline, markdown, pareto_figure, pareto_front, read_rows
from tests.helpers.fake_fits import FakeFits

Config = dict[str, Any]


def words(tmp_path: Path, *more: str) -> list[str]:
    return ["--task", "digits", "--methods", "basis", "--seeds", "0,1", "--output", str(tmp_path / "out"), *more]


# --- configurations


def test_every_task_and_method_makes_a_complete_configuration() -> None:
    for task in sorted(TASKS.glob("*.yaml")):
        read = read_task(str(task), {}, 60)
        for method in sorted([*EXPERIMENTS.glob("*.yaml"), *PEERS.glob("*.yaml")]):
            config = build_method(str(method), read).stages[0]
            assert config["trainer"]["max_epochs"] == 60
            assert config["trainer"].get("precision") == read["trainer"].get("precision")
            assert config["model"]["class_path"] and config["data"]["class_path"]
            assert not {"name", "seed_everything"} & config.keys()


METHOD: Config = {
    "name": "own",
    "seed_everything": 5,
    "model": {"class_path": "a.Own", "init_args": {"backbone": "timm:x", "head": "pretrained", "optimizer": "adam"}},
    "data": {"class_path": "d.Own", "init_args": {"samples_per_class": 3}},
    "trainer": {
        "max_epochs": 99,
        "limit_train_batches": 7,
        "gradient_clip_val": 2.0,
        "callbacks": [
            {"class_path": "c.Pruning", "init_args": {"target": 0.9, "kind": "l1"}},
            {"class_path": "bsdp.callbacks.PruningReport", "init_args": {"latency_batch_size": 64, "plot": False}},
        ],
    },
}
TASK: Config = {
    "model": {"class_path": "a.Task", "init_args": {"backbone": "bsdp:resnet20"}},
    "data": {"class_path": "d.Task", "init_args": {"image_size": 28}},
    "trainer": {"max_epochs": 4, "precision": "bf16-mixed"},
    "callbacks": {"Pruning": {"target": 0.5}, "Absent": {"x": 1}},
}


def test_the_task_gives_network_data_and_epochs_and_the_method_the_rest() -> None:
    assert compose(METHOD, TASK, epochs=3) == {
        "model": {"class_path": "a.Own", "init_args": {"optimizer": "adam", "backbone": "bsdp:resnet20"}},
        "data": TASK["data"],
        "trainer": {
            "gradient_clip_val": 2.0,
            "max_epochs": 3,
            "precision": "bf16-mixed",
            "callbacks": [
                {"class_path": "c.Pruning", "init_args": {"target": 0.5, "kind": "l1"}},
                {"class_path": "bsdp.callbacks.PruningReport", "init_args": {"plot": False}},
            ],
        },
    }


def test_a_method_with_data_of_its_own_gets_the_task_as_target_and_keeps_its_random_start() -> None:
    data = {"class_path": "d.Both", "init_args": {"source": {"class_path": "d.S"}, "target": {"class_path": "d.Own"}}}
    method = {**METHOD, "data": data, "model": {"init_args": {"weights": "none"}}}
    task = {**TASK, "model": {"class_path": "a.Task", "init_args": {"weights": "w.pth", "head": "pretrained"}}}
    composed = compose(method, task, epochs=3)
    assert composed["data"]["init_args"] == {"source": {"class_path": "d.S"}, "target": TASK["data"]}
    assert composed["model"]["init_args"] == {"weights": "none"}


def test_options_reach_the_task() -> None:
    given = {
        "data.batch_size": 8,
        "model.backbone": "b",
        "trainer.precision": 32,
        "callbacks.PruningReport.plot": False,
    }
    task = read_task("digits", given, None)
    assert task["data"]["init_args"]["batch_size"] == 8
    assert task["model"]["init_args"]["backbone"] == "b"
    assert task["trainer"]["precision"] == 32
    assert task["callbacks"] == {"PruningReport": {"plot": False}}


def test_stages_share_the_epochs() -> None:
    method = build_method("finetune+prune_tuned", read_task("digits", {}, 15))
    assert [stage["trainer"]["max_epochs"] for stage in method.stages] == [8, 7]
    assert method.prunes
    assert not build_method("finetune", read_task("digits", {}, 15)).prunes


def test_finetuning_is_always_there_once_and_first() -> None:
    task = read_task("digits", {}, 30)
    assert [method.name for method in build_methods(["basis"], task)] == ["finetune", "basis"]
    assert [method.name for method in build_methods(["basis", "finetune"], task)] == ["finetune", "basis"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "digit"], "`--task`: unknown 'digit'. Did you mean 'digits'"),
        (["--methods", "bases"], "`--methods`: unknown 'bases'. Did you mean 'basis'.* finetune, "),
        (["--methods", "no/such.yaml"], "`--methods`: there is no file 'no/such.yaml'"),
        (["--methods", "basis,basis"], "'basis' is there twice"),
        (["--methods", "basis", "--epochs", "8"], "'basis' cannot run in the 8 epochs .* needs 9 .*--epochs"),
        (["--methods", "two_temperature", "--epochs", "14"], r"needs 15 \(6 \+ 8 of search \+ 1\)"),
        (["--methods", "diff_pruning", "--epochs", "6"], r"'diff_pruning' .* needs 7 \(6 with gates, 1 without\)"),
        (["--callbacks.IterativeBasisPruning.epochs_per_round", "2", "--epochs", "12"], r"needs 15 \(3 \+ 6 x 2\)"),
        (["--methods", "finetune+basis", "--epochs", "1"], "too few for the 2 stages"),
        (["--epochs", "0"], "`--epochs` must be at least 1, got 0"),
        (["--seeds", "0,0"], "`--seeds` must be different whole numbers"),
        (["--seeds", "a"], "`--seeds` must be different whole numbers"),
        (["--trainer.max_epochs", "3"], "use `--epochs`"),
        (["--epoch", "3"], "unknown option `--epoch`"),
        (["--data.batch_size"], "`--data.batch_size` needs a value"),
        (["digits"], "unexpected 'digits'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    more: list[str], message: str, fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(words(tmp_path, *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert fits.calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[1, 2]", "{data: 1}"])
def test_a_file_that_is_no_configuration_is_told(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.yaml").write_text(content)
    assert compare.main(words(tmp_path, "--methods", str(tmp_path / "list.yaml"))) == 2
    assert "is not a configuration of a run" in capsys.readouterr().err


# --- runs


def test_every_method_runs_with_every_seed_and_gives_a_row(fits: FakeFits, tmp_path: Path) -> None:
    assert compare.main(words(tmp_path, "--epochs", "12")) == 0
    assert fits.fits() == [("finetune", "0"), ("basis", "0"), ("finetune", "1"), ("basis", "1")]
    tuned, pruned = read_rows(tmp_path / "out" / "results.json")[:2]
    assert {key: pruned[key] for key in ("task", "method", "seed", "epochs", "accuracy_reference", "accuracy")} == {
        **{"task": "digits", "method": "basis", "seed": 0, "epochs": 12},
        **{"accuracy_reference": 0.92, "accuracy": 0.9},
    }
    assert (pruned["params_ratio"], pruned["macs_ratio"], pruned["latency_ratio"]) == (0.3, 0.4, None)
    assert (tuned["accuracy"], tuned["params_ratio"], tuned["accuracy_reference"]) == (0.95, 1.0, None)
    config = tmp_path / "out" / "configs" / "basis.yaml"
    assert pruned["command"].startswith(f"python train.py fit --config {config} --seed_everything 0 ")
    assert pruned["commit"] and pruned["minutes"] >= 0.0
    tested = next(call for call in fits.calls if call[0] == "test")
    assert tested[4].endswith("version_0/checkpoints/epoch=1-step=2.ckpt")  # the best epoch, not the last
    out = tmp_path / "out"
    assert (out / "table.md").read_text() == markdown(read_rows(out / "results.json"))


def test_an_interrupted_comparison_goes_on_and_repeats_nothing_finished(fits: FakeFits, tmp_path: Path) -> None:
    fits.interrupt_after = 2
    assert compare.main(words(tmp_path)) == 130
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [(row["method"], row["seed"]) for row in rows] == [("finetune", 0), ("basis", 0)]
    fits.interrupt_after = None
    fits.calls.clear()
    assert compare.main(words(tmp_path)) == 0
    assert fits.fits() == [("finetune", "1"), ("basis", "1")]
    assert not any("--trainer.fast_dev_run" in call for call in fits.calls)  # both have shown that they run
    fits.calls.clear()
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert compare.main(words(tmp_path)) == 0
    assert fits.calls == []
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_failed_run_is_a_row_and_is_tried_again(
    fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits.fails = {"basis"}
    assert compare.main(words(tmp_path)) == 1
    rows = read_rows(tmp_path / "out" / "results.json")
    assert [(row["method"], row["accuracy"]) for row in rows] == [("finetune", 0.95), ("basis", None)] * 2
    assert rows[1]["failed"] == "bsdp fit: error: it broke"
    assert "- digits, basis, seed 1: bsdp fit: error: it broke" in capsys.readouterr().out
    fits.fails = set()
    fits.calls.clear()
    assert compare.main(words(tmp_path)) == 0
    assert fits.fits() == [("basis", "0"), ("basis", "1")]
    assert all(row["accuracy"] for row in read_rows(tmp_path / "out" / "results.json"))


def test_a_fit_that_pruned_nothing_has_failed(fits: FakeFits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "summary", lambda _method: {"accuracy_pruned": None, "notes": ["no test images"]})
    assert compare.main(words(tmp_path, "--seeds", "0")) == 1
    assert read_rows(tmp_path / "out" / "results.json")[1]["failed"] == "summary.json has no accuracy: no test images"


def test_a_method_that_cannot_run_is_told_before_the_first_run(
    fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits.fails = {"trial:basis"}
    assert compare.main(words(tmp_path)) == 2
    assert "basis: bsdp fit: error: no graph" in capsys.readouterr().err
    assert fits.fits() == []


def test_rows_of_other_settings_are_refused(fits: FakeFits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(words(tmp_path, "--seeds", "0")) == 0
    assert compare.main(words(tmp_path, "--seeds", "0,1", "--data.batch_size", "8")) == 2
    assert "has results of 'finetune' with other settings" in capsys.readouterr().err
    more = words(tmp_path, "--methods", "basis,finetune+prune_tuned")
    assert compare.main(more) == 0  # more methods and seeds are no other settings
    assert len(read_rows(tmp_path / "out" / "results.json")) == 6


def test_a_second_stage_starts_from_the_weights_of_the_first(fits: FakeFits, tmp_path: Path) -> None:
    assert compare.main(words(tmp_path, "--methods", "finetune+prune_tuned", "--seeds", "0")) == 0
    second = next(call for call in fits.calls if "--model.weights" in call)
    weights = Path(second[second.index("--model.weights") + 1])
    assert weights.parts[-3:] == ("version_0", "checkpoints", "last.ckpt")
    assert second[-2:] == ["--model.head", "pretrained"]
    row = read_rows(tmp_path / "out" / "results.json")[1]
    assert (row["method"], row["epochs"]) == ("finetune+prune_tuned", 40)
    assert row["command"].count(" && ") == 1


def test_two_comparisons_do_not_share_a_folder(fits: FakeFits, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with alone_in(tmp_path), pytest.raises(ValueError, match="another comparison"), alone_in(tmp_path):
        pass


# --- the subprocess itself


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A train.py of a few lines."""
    monkeypatch.setattr(_runs, "ROOT", tmp_path)
    return tmp_path / "train.py"


def test_a_command_goes_to_its_log_and_its_failure_has_a_reason(script: Path, tmp_path: Path) -> None:
    script.write_text("import sys\nprint('seen', *sys.argv[1:])\nsys.exit(len(sys.argv) > 2 and 'error: no\\n\\n')")
    log = tmp_path / "logs" / "a.log"
    assert _runs.call(["fit"], log, tick=print) == "$ python train.py fit\nseen fit\n"
    with pytest.raises(RunFailed, match=r"^error: no$"):
        _runs.call(["fit", "more"], log, tick=print)
    assert log.read_text().count("seen fit") == 2  # added, not replaced


def test_an_interruption_ends_the_command(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.write_text("import time\ntime.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(_runs, "wait", lambda process: started.append(process) or interrupt())

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _runs.call(["fit"], tmp_path / "a.log", tick=lambda _line: None)
    assert started[0].returncode is not None


# --- table and picture


def row(method: str, seed: int = 0, accuracy: float = 0.9, reference: float | None = None, **more: Any) -> Config:
    ratios = {"params_ratio": 0.3, "macs_ratio": 0.4, "latency_ratio": 0.5}
    ids = {"task": "t", "method": method, "seed": seed, "epochs": 3, "minutes": 1.0}
    return {**ids, "accuracy": accuracy, "accuracy_reference": reference, **ratios, **more}


def test_the_loss_is_against_the_higher_baseline_of_the_same_seed() -> None:
    rows = [row("finetune", 0, 0.95), row("finetune", 1, 0.91), row("a", 0, 0.93, 0.94), row("a", 1, 0.93, 0.96)]
    assert [below_baseline(r, rows) for r in rows] == [None, None, pytest.approx(2.0), pytest.approx(3.0)]
    assert below_baseline(row("a", 2, 0.9, 0.9), rows) is None  # nothing fine-tuned with this seed


def test_the_table_has_mean_and_spread_and_says_who_is_under_a_point() -> None:
    rows = [row("finetune", 0, 0.95), row("finetune", 1, 0.95), row("a", 1, 0.94), row("a", 0, 0.945)]
    rows += [row("b", 0, 0.945), row("b", 1, 0.9, latency_ratio=None)]
    rows.append({**row("c", 0), "accuracy": None, "failed": "no graph"})
    text = markdown(rows)
    kept, loss = "30.0% | 40.0%", "+0.75 (+0.50 to +1.00)"
    assert f"| t | a | 0, 1 | 3 | 94.25% (94.00% to 94.50%) | - | {loss} | {kept} | 0.50 | 1.0 |" in text
    assert f"| t | b | 0, 1 | 3 | 92.25% (90.00% to 94.50%) | - | +2.75 (+0.50 to +5.00) | {kept} | - | 1.0 |" in text
    assert "every seed: none." in text  # exactly one point is not under one
    assert "every seed: a (t, 2 seeds)." in markdown([*rows[:2], row("a", 0, 0.945), row("a", 1, 0.96), *rows[4:]])
    assert "- t, c, seed 0: no graph" in text
    assert "| c |" not in text


def test_the_front_has_no_point_that_another_beats() -> None:
    assert pareto_front([(50, 90), (30, 80), (30, 85), (70, 89), (100, 95)]) == [(30, 85), (50, 90), (100, 95)]


def test_the_picture_shows_every_run_mean_and_the_front() -> None:
    rows = [row("finetune", 0, 0.95, params_ratio=1.0, macs_ratio=1.0), row("a", 0, 0.9), row("a", 1, 0.94)]
    rows.append({**row("c", 0), "accuracy": None})
    params, macs = pareto_figure(rows).axes[:2]
    lines = {line.get_label(): [list(map(float, data)) for data in line.get_data()] for line in params.get_lines()}
    assert lines["a"] == [[30.0], [pytest.approx(92.0)]]
    assert lines["front"] == [[30.0, 100.0], [pytest.approx(92.0), 95.0]]
    assert "c" not in lines
    assert macs.get_xlabel().startswith("MACs kept")
    with pytest.raises(ValueError, match=r"one task, got those of \['t', 'u'\]"):
        pareto_figure([row("a"), {**row("a"), "task": "u"}])


def test_the_report_is_written_with_and_without_finished_runs(tmp_path: Path) -> None:
    write_report([{**row("c"), "accuracy": None, "failed": "no"}], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    write_report([row("a")], tmp_path)
    assert (tmp_path / "pareto.png").stat().st_size > 10_000


def test_the_kept_results_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted((compare.ROOT / "benchmarks" / "results").glob("transfer_*.json"))
    assert compare.main(["--show", *map(str, kept)]) == 0
    shown = capsys.readouterr().out
    assert "| mnist_resnet56 | finetune | 0, 1 | 24 | 99.16% (99.14% to 99.18%) | - | - | 100.0% |" in shown
    assert shown in (compare.ROOT / "RESULTS.md").read_text()
    with pytest.raises(SystemExit, match="there is no file"):
        compare.main(["--show", "none.json"])


def test_rows_can_be_written_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _runs.commit() == "unknown"
