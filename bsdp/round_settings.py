"""What every pruner that works in rounds can be told: how much, how often, how fast, and what may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bsdp._checks import check_above, check_at_least, check_choice, check_fraction, check_share, check_whole
from bsdp.cost import COST_KINDS
from bsdp.schedules import SCHEDULES

ANY_ROUNDS = 10_000  # stands for a number of rounds that is not known before the schedule is


@dataclass(frozen=True)
class RoundSettings:
    """Settings of pruning in rounds; checked when made.

    Attributes:
        target: Share of the original model to remove, in (0, 1).
        target_kind: What `target` counts, for example ``"params"`` or ``"macs"``.
        rounds: Number of cuts.
        schedule: How the removal is spread over the rounds, see `kept_share`.
        warmup_epochs: Epochs before the first cut.
        epochs_per_round: Epochs of training after each cut.
        tolerance: Largest allowed fall of the monitored value below the reference; None for no limit.
        mode: ``"max"`` if a higher value is better, else ``"min"``.
        patience_rounds: Rounds in a row that may end below the tolerance before pruning stops: 1 stops at the first.
        distillation: Weight, in [0, 1], of what the unpruned model (at the reference) says, against the labels, after
            the first cut, see `Distiller`; 0 for none.
        distillation_temperature: See `distillation_loss`.
        distillation_module: Dotted name, in the model, of the module that returns the class scores; None for the
            network.
    """

    kinds: ClassVar[Sequence[str]] = COST_KINDS
    unscored: ClassVar[str] = "importance='magnitude'"  # the setting that needs no epoch of scores before a cut

    target: float = 0.7
    target_kind: str = "params"
    rounds: int = 5
    schedule: str = "cubic"
    warmup_epochs: int = 1
    epochs_per_round: int = 1
    tolerance: float | None = 0.01
    mode: str = "max"
    patience_rounds: int = 1
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    distillation_module: str | None = None

    def __post_init__(self) -> None:
        check_share("target", self.target)
        check_choice("target_kind", self.target_kind, self.kinds)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("mode", self.mode, ("max", "min"))
        for name in ("rounds", "epochs_per_round", "patience_rounds"):
            check_whole(name, getattr(self, name), 1)
        check_whole("warmup_epochs", self.warmup_epochs, 0)
        if self.tolerance is not None:
            check_at_least("tolerance", self.tolerance, 0)
        check_fraction("distillation", self.distillation)
        check_above("distillation_temperature", self.distillation_temperature, 0)
        if self.distillation and self.warmup_epochs == 0:
            raise ValueError(
                "`distillation` learns from the model as the warm-up leaves it: `warmup_epochs` must be at least 1."
            )
        if self.warmup_epochs == 0 and (self.tolerance is not None or self.needs_scores):
            raise ValueError(
                "`warmup_epochs` must be at least 1: the first cut needs scores of an epoch and a reference value. "
                f"0 goes only with `tolerance=None` and `{self.unscored}`."
            )

    @property
    def needs_scores(self) -> bool:
        """Whether a cut needs scores of an epoch of training."""
        return True

    @property
    def known_rounds(self) -> int | None:
        """Number of cuts; None as long as the schedule does not say it."""
        return None if self.rounds == ANY_ROUNDS else self.rounds

    @property
    def epochs(self) -> int:
        """Epochs the schedule takes in all."""
        return self.warmup_epochs + self.rounds * self.epochs_per_round


def out_of_rounds(settings: RoundSettings, share: float, bound: str) -> str:
    """What to say of a target that the rounds do not reach.

    Args:
        settings: Those of the pruner.
        share: What could be gone.
        bound: What one round may remove, in words.
    """
    return (
        f"`target={settings.target}` is out of reach in `rounds={settings.rounds}`, each of which may remove {bound}: "
        f"{share:.1%} of the {settings.target_kind} could be gone. Use more rounds (and epochs), a larger ratio or a "
        "smaller target."
    )


def default_rounds(*, epochs: int, warmup_epochs: int, epochs_per_round: int) -> int:
    """All rounds that fit into a number of epochs; at least 0."""
    return max(0, (epochs - warmup_epochs) // epochs_per_round)
