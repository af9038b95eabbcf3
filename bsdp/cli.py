"""The command line: `bsdp fit|validate|test|predict` and the other words."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger


class EpochLines(Callback):
    """Print one line per epoch: the progress display where standard output is a file."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = ", ".join(f"{key} {float(value):.4f}" for key, value in sorted(trainer.logged_metrics.items()))
        seconds = time.monotonic() - self._start
        line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} ({seconds:.0f} s): {values}"
        if trainer.is_global_zero:
            print(line, flush=True)


class BsdpCLI(LightningCLI):
    """LightningCLI with a run folder and links between model and data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="The run's folder is logs/<name>/version_N.")

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        normalization = getattr(self.model, "normalization", None)
        if self.datamodule is not None and getattr(self.datamodule, "normalization", 0) is None:
            self.datamodule.normalization = normalization

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        kwargs.setdefault("logger", CSVLogger("logs", name=self._get(self.config, "name")))
        if not sys.stdout.isatty():
            kwargs.setdefault("enable_progress_bar", False)
        trainer = super().instantiate_trainer(**kwargs)
        if not sys.stdout.isatty():
            trainer.callbacks.insert(0, EpochLines())
        return trainer


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    BsdpCLI(
        LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True, args=args,
        seed_everything_default=0, auto_configure_optimizers=True,
    )
