"""The latency table of a pruning run: read, measured once, or taken from the checkpoint that a run goes on from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bsdp.callbacks._measuring import example_of
from bsdp.callbacks._run_folder import run_folder, unused_path
from bsdp.latency import LatencyTable
from bsdp.latency_measuring import measure_latency_table

TABLE_FILE = "latency_table.json"


def table_for_run(
    pl_module: LightningModule,
    *,
    network: str,
    shapes: list[list[int]],
    path: str | None,
    saved: Any,
    batch_size: int,
) -> LatencyTable | None:
    """The table that this run goes by, the same in all processes.

    Args:
        pl_module: The module.
        network: Dotted name of the network.
        shapes: Shapes of the network's inputs for one example.
        path: A file to read; None to measure and to write the table into the run folder.
        saved: Values of the table that the resumed run went by; None in a new run.
        batch_size: Examples in a pass, when it is measured.

    Returns:
        The table; None in a ``fast_dev_run`` that would have to measure one.
    """
    trainer = pl_module.trainer
    if saved is not None:
        return LatencyTable.from_values(saved, source="the checkpoint")
    if path is not None:
        table = LatencyTable.load(path)
        if problem := table.other_inputs(shapes):
            rank_zero_warn(f"`latency_table={path!r}`: {problem}")
        return table
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return _measured(trainer, pl_module, network=network, shapes=shapes, batch_size=batch_size)


def _measured(
    trainer: Trainer, pl_module: LightningModule, *, network: str, shapes: list[list[int]], batch_size: int
) -> LatencyTable:
    """Measure in the first process, tell the others, and write the file."""
    folder, values = run_folder(trainer), None
    if trainer.is_global_zero:
        part = pl_module.get_submodule(network) if network else pl_module
        table = measure_latency_table(part, example_of(shapes, part), batch_size=batch_size)
        path = table.save(unused_path(folder / TABLE_FILE))
        rank_zero_info(
            f"bsdp: latency table of {len(table.layers)} layers measured, {table.original_ns / 1e6:.3g} ms for "
            f"{batch_size} example(s) on {table.device} with {table.threads} thread(s): {path}"
        )
        values = table.to_values()
    return LatencyTable.from_values(trainer.strategy.broadcast(values), source="the first process")
