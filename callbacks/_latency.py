"""The latency table of a pruning run: read, measured once, or taken from the checkpoint that a run goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from bsdp._checks import check_whole
from bsdp.callbacks._measuring import example_of
from bsdp.callbacks._run_folder import run_folder, unused_path
from bsdp.channel_latency_measuring import measure_channel_latency_table
from bsdp.latency_measuring import measure_latency_table
from bsdp.stored_times import TABLE_FILE, StoredTimes

_KEY = "latency_table"
Table = TypeVar("Table", bound=StoredTimes)


class TableOfRun(Generic[Table]):
    """The latency table that a run goes by, the same in all processes and after it is resumed.

    Args:
        kind: What tables are of.
        path: A file to read; None to measure the table and write it into the run folder.
        batch_size: Examples in a pass, when it is measured.
    """

    def __init__(self, kind: type[Table], *, path: str | None, batch_size: int) -> None:
        check_whole("latency_batch_size", batch_size, 1)
        self.kind, self.path, self.batch_size = kind, path, batch_size
        self.table: Table | None = None

    def check(self, loaded: Mapping[str, Any] | None) -> None:
        """Forget an earlier fit; refuse a file that does not serve, unless the run has a table in its checkpoint."""
        self.table = None
        if self.path is not None and not self.is_saved(loaded):
            self.kind.load(self.path).check_batch_size(self.batch_size)

    def is_known(self, loaded: Mapping[str, Any] | None) -> bool:
        """Whether there is a table without measuring one."""
        return self.path is not None or self.is_saved(loaded)

    def is_saved(self, loaded: Mapping[str, Any] | None) -> bool:
        """Whether the state of a resumed run has a table."""
        return loaded is not None and loaded.get(_KEY) is not None

    def find(
        self,
        pl_module: LightningModule,
        *,
        network: str,
        shapes: list[list[int]],
        loaded: Mapping[str, Any] | None,
        **options: Any,
    ) -> Table | None:
        """Take the table from where it is, or measure it.

        Args:
            pl_module: The module.
            network: Dotted name of the network.
            shapes: Shapes of the network's inputs for one example.
            loaded: State of the run that this one resumes; None in a new run.
            **options: Further arguments of what measures.

        Returns:
            The table; None in a ``fast_dev_run`` that would have to measure one.
        """
        trainer = pl_module.trainer
        if loaded is not None and self.is_saved(loaded):
            self.table = self.kind.from_values(loaded[_KEY], source="the checkpoint")
        elif self.path is not None:
            self.table = self.kind.load(self.path)
            if problem := self.table.other_inputs(shapes):
                rank_zero_warn(f"`latency_table={self.path!r}`: {problem}")
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            part = pl_module.get_submodule(network) if network else pl_module
            self.table = self._measured(trainer, part, shapes, options)
        return self.table

    def added_to(self, state: dict[str, Any]) -> dict[str, Any]:
        """A callback's state with the table, if there are both."""
        return state | {_KEY: self.table.to_values()} if state and self.table is not None else state

    def _measured(self, trainer: Trainer, part: nn.Module, shapes: list[list[int]], options: dict[str, Any]) -> Table:
        """Measure in the first process, tell the others, and write the file."""
        folder, values = run_folder(trainer), None
        if trainer.is_global_zero:
            measure: Any = measure_latency_table if self.kind.by == "ranks" else measure_channel_latency_table
            table = measure(part, example_of(shapes, part), batch_size=self.batch_size, **options)
            path = table.save(unused_path(folder / TABLE_FILE))
            rank_zero_info(
                f"bsdp: latency table of {len(table.layers)} layers measured, {table.original_ns / 1e6:.3g} ms for "
                f"{self.batch_size} example(s) on {table.device} with {table.threads} thread(s): {path}"
            )
            values = table.to_values()
        return self.kind.from_values(trainer.strategy.broadcast(values), source="the first process")
