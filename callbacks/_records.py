"""Finding what another callback offers, without knowing its class, and putting a record into words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from bsdp.record import PruningRecord


def find_record(trainer: Trainer, *, needed_by: str) -> PruningRecord:
    """The record of the callback that prunes.

    Raises:
        ValueError: If no callback of the trainer has one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        record = getattr(callback, "record", None)
        if isinstance(record, PruningRecord):
            return record
    names = ", ".join(type(callback).__name__ for callback in trainer.callbacks)  # type: ignore[attr-defined]
    raise ValueError(
        f"`{needed_by}` reports on a pruning run, but no callback here keeps a `bsdp.PruningRecord` (there are: "
        f"{names or 'none'}). Add `bsdp.callbacks.IterativeBasisPruning` to the trainer, or leave `{needed_by}` out."
    )


def finish_pruning(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the callback that prunes finish a resumed run, whichever of the callbacks is asked first."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        finish = getattr(callback, "finish_resumed", None)
        if callable(finish):
            finish(trainer, pl_module)


def follow_cut(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let the callback that decomposed the module choose what trains of pairs that have changed."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        follow = getattr(callback, "follow_cut", None)
        if callable(follow):
            follow(trainer, pl_module)


def find_file(trainer: Trainer, attribute: str) -> Path | None:
    """A file that the pruning callback has written and names in an attribute, if it has.

    Args:
        trainer: The trainer whose callbacks to ask.
        attribute: ``"weights_path"`` for the safetensors file, ``"checkpoint_path"`` for the checkpoint.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        path = getattr(callback, attribute, None)
        if isinstance(path, (str, Path)) and Path(path).is_file():
            return Path(path)
    return None


def find_summary(trainer: Trainer) -> dict[str, Any] | None:
    """The summary that a report callback of this trainer has made; None without one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        summary = getattr(callback, "summary", None)
        if isinstance(summary, dict) and "params_pruned" in summary:
            return summary
    return None


def find_details(trainer: Trainer) -> dict[str, Any]:
    """What callbacks of this trainer add to the summary under names of their own, plain values."""
    details: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        details.update(getattr(callback, "summary_details", None) or {})
    return details


def structure_values(record: PruningRecord) -> dict[str, float]:
    """The present structure as logged values, see the table of `IterativeBasisPruning`."""
    last = record.rounds[-1]
    values = {"bsdp/round": float(last.round)}
    for kind in ("bases", "params", "macs", "latency"):
        value, kept = getattr(last, kind), record.kept(last, kind)
        if value is not None and kept is not None:
            values[f"bsdp/{kind}"], values[f"bsdp/{kind}_kept"] = float(value), kept
    kept = record.kept(last, "channels")
    if kept is not None:
        values["bsdp/channels"], values["bsdp/channels_kept"] = float(sum(last.channels.values())), kept
        values.update({f"bsdp/channels/{name}": float(count) for name, count in last.channels.items()})
    return values | {f"bsdp/rank/{name}": float(rank) for name, rank in last.ranks.items()}


def describe_cut(record: PruningRecord) -> str:
    """What the newest cut left, in words."""
    last = record.rounds[-1]
    kept = {kind: record.kept(last, kind) for kind in ("params", "macs", "latency")}
    shown = [f"{value:.1%} of the {kind}" for kind, value in kept.items() if value is not None]
    if last.ranks:
        shown.append(f"{last.bases} bases")
    if last.channels:
        shown.append(f"{sum(last.channels.values())} channels")
    what = f" (cut of {last.stage})" if last.stage else ""
    return f"leaves {', '.join(shown)}{what}"
