"""Iterative basis pruning as a small state machine; training loops and the Lightning callback only call it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp._checks import check_at_least, check_choice, check_share, check_whole
from bsdp.cost import COST_KINDS, ModelCost
from bsdp.importance import IMPORTANCES, FeatureStatistics, NoScoresError, ScoreAccumulator
from bsdp.layers import named_pairs
from bsdp.pruning import drop_stale_optimizer_state, prune
from bsdp.record import PruningRecord, RoundRecord
from bsdp.schedules import SCHEDULES, kept_share
from bsdp.selection import RANKINGS, select
from bsdp.surgery import load_tensors


@dataclass(frozen=True)
class PruningSettings:
    """Settings of iterative basis pruning; checked when made.

    Attributes:
        target: Share of the original model to remove, in (0, 1).
        target_kind: What `target` counts: ``"params"``, ``"macs"`` or ``"bases"``.
        rounds: Number of cuts.
        schedule: How the removal is spread over the rounds, see `kept_share`.
        warmup_epochs: Epochs before the first cut.
        epochs_per_round: Epochs of training after each cut.
        importance: Score, see `ScoreAccumulator`.
        ranking: How scores of different layers compare, see `select`.
        tolerance: Largest allowed fall of the monitored value below the reference; None for no limit.
        mode: ``"max"`` if a higher value is better, else ``"min"``.
        patience_rounds: Rounds in a row that may end below the tolerance before pruning stops: 1 stops at the first.
        mean_to_bias: Move the mean output of removed bases into the bias.
        min_rank: Rank per group that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one cut may remove.
    """

    target: float = 0.7
    target_kind: Literal["params", "macs", "bases"] = "params"
    rounds: int = 5
    schedule: Literal["geometric", "cubic", "constant"] = "cubic"
    warmup_epochs: int = 1
    epochs_per_round: int = 1
    importance: Literal["mean_square", "mean_abs", "energy", "magnitude"] = "mean_square"
    ranking: Literal["importance", "per_cost", "hull"] = "per_cost"
    tolerance: float | None = 0.01
    mode: Literal["max", "min"] = "max"
    patience_rounds: int = 1
    mean_to_bias: bool = True
    min_rank: int = 1
    max_layer_ratio: float = 0.95

    def __post_init__(self) -> None:
        check_share("target", self.target)
        check_share("max_layer_ratio", self.max_layer_ratio)
        check_choice("target_kind", self.target_kind, COST_KINDS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("importance", self.importance, IMPORTANCES)
        check_choice("ranking", self.ranking, RANKINGS)
        check_choice("mode", self.mode, ("max", "min"))
        for name in ("rounds", "epochs_per_round", "patience_rounds", "min_rank"):
            check_whole(name, getattr(self, name), 1)
        check_whole("warmup_epochs", self.warmup_epochs, 0)
        if self.tolerance is not None:
            check_at_least("tolerance", self.tolerance, 0)
        if self.warmup_epochs == 0 and (self.tolerance is not None or self.importance != "magnitude"):
            raise ValueError(
                "`warmup_epochs` must be at least 1: the first cut needs scores of an epoch and a reference value. "
                "0 goes only with `tolerance=None` and `importance='magnitude'`."
            )

    @property
    def epochs(self) -> int:
        """Epochs the schedule takes in all."""
        return self.warmup_epochs + self.rounds * self.epochs_per_round


def largest_removable_share(cost: ModelCost, settings: PruningSettings) -> float:
    """What would be gone with `min_rank` in every layer: the ceiling of any target."""
    kind = settings.target_kind
    return 1.0 - cost.smallest(kind, min_rank=settings.min_rank) / cost.original(kind)


def refuse_unreachable(cost: ModelCost, settings: PruningSettings) -> None:
    """Refuse a target beyond `largest_removable_share`."""
    most = largest_removable_share(cost, settings)
    if settings.target > most:
        raise ValueError(
            f"`target={settings.target}` is out of reach: with rank {settings.min_rank} in every decomposed layer, "
            f"{most:.1%} of the {settings.target_kind} would be gone (head, batch norms and layers that are not "
            f"decomposed stay). Choose a target below {most:.3f}, or decompose more layers."
        )


class IterativePruner:
    """Prunes a decomposed model round by round while somebody trains it.

    Per epoch: `cut` when `cut_due` (before the first step), `update` once per optimizer step between backward and step,
    `observe` after each validation, then ask `should_stop`. At the end, `restore` puts the smallest model that met the
    tolerance back (the unpruned reference if none did; the last structure's best epoch with ``tolerance=None``).

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        cost: Cost of the network, from `measure_cost`.
        network: Dotted name of the decomposed network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = bsdp.decompose(model)
        >>> settings = bsdp.PruningSettings(target=0.4, rounds=2, tolerance=None)
        >>> pruner = bsdp.IterativePruner(model, settings, bsdp.measure_cost(model))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(settings.epochs):
        ...     if pruner.cut_due(epoch):
        ...         _ = pruner.cut(epoch, optimizers=[optimizer])
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().sum().backward()
        ...     pruner.update()
        ...     optimizer.step()
        >>> pruner.record.rounds[-1].params <= 0.6 * pruner.record.cost.original()
        True
    """

    def __init__(
        self,
        model: nn.Module,
        settings: PruningSettings,
        cost: ModelCost,
        *,
        network: str = "",
        monitor: str = "accuracy",
    ) -> None:
        self.model = model
        self.network = model.get_submodule(network) if network else model
        self.settings = settings
        self.pairs = named_pairs(self.network)
        if not self.pairs:
            raise ValueError("`model` has no decomposed layer: call `bsdp.decompose` first.")
        if settings.target_kind != "macs" or cost.fixed_macs is not None:
            refuse_unreachable(cost, settings)
        self.scores = ScoreAccumulator(self.pairs, importance=settings.importance)
        self.statistics = FeatureStatistics(self.pairs)
        self.scheduled = 0  # cuts that were due so far, skipped ones included
        self.failed_rounds = 0
        self.judged_round = 0  # the newest round that counted in `failed_rounds`
        self.first_epoch = 0
        self.next_cut = settings.warmup_epochs
        self.stopped = False
        self.candidate: dict[str, Any] | None = None
        self.record = PruningRecord(
            monitor=monitor,
            mode=settings.mode,
            target=settings.target,
            target_kind=settings.target_kind,
            tolerance=settings.tolerance,
            network=network,
            cost=cost,
        )
        self.record.rounds.append(self._round_record(0, 0))

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank per group and layer."""
        return {name: pair.rank for name, pair in self.pairs.items()}

    @property
    def warming_up(self) -> bool:
        """Whether no cut was due yet."""
        return self.scheduled == 0

    def begin(self, epoch: int) -> None:
        """Start the warm-up at an epoch other than 0."""
        self.first_epoch = epoch
        self.next_cut = epoch + self.settings.warmup_epochs

    def cut_due(self, epoch: int) -> bool:
        """Whether a cut has to be made before `epoch` (counted from 0) trains."""
        return not self.stopped and self.scheduled < self.settings.rounds and epoch >= self.next_cut

    def update(self) -> None:
        """Add the scores of the gradients that stand now; once per optimizer step."""
        self.scores.update()

    def start_epoch(self) -> None:
        """Forget scores of earlier warm-up epochs, when the head was still new; call it as an epoch starts."""
        if self.warming_up:
            self.scores.reset()
            self.statistics.reset()

    def cut(self, epoch: int, *, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Remove the weakest bases down to the budget of the next round.

        Returns:
            Whether a cut was made. It is skipped, with a warning, when there are no finite scores, or when the weights
            have become NaN since they were taken.
        """
        settings, cost = self.settings, self.record.cost
        self.scheduled += 1
        self.next_cut = epoch + settings.epochs_per_round
        try:
            if not self._is_sound():
                raise NoScoresError("the weights are NaN or infinite.")
            scores = self.scores.compute(self.statistics)
        except NoScoresError as error:
            warnings.warn(f"pruning round {self.scheduled} is skipped: {error}", stacklevel=2)
            return False
        kept = kept_share(self.scheduled, rounds=settings.rounds, target=settings.target, schedule=settings.schedule)
        plan = select(
            scores,
            cost,
            budget=kept * cost.original(settings.target_kind),
            kind=settings.target_kind,
            ranking=settings.ranking,
            min_rank=settings.min_rank,
            max_layer_ratio=settings.max_layer_ratio,
        )
        before = self.record.rounds[-1].accuracy_best if self._last_value is None else self._last_value
        prune(
            self.network,
            plan,
            means=self.statistics.means() if settings.mean_to_bias else None,
            optimizers=optimizers,
        )
        self.scores.reset()
        self.statistics.reset()
        self.record.rounds.append(self._round_record(len(self.record.rounds), epoch, before))
        if self.scheduled == settings.rounds and not plan.reached:
            warnings.warn(
                "the last round did not reach the budget: `min_rank` or `max_layer_ratio` stood in the way; "
                "use more rounds or a larger `max_layer_ratio`.",
                stacklevel=2,
            )
        return True

    _last_value: float | None = None

    def observe(self, value: float) -> None:
        """Take the monitored value of a validation of the present structure.

        NaN and infinity do not count, nor does any value of a model with such weights: it may still guess one class.
        """
        value = float(value)
        if not math.isfinite(value) or not self._is_sound():
            return
        self._last_value = value
        last = self.record.rounds[-1]
        if last.accuracy_after is None:
            self.record.update_last(accuracy_after=value)
        improved = last.accuracy_best is None or self._better(value, last.accuracy_best)
        if not improved:
            return
        self.record.update_last(accuracy_best=value)
        if last.round == 0:
            self.record.reference = value
            self.record.reference_state = self._state()
        elif self.tolerated(value):
            # Rounds only ever get smaller, so the newest tolerated structure is the smallest.
            self.candidate = {"round": last.round, "value": value, "state": self._state()}

    def tolerated(self, value: float) -> bool:
        """Whether a monitored value is within the tolerance of the reference."""
        if self.settings.tolerance is None or self.record.reference is None:
            return True
        sign = 1.0 if self.settings.mode == "max" else -1.0
        return sign * (value - self.record.reference) >= -self.settings.tolerance - 1e-12

    def should_stop(self, epoch: int) -> bool:
        """Whether to stop training after `epoch`: too many rounds ended below the tolerance and a cut would be next."""
        if self.stopped or self.settings.tolerance is None or not self.cut_due(epoch + 1):
            return self.stopped
        last = self.record.rounds[-1]
        if last.round > self.judged_round and last.accuracy_best is not None:
            self.judged_round = last.round
            self.failed_rounds = 0 if self.tolerated(last.accuracy_best) else self.failed_rounds + 1
        self.stopped = self.failed_rounds >= self.settings.patience_rounds
        return self.stopped

    def restore(self, *, optimizers: Iterable[Optimizer] = ()) -> RoundRecord:
        """Put the smallest model that met the tolerance back, whatever was tried later.

        A model whose weights have become NaN or infinite gives way to the last sound one in any case.

        Returns:
            The round the model now has.
        """
        state, index = None, len(self.record.rounds) - 1
        newest = self.candidate is not None and self.candidate["round"] == self.record.rounds[-1].round
        broken = not self._is_sound()
        if self.candidate is not None and (newest or broken or self.settings.tolerance is not None):
            state, index = self.candidate["state"], self.candidate["round"]
        elif (broken or self.settings.tolerance is not None) and self.record.reference_state is not None:
            state, index = self.record.reference_state, 0
        if broken:
            left = f"the model of round {index} is taken" if state is not None else "no validation saw a sound model"
            warnings.warn(f"the weights have become NaN or infinite: {left}. Lower the learning rate.", stacklevel=2)
        if state is not None:
            load_tensors(self.model, state)
            for optimizer in optimizers:
                drop_stale_optimizer_state(optimizer)
        self.finish(index)
        return self.record.rounds[index]

    def finish(self, index: int | None = None) -> None:
        """Mark a round (by default the newest) as the one the run ended with, and let the candidate go."""
        self.record.chosen = len(self.record.rounds) - 1 if index is None else index
        self.candidate = None
        self.scores.reset()
        self.statistics.reset()

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores and statistics over processes, before `cut`."""
        self.scores.reduce(reduce)
        self.statistics.reduce(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {
            "scheduled": self.scheduled,
            "failed_rounds": self.failed_rounds,
            "judged_round": self.judged_round,
            "first_epoch": self.first_epoch,
            "next_cut": self.next_cut,
            "stopped": self.stopped,
            "last_value": self._last_value,
            "candidate": self.candidate,
            "scores": self.scores.state_dict(),
            "statistics": self.statistics.state_dict(),
            "record": self.record.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the model must have the ranks of then."""
        self.scheduled, self.failed_rounds = int(state["scheduled"]), int(state["failed_rounds"])
        self.stopped, self._last_value = bool(state["stopped"]), state["last_value"]
        self.judged_round, self.next_cut = int(state["judged_round"]), int(state["next_cut"])
        self.first_epoch = int(state["first_epoch"])
        self.candidate = state["candidate"]
        self.scores.load_state_dict(state["scores"])
        self.statistics.load_state_dict(state["statistics"])
        record, settings = self.record, self.settings
        monitor, network = record.monitor, record.network
        record.load_state_dict(state["record"])
        if record.chosen is not None:  # a finished run goes on from the round it ended with
            record.rounds = record.rounds[: record.chosen + 1]
            record.chosen, self.failed_rounds, self.stopped = None, 0, False
        if record.tolerance != settings.tolerance:
            self.failed_rounds, self.stopped = 0, False
        # What decides from now on are the settings of this run, and reports must say so.
        record.monitor, record.network, record.mode = monitor, network, settings.mode
        record.target, record.target_kind = settings.target, settings.target_kind
        record.tolerance = settings.tolerance

    def _better(self, value: float, other: float) -> bool:
        return value > other if self.settings.mode == "max" else value < other

    def _is_sound(self) -> bool:
        # Buffers may hold infinity, in masks of attention.
        broken = any(bool(buffer.isnan().any()) for buffer in self.model.buffers())
        return not broken and all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _state(self) -> dict[str, Tensor]:
        return {key: value.detach().to("cpu", copy=True) for key, value in self.model.state_dict().items()}

    def _round_record(self, index: int, epoch: int, before: float | None = None) -> RoundRecord:
        cost, ranks = self.record.cost, self.ranks
        return RoundRecord(
            round=index,
            epoch=epoch,
            ranks=ranks,
            bases=cost.deployed(ranks, "bases"),
            params=cost.deployed(ranks, "params"),
            macs=None if cost.fixed_macs is None else cost.deployed(ranks, "macs"),
            accuracy_before=before,
        )

    def set_cost(self, cost: ModelCost) -> None:
        """Replace the cost, once MACs could be measured.

        Raises:
            ValueError: If the target is out of reach.
        """
        refuse_unreachable(cost, self.settings)
        self.record.cost = cost
        for i, old in enumerate(self.record.rounds):
            macs = None if cost.fixed_macs is None else cost.deployed(old.ranks, "macs")
            self.record.rounds[i] = RoundRecord(**{**vars(old), "macs": macs})


def default_rounds(*, epochs: int, warmup_epochs: int, epochs_per_round: int) -> int:
    """All rounds that fit into a number of epochs; at least 0."""
    return max(0, (epochs - warmup_epochs) // epochs_per_round)
