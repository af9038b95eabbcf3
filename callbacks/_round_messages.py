"""What a pruning callback tells its user in the course of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bsdp.importance import ScoreAccumulator
from bsdp.record import PruningRecord, RoundRecord
from bsdp.rounds import RoundPruner

_FEW_TERMS = 4


def say_whole(record: PruningRecord) -> None:
    """Name the layers that no round will cut, once the network was seen to run."""
    names = [name for name, layer in record.cost.layers.items() if layer.whole]
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        rank_zero_info(
            f"bsdp: kept whole: {shown}: the model reads their weight or bias, or passes more than the input"
        )


def say_few_terms(scores: ScoreAccumulator, *, epoch: int) -> None:
    """Say that a cut ranks by very little, if so."""
    if 0 < scores.steps < _FEW_TERMS:
        rank_zero_info(
            f"bsdp: epoch {epoch}: the cut ranks by scores of {scores.steps} {scores.unit} only: more "
            "`epochs_per_round`, smaller batches, or `importance: fisher` (a term for every example) give more"
        )


def say_stopped(record: PruningRecord, settings: Any, monitor: str) -> None:
    """Say that too many rounds ended below the tolerance."""
    last = record.rounds[-1]
    rank_zero_info(
        f"bsdp: round {last.round} ended at {monitor}={last.accuracy_best:.4f}, more than the tolerance "
        f"{settings.tolerance} from the reference {record.reference:.4f}: pruning stops"
    )


def say_finished(pruner: RoundPruner, chosen: RoundRecord) -> None:
    """Say what the run ends with, and warn if that is not what was asked for."""
    record, settings = pruner.record, pruner.settings
    if pruner.scheduled < settings.rounds and not pruner.stopped:
        rank_zero_warn(
            f"training ended after {pruner.scheduled} of {settings.rounds} pruning rounds, short of "
            f"`target={settings.target}`: something other than the tolerance stopped it (`max_steps`, `max_time`, "
            "`EarlyStopping`, ...). Let it train longer, or set fewer `rounds`."
        )
    if chosen.round == 0 and len(record.rounds) > 1 and settings.tolerance is not None:
        rank_zero_warn(
            f"no pruned model was within `tolerance={settings.tolerance}` of the reference {record.reference}: the "
            "module holds the unpruned model. Train longer per round, cut in more rounds, or allow a larger tolerance."
        )
    kept = record.kept(chosen, "params")
    assert kept is not None
    rank_zero_info(f"bsdp: finished with the model of round {chosen.round}: {kept:.1%} of the parameters kept")
