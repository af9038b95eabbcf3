"""The trainer commands ``fit``, ``validate``, ``test`` and ``predict``: LightningCLI with run folders and links.

Imported only when one of them is asked for.
"""

import contextlib
import csv
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_info

from bsdp.callbacks._checkpoint_io import write_whole_checkpoints
from bsdp.callbacks.pruning_report import PruningReport
from bsdp.cli import option_value
from bsdp.record import PruningRecord
from bsdp.resume import LastCheckpoint, RunState
from bsdp.runs import PRUNED_CHECKPOINT, find_checkpoint, free_config_name, new_logger, reopen_logger, run_folder_of
from bsdp.structure import read_checkpoint
from bsdp.weight_files import no_weight_files

TASK = "bsdp.task.TransferTask"


class EpochLines(Callback):
    """Print one line for every epoch: the progress display where standard output is not a terminal."""

    _start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print epoch, seconds and what was logged; validation comes before this hook."""
        seconds = f" ({time.monotonic() - self._start:.0f} s)" if self._start else ""
        metrics = {key.removeprefix("bsdp/"): float(value) for key, value in trainer.callback_metrics.items()}
        shown = [key for key in sorted(metrics) if "loss" in key or "accuracy" in key or key == "params_kept"]
        values = ", ".join(f"{key} {metrics[key]:.4f}" for key in shown)
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{seconds}: {values}", flush=True)


class TransferCLI(LightningCLI):
    """LightningCLI whose every run has a folder, and whose data and model know of each other.

    - ``--name`` names the run; its folder is ``<trainer.default_root_dir or logs>/<name>/version_N``.
    - ``--ckpt_path last|PATH`` of ``fit`` continues in the folder of that run.
    - A ``num_classes`` of the model that is not set is taken from the data module, a ``normalization`` of the data
      module that is not set from the model. Classes without these attributes are left alone.
    """

    def __init__(self, args: list[str]) -> None:
        self._checkpoint: Path | None = None
        self._given: dict[str, Any] = {}  # options of the model that stand in `args`
        self._words = {word: options for word, options in LightningCLI.subcommands().items() if word == args[0]}
        super().__init__(
            LightningModule,
            subclass_mode_model=True,
            seed_everything_default=0,
            parser_kwargs={
                "exit_on_error": False,
                **{word: {"exit_on_error": False} for word in self.subcommands()},
            },
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The word that was given alone: to prepare the options of the others takes a quarter of a second."""
        return self._words

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--name``, and make `TransferTask` the default model."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run, of which its folder is made.")
        parser.set_defaults({"model": {"class_path": TASK}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and turn ``--ckpt_path last`` into a path."""
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        if config.ckpt_path not in (None, "best", "hpc", "registry"):
            named = self.config.subcommand == "fit" or option_value(args, "--name")
            name = config.name if named else None
            self._checkpoint = find_checkpoint(config.ckpt_path, root=self._root(config), name=name)
            config.ckpt_path = str(self._checkpoint)
            options = config.model.get("init_args") or {}
            self._given = {name: options.get(name) for name in _model_options(args)}
            read_checkpoint(self._checkpoint)  # Lightning's own reading ends in a traceback when a file is damaged

    def before_instantiate_classes(self) -> None:
        """Take the number of classes from the data module, if only that knows it.

        Raises:
            ValueError: If there are no data, or an option of the model is not that of the checkpoint, which wins.
        """
        config = self.config[self.subcommand]
        if config.get("data") is None and config.model.get("class_path") == TASK:
            raise ValueError(
                "`data` is missing: add a configuration that names a data module, such as `--config quickstart` or "
                "`--config base --config data/cifar10`, or give `--data CLASS`."
            )
        options = config.model.get("init_args")
        for name, value in self._given.items():
            if options is not None and options.get(name) != value:
                raise ValueError(
                    f"`--model.{name} {value}` has no effect beside `--ckpt_path`: the checkpoint was made with "
                    f"{options.get(name)!r}. Leave the option out; or start a new run from these weights, with "
                    f"`--model.weights {config.ckpt_path}` in place of `--ckpt_path`."
                )
        if options is None or "num_classes" not in options or config.get("data") is None:
            return
        if options.num_classes is None:
            options.num_classes = getattr(_instantiate_data(config.data), "num_classes", None)

    def instantiate_classes(self) -> None:
        """Build everything; with a checkpoint to load, without the pretrained weight file."""
        with no_weight_files() if self._checkpoint else contextlib.nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the logger of the run folder first and the display that suits the output."""
        if self.datamodule is not None and getattr(self.datamodule, "normalization", "absent") is None:
            self.datamodule.normalization = getattr(self.model, "normalization", None)
        config = self._get(self.config_init, "trainer")
        kwargs["logger"] = self._loggers(config.logger)
        given = config.callbacks or []
        callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
        if config.enable_progress_bar is None and not sys.stdout.isatty():
            kwargs["enable_progress_bar"] = False
            callbacks.append(EpochLines())
        if self.subcommand == "fit":
            callbacks.append(RunState())
        if config.enable_checkpointing is not False and not any(_writes_last(callback) for callback in callbacks):
            callbacks.append(LastCheckpoint())
        prunes = any(isinstance(getattr(callback, "record", None), PruningRecord) for callback in callbacks)
        if prunes and self.subcommand == "fit" and not any(isinstance(c, PruningReport) for c in callbacks):
            callbacks.append(PruningReport())
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        write_whole_checkpoints(trainer)
        return trainer

    def after_fit(self) -> None:
        """Say where the results are."""
        folder = self.trainer.log_dir
        if folder is None or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        print(f"Run folder: {folder}")
        pruned = Path(folder) / PRUNED_CHECKPOINT
        if pruned.is_file():
            print(f"Pruned checkpoint: {pruned}\nTest it: {_program()} test --ckpt_path {pruned}")

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Predict, and write ``predictions.csv`` into the run folder if the model gives labels and probabilities."""
        batches = self.trainer.predict(model, **kwargs) or []
        rows = [row for batch in batches if isinstance(batch, dict) for row in zip(*_columns(batch), strict=True)]
        if rows and self.trainer.log_dir is not None and self.trainer.is_global_zero:
            path = Path(self.trainer.log_dir) / "predictions.csv"
            names = list(getattr(self.datamodule, "class_names", None) or [])
            names = names if max(label for label, _ in rows) < len(names) else []
            alone = self.trainer.world_size == 1  # else a process has every so many-th image only
            files = list(getattr(self.datamodule, "predicted_files", None) or []) if alone else []
            header = ["index", "label", "probability", *(["class"] if names else []), *(["file"] if files else [])]
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(header)
                for i, (label, probability) in enumerate(rows):
                    more = [*([names[label]] if names else []), *([files[i]] if files else [])]
                    writer.writerow([i, label, probability, *more])
            print(f"Predictions: {path}")

    def _loggers(self, wanted: Any) -> list[Logger]:
        """Put the logger of the run folder before those that the user wants."""
        loggers = wanted if isinstance(wanted, list) else [wanted] if isinstance(wanted, Logger) else []
        config = self.config[self.subcommand]
        folder = run_folder_of(self._checkpoint) if self._checkpoint and self.subcommand == "fit" else None
        if folder is not None and self._checkpoint is not None:
            checkpoint = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
            own: CSVLogger = reopen_logger(folder, checkpoint=checkpoint)
            rank_zero_info(f"Continues {self._checkpoint} in {folder}")
        else:
            given = [logger for logger in loggers if isinstance(logger, CSVLogger)] if self.subcommand == "fit" else []
            name = config.name if self.subcommand == "fit" else f"{config.name}/{self.subcommand}"
            own = given[0] if given else new_logger(self._root(config), name)
            own._save_dir = str(Path(own.save_dir).absolute())  # see `new_logger`
        self.save_config_kwargs = {"config_filename": free_config_name(Path(own.log_dir))}
        return [own, *(logger for logger in loggers if not isinstance(logger, CSVLogger))]

    @staticmethod
    def _root(config: Namespace) -> Path:
        return Path(config.trainer.default_root_dir or "logs")


def _model_options(args: list[str]) -> list[str]:
    """Names of the model's own options among the words of a command line."""
    words = [word.partition("=")[0] for word in args if word.startswith("--model.")]
    return [word.removeprefix("--model.").removeprefix("init_args.").partition(".")[0] for word in words]


def _program() -> str:
    """How to call this program again, as far as can be told: ``uv run`` activates its environment for one call only."""
    script = sys.argv[0] if Path(sys.argv[0]).suffix == ".py" else ""
    if "UV_RUN_RECURSION_DEPTH" in os.environ:
        return f"uv run {script or 'bsdp'}"
    return f"python {script}" if script else "bsdp"


def _writes_last(callback: Callback) -> bool:
    """Tell whether a callback keeps the newest checkpoint under the name that ``--ckpt_path last`` looks for.

    One that monitors a metric keeps the best epochs; its ``save_last`` is a copy of the newest of those.
    """
    if not isinstance(callback, ModelCheckpoint) or callback.monitor is not None:
        return False
    return callback.filename == "last" or bool(callback.save_last)


def silence_third_parties(*, resume: bool) -> None:
    """Drop what Lightning prints in every run and nobody can act on; called inside ``warnings.catch_warnings``.

    Args:
        resume: The command is ``fit``, where a checkpoint of another folder deserves a warning.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).addFilter(_is_no_advertisement)
    messages = [".*LeafSpec", r"\s*By default only one Jsonargparse", r"[\s\S]*was deprecated in v4"]
    messages += ["Checkpoint directory .* exists and is not empty"] if resume else ["The dirpath has changed"]
    for message in messages:
        warnings.filterwarnings("ignore", message=message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _instantiate_data(config: Namespace) -> Any:
    """Build a data module from its settings, outside of LightningCLI, which would remember it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
    return parser.instantiate_classes(parser.parse_object({"data": config})).data


def _columns(batch: dict[str, torch.Tensor]) -> tuple[list[Any], list[Any]]:
    if not {"labels", "probabilities"} <= batch.keys():
        return [], []
    return batch["labels"].tolist(), batch["probabilities"].amax(dim=1).tolist()
