"""The command line in this process: words, configurations, run folders, messages."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bsdp import cli
from bsdp.runs import find_checkpoint, free_config_name, reopen_logger, run_folder_of
from bsdp.task import TransferTask

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"init_args": {"backbone": "bsdp:resnet20", "weights": "none"}},
    "data": {"class_path": "bsdp.datamodules.DigitsDataModule", "init_args": {"image_size": 8, "batch_size": 32}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 2,
        "limit_predict_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
    },
}
INFO = {"test_accuracy", "test_loss"}


class ForeignModule(LightningModule):
    """A module that knows nothing of us, with its own data."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)


class ForeignData(LightningDataModule):
    """A data module without any of the attributes of ours."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), batch_size=4)

    val_dataloader = train_dataloader


class OtherLogger(Logger):
    """A logger that keeps nothing."""

    name = "other"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Drop it."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Drop it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that holds ``tiny.yaml``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BSDP_DEBUG", raising=False)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with code 2 and one paragraph; gives the paragraph."""
    capsys.readouterr()
    assert cli.main(args) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.strip().splitlines() if line.startswith("bsdp ")]
    assert len(lines) == 1
    return lines[0]


def rows(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_overview_and_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text for word in ("fit", "validate", "test", "predict"))
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert f"torch {torch.__version__.split('+')[0]}" in capsys.readouterr().out


def test_unknown_word_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(["fitt"], capsys)
    assert "unknown word 'fitt'. Did you mean 'fit'? The first word must be one of fit, validate, test, predict" in text


def double(number: int, twice: bool = True) -> int:
    """Double a number.

    Args:
        number: Any.
        twice: Or not.
    """
    return 2 * number if twice else number


def test_functions_are_words_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.COMMANDS, "double", cli.Command("tests.bsdp.test_cli:double", "double a number"))
    assert cli.main(["double", "4"]) == 0
    assert capsys.readouterr().out.strip() == "8"
    assert "number" in refused(["double", "four"], capsys)
    cli.main(["--help"])
    assert "double     double a number" in capsys.readouterr().out


def test_fit_test_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--config", "tiny.yaml"]) == 0
    run = folder / "logs" / "tiny" / "version_0"
    out = capsys.readouterr().out
    assert f"Run folder: {run}" in out and "epoch 1/1" in out and "Pruned checkpoint" not in out
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "hparams.yaml", "metrics.csv"}
    assert rows(run / "metrics.csv")[0] == "epoch,step,train_loss,val_accuracy,val_loss"

    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["num_classes"] == 10  # taken from the data
    assert saved["model"]["class_path"] == "bsdp.task.TransferTask"

    checkpoint = run / "checkpoints" / "last.ckpt"
    assert cli.main(["test", "--ckpt_path", str(checkpoint)]) == 0  # with the run's own configuration
    text = capsys.readouterr().out
    assert all(key in text for key in INFO)
    assert rows(folder / "logs/tiny/test/version_0/metrics.csv")[0] == "epoch,step,test_accuracy,test_loss"

    assert cli.main(["predict", "--ckpt_path=last"]) == 0
    predictions = rows(folder / "logs/tiny/predict/version_0/predictions.csv")
    assert predictions[0] == "index,label,probability,class" and len(predictions) == 33
    assert all(line.split(",")[1] == line.split(",")[3] for line in predictions[1:])  # digits are named by themselves
    loaded = TransferTask.load_from_checkpoint(checkpoint)
    assert isinstance(loaded.optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.SGD)


