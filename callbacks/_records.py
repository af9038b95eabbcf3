"""Finding what another callback offers, without knowing its class."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bsdp.record import PruningRecord


def find_record(trainer: Trainer, *, needed_by: str) -> PruningRecord:
    """The record of the callback that prunes.

    Raises:
        MisconfigurationException: If no callback of the trainer has one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        record = getattr(callback, "record", None)
        if isinstance(record, PruningRecord):
            return record
    names = ", ".join(type(callback).__name__ for callback in trainer.callbacks)  # type: ignore[attr-defined]
    raise MisconfigurationException(
        f"`{needed_by}` reports on a pruning run, but no callback here keeps a `bsdp.PruningRecord` (there are: "
        f"{names or 'none'}). Add `bsdp.callbacks.IterativeBasisPruning` to the trainer, or leave `{needed_by}` out."
    )


def find_summary(trainer: Trainer) -> dict[str, Any] | None:
    """The summary that a report callback of this trainer has made; None without one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        summary = getattr(callback, "summary", None)
        if isinstance(summary, dict) and "params_pruned" in summary:
            return summary
    return None
