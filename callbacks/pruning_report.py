"""`PruningReport`: after a pruning run, say what was gained: a table, a picture and ``summary.json``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from bsdp._checks import check_at_least
from bsdp.callbacks._comparison import file_sizes, fold_network, latencies, macs, network_of
from bsdp.callbacks._evaluation import cannot_test, evaluate, random_state_kept, weights
from bsdp.callbacks._records import find_details, find_file, find_record, finish_pruning
from bsdp.callbacks._run_folder import run_folder, unused_path
from bsdp.plots import plot_pruning_curves
from bsdp.record import PruningRecord
from bsdp.report import Measurements, known_shapes, summarize, write_summary
from bsdp.report_table import print_summary


class PruningReport(Callback):
    """Test the unpruned and the pruned model after the fit, compare size and speed, and write a report.

    Needs a callback that prunes, such as `IterativeBasisPruning`. A table is printed, and the run folder gets
    ``summary.json`` and ``pruning_curves.png``. What cannot be measured is null in the summary, with a note that says
    why; a finished fit never fails for it.

    Args:
        test: Test both models with the module's own ``test_step`` and test data.
        test_metric: Metric to report, as the test step logs it. Default: the monitored one with ``val`` turned into
            ``test`` (``val_accuracy``: ``test_accuracy``).
        latency_batch_size: Examples in the timed forward pass.
        latency_repeats: Timed passes per network; 0 measures no latency.
        latency_device: Device to time on, for example ``cpu``. Default: the device the run used.
        plot: Draw ``pruning_curves.png``.

    Attributes:
        summary: What was written, see `bsdp.report.summarize`; None before the end of a fit.
    """

    def __init__(
        self,
        *,
        test: bool = True,
        test_metric: str | None = None,
        latency_batch_size: int = 1,
        latency_repeats: int = 30,
        latency_device: str | None = None,
        plot: bool = True,
    ) -> None:
        check_at_least("latency_batch_size", latency_batch_size, 1)
        check_at_least("latency_repeats", latency_repeats, 0)
        self.test = test
        self.test_metric = test_metric
        self.latency_batch_size = latency_batch_size
        self.latency_repeats = latency_repeats
        self.latency_device = None if latency_device is None else torch.device(latency_device)
        self.plot = plot
        self.summary: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a trainer in which nothing prunes."""
        find_record(trainer, needed_by=type(self).__name__)
        self.summary = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and report; the pruning callback has put the chosen model into the module by now."""
        finish_pruning(trainer, pl_module)
        record = find_record(trainer, needed_by=type(self).__name__)
        if trainer.fast_dev_run or record.chosen is None:  # type: ignore[attr-defined]
            rank_zero_info("bsdp: no pruning took place, so there is no report")
            return
        with random_state_kept():
            self._report(trainer, pl_module, record)

    def _report(self, trainer: Trainer, pl_module: LightningModule, record: PruningRecord) -> None:
        folder = run_folder(trainer)  # here, because all processes must ask for it
        notes: list[str] = []
        measured, original = self._tested(trainer, pl_module, record, notes)
        if trainer.is_global_zero:
            if original is not None:
                measured |= self._compared(trainer, pl_module, record, original, notes)
            seed = os.environ.get("PL_GLOBAL_SEED")
            facts = Measurements(**measured, seed=int(seed) if seed else None, notes=tuple(notes))
            self.summary = summarize(record, facts) | find_details(trainer)
            self._write(trainer, record, folder)

    def _tested(
        self, trainer: Trainer, pl_module: LightningModule, record: PruningRecord, notes: list[str]
    ) -> tuple[dict[str, Any], nn.Module | None]:
        """Test both models; also the original network, as the reference weights are in the module just once."""
        reason = cannot_test(trainer, pl_module) if self.test else "`test: false` was set"
        metric = self.test_metric or _test_name(record.monitor)
        values: dict[str, Any] = {"test_metric": metric} if reason is None else {}
        original: nn.Module | None = None

        def test(key: str) -> None:
            values[key] = _tested_value(trainer, pl_module, metric)

        def measure_reference(state: dict[str, Any]) -> None:
            nonlocal original
            with weights(pl_module, state, record.reference_shape):
                if reason is None:
                    _try("the unpruned model was not tested", notes, lambda: test("accuracy_reference"))
                if trainer.is_global_zero:
                    original = fold_network(pl_module, record.network)

        if reason is None:
            _try("the pruned model was not tested", notes, lambda: test("accuracy_pruned"))
        else:
            notes.append(f"the models were not tested: {reason}")
        state = record.reference_state
        if record.reference_shape.get("widths"):
            notes.append("the network had lost channels before this run: shares are of what it had then")
        if state is None:
            notes.append(
                "the unpruned model was not measured: its weights were not kept, as there was no validation before the "
                "first cut or the run had already ended when it was resumed"
            )
        else:
            _try("the unpruned model was not measured", notes, lambda: measure_reference(state))
        return values, original

    def _compared(
        self, trainer: Trainer, pl_module: LightningModule, record: PruningRecord, original: nn.Module, notes: list[str]
    ) -> dict[str, Any]:
        """File sizes, latencies and, where the run has none, MACs."""
        values: dict[str, Any] = {}
        networks = {"original": original, "pruned": fold_network(pl_module, record.network)}
        network = network_of(pl_module, record.network)
        written = find_file(trainer, "weights_path")
        _try("file sizes are missing", notes, lambda: values.update(file_sizes(original, network, written)))
        shapes = known_shapes(record)
        if not shapes:
            notes.append(
                "MACs and latency are missing: the shape of the network's input is not known; set "
                "`example_input_array` in the LightningModule"
            )
            return values
        if record.cost.fixed_macs is None:
            _try("MACs are missing", notes, lambda: values.update(macs(networks, shapes)))
        if self.latency_repeats:
            device = self.latency_device or trainer.strategy.root_device
            options: dict[str, Any] = {"batch_size": self.latency_batch_size, "repeats": self.latency_repeats}
            measure = partial(latencies, networks, shapes, device=device, **options)
            _try("latency is missing", notes, lambda: values.update(measure()))
        return values

    def _write(self, trainer: Trainer, record: PruningRecord, folder: Path) -> None:
        assert self.summary is not None
        written = [write_summary(self.summary, unused_path(folder / "summary.json", trainer=trainer))]
        if self.plot:
            picture = unused_path(folder / "pruning_curves.png", trainer=trainer)
            written.append(plot_pruning_curves(record, picture))
        print_summary(self.summary)
        pruned = [find_file(trainer, attribute) for attribute in ("weights_path", "checkpoint_path")]
        print("\n".join(f"written: {path}" for path in [*filter(None, pruned), *written]), flush=True)


def _tested_value(trainer: Trainer, pl_module: LightningModule, metric: str) -> float:
    values = evaluate(trainer, pl_module)
    if metric not in values:
        raise ValueError(f"the test logs {sorted(values)}, not {metric!r}: name one of them as `test_metric`")
    return values[metric]


def _test_name(monitor: str) -> str:
    """The name under which a test step would log what the validation step logs as `monitor`."""
    return re.sub(r"(?<![a-z])val(idation|id)?(?![a-z])", "test", monitor)


def _try(failure: str, notes: list[str], action: Callable[[], None]) -> None:
    """Run the user's code after a fit that succeeded: an error there becomes a note."""
    try:
        action()
    except Exception as error:  # whatever a test step, a data module or a forward may raise
        notes.append(f"{failure}: {type(error).__name__}: {error}")