@pytest.mark.parametrize(
    ("script", "variable", "words"),
    [
        ("/bin/bsdp", None, "bsdp test"),
        ("train.py", None, "python train.py test"),
        ("/bin/bsdp", "UV_RUN_RECURSION_DEPTH", "uv run bsdp test"),
        ("train.py", "UV_RUN_RECURSION_DEPTH", "uv run train.py test"),
    ],
)
def test_how_to_call_the_program_again(
    script: str, variable: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bsdp.trainer_cli import _program

    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    monkeypatch.setattr("sys.argv", [script, "fit"])
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    assert f"{_program()} test" == words


def test_pruned_checkpoint_is_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(self: TransferTask) -> None:
        self.trainer.save_checkpoint(Path(self.trainer.log_dir or "") / "pruned.ckpt")

    monkeypatch.setattr(TransferTask, "on_train_end", write)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert cli.main(["fit", "--config", "tiny.yaml"]) == 0
    path = folder / "logs" / "tiny" / "version_0" / "pruned.ckpt"
    out = capsys.readouterr().out
    assert f"Pruned checkpoint: {path}" in out and f"Test it: uv run train.py test --ckpt_path {path}" in out
    assert cli.main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches=1"]) == 0


def test_normalization_goes_from_the_model_to_the_data_unless_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(TransferTask, "on_fit_start", lambda self: seen.append(self.trainer.datamodule.normalization))
    own = {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    cli.main(["fit", "--config", "tiny.yaml"])
    cli.main(["fit", "--config", "tiny.yaml", f"--data.normalization={own}"])

    assert seen == [{"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}, own]


def test_another_root_folder(folder: Path) -> None:
    root = f"--trainer.default_root_dir={folder / 'elsewhere'}"
    assert cli.main(["fit", "--config", "tiny.yaml", root]) == 0
    assert (folder / "elsewhere" / "tiny" / "version_0" / "metrics.csv").is_file()
    assert cli.main(["test", "--ckpt_path", "last", root]) == 0
    assert not (folder / "logs").exists()


def test_runs_do_not_share_a_folder(folder: Path) -> None:
    for _ in range(2):
        assert cli.main(["fit", "--config", "tiny.yaml", "--name", "two"]) == 0
    first, second = (folder / "logs" / "two" / f"version_{n}" / "metrics.csv" for n in (0, 1))
    assert rows(first) == rows(second) != []  # the same seed, the same numbers


def test_last_continues_in_the_folder_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config", "tiny.yaml"])
    run = folder / "logs" / "tiny" / "version_0"
    before = rows(run / "metrics.csv")
    first = (run / "config.yaml").read_text()
    assert cli.main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    relative = "logs/tiny/version_0/checkpoints/last.ckpt"
    assert cli.main(["fit", "--config", "tiny.yaml", "--ckpt_path", relative, "--trainer.max_epochs", "3"]) == 0

    assert [path.name for path in (folder / "logs" / "tiny").iterdir()] == ["version_0"]
    assert (run / "config.yaml").read_text() == first
    assert {path.name for path in run.glob("config*")} == {
        "config.yaml",
        "config.resume-1.yaml",
        "config.resume-2.yaml",
    }
    after = rows(run / "metrics.csv")
    assert after[: len(before)] == before
    assert [line.split(",")[0] for line in after[1:]] == ["0", "0", "1", "1", "2", "2"]  # a row of each loop and epoch
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_last_of_a_name_takes_the_settings_of_that_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config", "tiny.yaml", "--name", "a"])
    cli.main(["fit", "--config", "tiny.yaml", "--name", "b", "--data.image_size", "10"])
    same = ["--model.backbone", "bsdp:resnet20"]
    assert cli.main(["test", "--name", "a", "--ckpt_path", "last", *same]) == 0  # though b is the newest
    tested = yaml.safe_load((folder / "logs/a/test/version_0/config.yaml").read_text())
    assert tested["data"]["init_args"]["image_size"] == 8 and "logs/a/version_0" in tested["ckpt_path"]
    assert cli.main(["fit", "--name", "a", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    resumed = yaml.safe_load((folder / "logs/a/version_0/config.resume-1.yaml").read_text())
    assert resumed["data"]["init_args"]["image_size"] == 8

    for option, value in (("label_smoothing", "0.3"), ("init_args.lr_scheduler", "constant")):
        text = refused(["test", "--name", "a", "--ckpt_path", "last", f"--model.{option}", value], capsys)
        assert f"`--model.{option.removeprefix('init_args.')} {value}` has no effect beside `--ckpt_path`" in text


def test_a_logger_of_the_user_keeps_tests_apart_from_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "tiny.yaml", "--config", "logger/csv"]
    assert cli.main(["fit", *words]) == 0
    assert f"Run folder: {folder / 'logs' / 'run' / 'version_0'}" in capsys.readouterr().out
    assert cli.main(["test", *words, "--ckpt_path", "logs/run/version_0/checkpoints/last.ckpt"]) == 0
    assert [path.name for path in (folder / "logs" / "run").iterdir()] == ["version_0"]


def test_nothing_said_is_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("fit", "test", "validate", "predict"):
        assert "`data` is missing: add a configuration" in refused([word], capsys)


def test_resuming_nothing_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(["fit", "--config", "tiny.yaml", "--ckpt_path", "last"], capsys)
    assert "`ckpt_path: last`: no checkpoint fits" in text and str(folder / "logs" / "tiny") in text
    assert "`ckpt_path`: no file" in refused(["fit", "--config", "tiny.yaml", "--ckpt_path", "gone.ckpt"], capsys)
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.backbone", "bsdp:resnet21"], "`backbone`: unknown 'bsdp:resnet21'. Near: bsdp:resnet20"),
        (["--model.num_classes", "12"], "`num_classes` is 12, but DigitsDataModule has 10 classes"),
        (["--model.weights", "gone.pth"], "`weights`: no file 'gone.pth'"),
        (["--model.foo", "1"], "Option 'foo' is not accepted"),
        (["--trainer.max_epochs", "many"], "\"trainer.max_epochs\": Expected a <class 'int'> Given value: many"),
        (["--data.batch_size", "0"], "`batch_size` must be at least 1"),
        (["--data", "bsdp.datamodules.MNISTDataModule"], "MNIST"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--fooo"], "--fooo"),
    ],
)
def test_mistakes_end_in_one_paragraph(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    text = refused(["fit", "--config", "tiny.yaml", "--data.data_dir", "nowhere", *args], capsys)
    assert words in text and len(text) < 900


def test_faults_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(self: TransferTask, *args: Any) -> None:
        int("x")

    monkeypatch.setattr(TransferTask, "training_step", fault)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["fit", "--config", "tiny.yaml"])


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSDP_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown word"):
        cli.main(["fitt"])


def test_interrupt_leaves_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    assert cli.main(["fit"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_foreign_modules_run(folder: Path) -> None:
    args = ["fit", "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
    assert cli.main([*args, "--model=tests.bsdp.test_cli.ForeignModule", "--model.width=5"]) == 0
    assert (folder / "logs/run/version_0/checkpoints/last.ckpt").is_file()
    model = ["--model.weights=none", "--model.num_classes=4"]
    assert cli.main([*args, *model, "--data=tests.bsdp.test_cli.ForeignData"]) == 0


def test_an_optimizer_may_be_named_apart_from_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []
    monkeypatch.setattr(TransferTask, "on_fit_start", lambda self: seen.append(type(self.optimizers().optimizer)))
    with pytest.warns(UserWarning, match="will be overridden"):
        assert cli.main(["fit", "--config", "tiny.yaml", "--optimizer", "Adam", "--optimizer.lr", "0.01"]) == 0
    assert cli.main(["fit", "--config", "tiny.yaml", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]) == 0
    assert seen == [torch.optim.Adam, torch.optim.AdamW]


def test_run_folder_logger_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        TransferTask, "on_fit_start", lambda self: seen.append([type(x).__name__ for x in self.trainer.loggers])
    )
    pieces = {"trainer": {"logger": [{"class_path": "tests.bsdp.test_cli.OtherLogger"}]}}
    (folder / "logger.yaml").write_text(yaml.safe_dump(pieces))
    assert cli.main(["fit", "--config", "tiny.yaml", "--config", "logger.yaml"]) == 0
    assert cli.main(["fit", "--config", "tiny.yaml", "--trainer.logger=false"]) == 0
    assert seen == [["CSVLogger", "OtherLogger"], ["CSVLogger"]]


def test_fast_dev_run_writes_nothing(folder: Path) -> None:
    assert cli.main(["fit", "--config", "tiny.yaml", "--trainer.fast_dev_run=true"]) == 0
    assert not (folder / "logs").exists()


def test_packaged_configs_are_found_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packaged = cli.CONFIGS / "pretrain" / "resnet20_cifar10.yaml"
    for name in ("pretrain/resnet20_cifar10", "resnet20_cifar10", "configs/pretrain/resnet20_cifar10.yaml"):
        assert cli._resolve_configs(["--config", name, f"-c={name}"]) == ["--config", str(packaged), f"-c={packaged}"]
    assert cli._resolve_configs(["--config", "tiny.yaml", "--name", "x"]) == ["--config", "tiny.yaml", "--name", "x"]
    (folder / "base.yaml").write_text("name: mine\n")
    assert cli.resolve_config("base.yaml") == "base.yaml"  # what exists comes first
    assert "'resnet20_cifr' is no file" in refused(["fit", "--config", "resnet20_cifr"], capsys)


def test_options_win_over_files_wherever_they_stand() -> None:
    words = ["--name", "x", "--config", "a.yaml", "--ckpt_path=last", "-c=b.yaml", "--config"]
    assert cli._files_first(words) == ["--config", "a.yaml", "-c=b.yaml", "--config", "--name", "x", "--ckpt_path=last"]


def test_base_config_composes_with_pieces(folder: Path) -> None:
    piece = {"trainer": {"callbacks+": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}}]}}
    (folder / "piece.yaml").write_text(yaml.safe_dump(piece))
    args = ["--config", "base", "--config", "tiny.yaml", "--config", "piece.yaml"]
    assert cli.main(["fit", *args, "--trainer.max_epochs=2"]) == 0
    saved = yaml.safe_load((folder / "logs/tiny/version_0/config.yaml").read_text())

    names = [callback["class_path"].rpartition(".")[2] for callback in saved["trainer"]["callbacks"]]
    assert names == ["ModelCheckpoint", "LearningRateMonitor", "EarlyStopping"]
    epochs = {path.name: torch.load(path)["epoch"] for path in folder.glob("logs/tiny/version_0/checkpoints/*")}
    assert epochs == {"epoch=0-step=2.ckpt": 0, "last.ckpt": 1}  # the accuracy does not rise in the second epoch
    assert (saved["trainer"]["max_epochs"], saved["data"]["init_args"]["image_size"]) == (2, 8)


def test_pretraining_config_is_complete(folder: Path) -> None:
    args = ["--config", "resnet20_cifar10", "--config", "tiny.yaml", "--trainer.precision=32-true"]
    assert cli.main(["fit", *args, "--data.init_args.val_fraction=0.2"]) == 0
    saved = yaml.safe_load((folder / "logs/tiny/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["lr_scheduler"] == "onecycle"


def test_find_checkpoint_takes_the_newest(tmp_path: Path) -> None:
    files = [
        tmp_path / name / f"version_{n}" / "checkpoints" / "last.ckpt" for name, n in (("a", 0), ("a", 1), ("b", 0))
    ]
    for age, file in enumerate(reversed(files)):
        file.parent.mkdir(parents=True)
        torch.save({"state_dict": {}}, file)
        os.utime(file, (age, age))

    assert find_checkpoint("last", root=tmp_path) == files[0]
    assert find_checkpoint("last", root=tmp_path, name="b") == files[2]
    with pytest.raises(FileNotFoundError, match="ckpt_path: last"):
        find_checkpoint("last", root=tmp_path, name="c")


def test_run_folder_and_config_names(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert run_folder_of(checkpoint) is None
    assert free_config_name(tmp_path) == "config.yaml"
    (tmp_path / "config.yaml").touch()
    assert run_folder_of(checkpoint) == run_folder_of(tmp_path / "pruned.ckpt") == tmp_path
    assert free_config_name(tmp_path) == "config.resume-1.yaml"
    (tmp_path / "config.resume-1.yaml").touch()
    assert free_config_name(tmp_path) == "config.resume-2.yaml"


def test_reopened_logger_has_the_rows_of_the_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "name" / "version_3"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("a,step\n1.0,0\n2.0,4\n3.0,5\n4.0,9\n5.")
    state = {"metrics": "a,step\r\n1.0,0\r\n2.0,4\r\n", "row": {"c": 0.1, "step": 4}}
    logger = reopen_logger(run, checkpoint={"global_step": 5, "bsdp_run": state})
    logger.log_metrics({"b": 7.0}, step=5)
    logger.save()

    assert Path(logger.log_dir) == run
    assert rows(run / "metrics.csv") == ["a,b,c,step", "1.0,,,0", "2.0,,,4", ",,0.1,4", ",7.0,,5"]


def test_reopened_logger_keeps_all_rows_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,step\n1.0,0\n2.0,4\n")
    reopen_logger(tmp_path, checkpoint={}).save()
    assert rows(tmp_path / "metrics.csv") == ["a,step", "1.0,0", "2.0,4"]
