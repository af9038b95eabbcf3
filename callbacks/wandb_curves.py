"""`WandbPruningCurves`: accuracy against what is kept, ranks per layer and the result, in Weights & Biases."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from bsdp.callbacks._records import find_record, find_summary
from bsdp.plots import plot_pruning_curves
from bsdp.record import PruningRecord, RoundRecord
from bsdp.report import short_names, summarize


class WandbPruningCurves(Callback):
    """Log the curves of a pruning run to every `WandbLogger` of the trainer, offline or not.

    Needs a `WandbLogger` and a callback that prunes, such as `IterativeBasisPruning`. A round is logged once it is
    over, as one point of each curve. With `PruningReport` in the trainer, the result includes what it measured.

    ======================================= =========================================================================
    ``pruning/<monitor>_vs_params_kept``    best value of a round; its x-axis is ``pruning/params_kept``
    ``pruning/<monitor>_vs_macs_kept``      the same; its x-axis is ``pruning/macs_kept``
    ``pruning/rank/<layer>``                rank per group; its x-axis is ``pruning/round``
    ``pruning/rounds``, ``pruning/layers``  tables: every round, and every layer of the chosen model
    ``pruning/result``                      table: original, pruned and ratio of accuracy, parameters, MACs, ...
    ``pruning/curves``                      picture with both curves and the ranks as a heat map
    ======================================= =========================================================================

    The values of ``summary.json`` go into the run's summary as ``pruning/<key>``.

    Args:
        prefix: First part of all keys.
        rank_lines: Log one line per layer; false leaves the ranks to table and picture.
        picture: Log the picture.
    """

    def __init__(self, *, prefix: str = "pruning", rank_lines: bool = True, picture: bool = True) -> None:
        self.prefix = prefix
        self.rank_lines = rank_lines
        self.picture = picture
        self._logged: dict[str, int] = {}  # rounds logged so far per W&B run, which a resumed fit may continue
        self._defined: set[str] = set()
        self._fitting = self._ended = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a trainer that does not log to W&B."""
        if stage == "fit" and not trainer.fast_dev_run and not _loggers(trainer):  # type: ignore[attr-defined]
            names = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
            raise ValueError(
                f"`WandbPruningCurves` needs a `WandbLogger` among the trainer's loggers (there are: {names}). Add "
                "`lightning.pytorch.loggers.WandbLogger(offline=True)`, on the command line "
                "`--config configs/logger/wandb.yaml`, or leave the callback out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer in which nothing prunes."""
        find_record(trainer, needed_by=type(self).__name__)
        self._fitting, self._ended = True, False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the rounds that are over."""
        self._log_rounds(trainer, over=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log what there is."""
        if self._fitting:
            self._log_rounds(trainer, over=False)
            self._fitting = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the fit came to its end; the result is logged after all callbacks have seen this."""
        self._fitting, self._ended = False, True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the last round and the result; the loggers are finalized after this."""
        if stage != "fit" or not self._ended:
            return
        self._ended = False
        record = find_record(trainer, needed_by=type(self).__name__)
        if record.chosen is None:
            return
        self._log_rounds(trainer, over=False)
        summary = find_summary(trainer) or summarize(record)
        for run in self._runs(trainer):
            self._log_result(run, record, summary)

    def state_dict(self) -> dict[str, Any]:
        """Which rounds which W&B run has."""
        return {"logged": dict(self._logged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._logged = dict(state_dict["logged"])

    def _runs(self, trainer: Trainer) -> list[Any]:
        return [logger.experiment for logger in _loggers(trainer)] if trainer.is_global_zero else []

    def _define(self, run: Any, record: PruningRecord) -> None:
        """Give each curve its own x-axis; the layers by a wildcard, as their names may hold dots."""
        monitor, prefix = record.monitor.replace("/", "_"), self.prefix
        axes = {f"{kind}_kept": f"{monitor}_vs_{kind}_kept" for kind in ("params", "macs")} | {"round": "rank/*"}
        for axis, metric in axes.items():
            run.define_metric(f"{prefix}/{axis}")
            run.define_metric(f"{prefix}/{metric}", step_metric=f"{prefix}/{axis}")
        self._defined.add(run.id)

    def _log_rounds(self, trainer: Trainer, *, over: bool) -> None:
        record = find_record(trainer, needed_by=type(self).__name__)
        rounds = record.rounds[: len(record.rounds) - over]
        for run in self._runs(trainer):
            if run.id not in self._defined:  # here, not as the fit starts, when the record may not know its monitor yet
                self._define(run, record)
            for entry in rounds[self._logged.get(run.id, 0) :]:
                # One call per round and no `step`: W&B's own counter goes on, and x and y stand in the same row.
                run.log(self._values(record, entry))
            self._logged[run.id] = max(len(rounds), self._logged.get(run.id, 0))

    def _values(self, record: PruningRecord, entry: RoundRecord) -> dict[str, float]:
        values: dict[str, float] = {f"{self.prefix}/round": entry.round}
        monitor = record.monitor.replace("/", "_")
        for kind in ("params", "macs"):
            kept = record.kept(entry, kind)
            if kept is not None:
                values[f"{self.prefix}/{kind}_kept"] = kept
                if entry.accuracy_best is not None:
                    values[f"{self.prefix}/{monitor}_vs_{kind}_kept"] = entry.accuracy_best
        if self.rank_lines:
            names = short_names(record)
            values.update({f"{self.prefix}/rank/{names[name]}": rank for name, rank in entry.ranks.items()})
        return values

    def _log_result(self, run: Any, record: PruningRecord, summary: dict[str, Any]) -> None:
        import wandb

        result = wandb.Table(columns=["quantity", "original", "pruned", "pruned / original"], data=_result(summary))
        values: dict[str, Any] = {f"{self.prefix}/result": result}
        for key in ("rounds", "layers"):
            rows = summary[key]
            columns = list(rows[0]) if rows else []
            values[f"{self.prefix}/{key}"] = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        with tempfile.TemporaryDirectory() as folder:
            if self.picture:
                path = plot_pruning_curves(record, Path(folder) / "curves.png")
                values[f"{self.prefix}/curves"] = wandb.Image(str(path))
            run.log(values)
        plain = {key: value for key, value in summary.items() if isinstance(value, (str, int, float))}
        run.summary.update({f"{self.prefix}/{key}": value for key, value in plain.items()})


def _loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _result(summary: dict[str, Any]) -> list[list[Any]]:
    """Rows ``[quantity, original, pruned, ratio]``."""
    keys = {
        str(summary["test_metric"] or "test metric"): ("accuracy_reference", "accuracy_pruned"),
        str(summary["monitor"]): ("validation_reference", "validation_pruned"),
        "parameters": ("params_original", "params_pruned"),
        "MACs": ("macs_original", "macs_pruned"),
        "file size (bytes)": ("file_bytes_original", "file_bytes_pruned"),
        "latency (ms)": ("latency_ms_original", "latency_ms_pruned"),
    }
    rows = []
    for quantity, (original, pruned) in keys.items():
        before, after = summary[original], summary[pruned]
        rows.append([quantity, before, after, after / before if before and after is not None else None])
    return rows
