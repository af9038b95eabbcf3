"""What a resumed run needs beyond Lightning's own checkpoint, so that it ends as if it had never been stopped.

Lightning saves neither random states nor what was logged in the running epoch, forgets that it was about to stop, and
goes without the validation that was due when it wrote a checkpoint after a training step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from bsdp.callbacks._random_states import random_states, restore_random_states

STATE = "bsdp_run"


class LastCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt``: at every epoch's end, and at the validations that come before it."""

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # A checkpoint of the last validation would not hold what happens between it and the epoch's end.
        return not trainer.validating or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


class RunState(Callback):
    """Save and restore the state of a run under the key ``bsdp_run`` of its checkpoints.

    | entry           | what it is for                                                                             |
    | --------------- | ------------------------------------------------------------------------------------------ |
    | ``random``      | the global random generators, which dropout and foreign data modules draw from             |
    | ``metrics``     | the text of ``metrics.csv``; see `bsdp.runs.reopen_logger`                                 |
    | ``row``         | what the finished step or epoch is about to log, which happens only after its checkpoint   |
    | ``sums``        | what the running epoch has logged so far, so that its means are those of all its batches   |
    | ``plateau``     | values with which ``ReduceLROnPlateau`` schedulers are about to step                       |
    | ``unvalidated`` | whether a validation comes right after the step that the checkpoint was written in         |
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state."""
        epoch: Any = trainer.fit_loop.epoch_progress.current
        step: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        ends, runs = epoch.processed > epoch.completed, epoch.started > epoch.processed
        steps = runs and step.processed > step.completed
        checkpoint[STATE] = {
            "random": random_states(),
            "metrics": _metrics_text(trainer),
            "row": _epoch_row(trainer) if ends else _step_row(trainer) if steps else {},
            "sums": _epoch_sums(trainer) if runs else {},
            "plateau": _plateau_values(trainer) if ends else {},
            "unvalidated": steps and _validation_follows(trainer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the state, before the loops take theirs."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._state = checkpoint.get(STATE, {})
        self._sums = dict(self._state.get("sums", {}))
        if self._state.get("unvalidated"):
            _ask_for_validation(checkpoint["loops"]["fit_loop"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the generators; what is drawn from here on is drawn in a run without a stop, too."""
        if "random" in self._state:
            restore_random_states(self._state["random"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what was about to happen."""
        for index, value in self._state.pop("plateau", {}).items():
            trainer.lr_scheduler_configs[index].scheduler.step(value)
        callbacks = trainer.callbacks if self._state else []  # type: ignore[attr-defined]
        if any(isinstance(callback, EarlyStopping) and _has_stopped(callback) for callback in callbacks):
            trainer.should_stop = True
        self._state = {}

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Add what the epoch had logged before the stop, once the same values were logged again."""
        results = trainer.fit_loop.epoch_loop._results
        for key in self._sums.keys() & results.keys():
            _, value, count = self._sums.pop(key)
            results[key].value = results[key].value + value.to(results[key].value)
            if count is not None:
                batches = results[key].cumulated_batch_size
                results[key].cumulated_batch_size = batches + count.to(batches)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what no batch has logged since; the rest of the epoch had only a validation left."""
        for name, value, count in self._sums.values():
            pl_module.log(name, value if count is None else value / count)
        self._sums = {}


def _has_stopped(callback: EarlyStopping) -> bool:
    # By patience or by a threshold; an epoch of 0 is also that of a callback which has not stopped.
    reason = getattr(callback, "stopping_reason_message", None)  # not there before lightning 2.6
    return callback.wait_count >= callback.patience or bool(callback.stopped_epoch) or reason is not None


def _metrics_text(trainer: Trainer) -> str | None:
    logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
    if logger is None or not trainer.is_global_zero:
        return None
    logger.save()
    path = Path(logger.log_dir) / logger.experiment.NAME_METRICS_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _epoch_row(trainer: Trainer) -> dict[str, float]:
    """What Lightning logs of the epoch after the hooks of its end."""
    return _row(trainer, on_step=False, step=trainer.fit_loop.epoch_loop._batches_that_stepped - 1)


def _step_row(trainer: Trainer) -> dict[str, float]:
    """What Lightning logs of the step after the hooks of its end."""
    loop = trainer.fit_loop.epoch_loop
    if loop._should_accumulate() or not trainer._logger_connector.should_update_logs:
        return {}
    return _row(trainer, on_step=True, step=loop._batches_that_stepped)


def _row(trainer: Trainer, *, on_step: bool, step: int) -> dict[str, float]:
    results = trainer.fit_loop.epoch_loop._results.metrics(on_step=on_step)
    values = {name: float(value) for name, value in results["log"].items()}
    return {"epoch": trainer.current_epoch, **values, "step": step} if values else {}


def _epoch_sums(trainer: Trainer) -> dict[str, tuple[str, Tensor, Tensor | None]]:
    """Sums and counts of the means and sums that the epoch is going to log: ``{key: (name, sum, count)}``."""
    sums: dict[str, tuple[str, Tensor, Tensor | None]] = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.is_tensor and meta.on_epoch and (meta.is_mean_reduction or meta.is_sum_reduction):
            name = f"{meta.name}_epoch" if meta.on_step else meta.name
            count = result.cumulated_batch_size.clone() if meta.is_mean_reduction else None
            sums[key] = (name, result.value.detach().clone(), count)
    return sums


def _plateau_values(trainer: Trainer) -> dict[int, float]:
    values: dict[int, float] = {}
    for index, config in enumerate(trainer.lr_scheduler_configs):
        due = config.interval == "epoch" and (trainer.current_epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(str(config.monitor))
        if config.reduce_on_plateau and due and value is not None:
            values[index] = float(value)
    return values


def _validation_follows(trainer: Trainer) -> bool:
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(loop._should_check_val_fx(fetcher))


def _ask_for_validation(loops: dict[str, Any]) -> None:
    """Let the loops find a finished step and a validation that has just begun, which they take up."""
    progress = loops["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        progress[part]["completed"] = progress[part]["processed"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loops["epoch_loop.val_loop.batch_progress"] |= {"total": dict(begun), "current": dict(begun)}
