"""Pruning in rounds as a small state machine: when to cut, what counts as tolerated, which model is kept.

What is removed, and by which score, is the business of *stages* (`bsdp.stages`); a pruner has one or more of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.cost import ModelCost
from bsdp.distillation import SelfDistillation
from bsdp.importance import NoScoresError
from bsdp.layers import named_pairs
from bsdp.optimizer_state import drop_stale_state
from bsdp.record import PruningRecord, RoundRecord
from bsdp.round_settings import RoundSettings
from bsdp.schedules import kept_share
from bsdp.snapshots import copy_values, load_values
from bsdp.stages import Stage
from bsdp.structure import set_shape, shape_of


class RoundPruner:
    """Prunes a model round by round while somebody trains it.

    Per epoch: `cut` when `cut_due` (before the first step), `update` once per optimizer step between backward and step,
    `observe` after each validation, then ask `should_stop`. At the end, `restore` puts the smallest model that met the
    tolerance back (the unpruned reference if none did; the last structure's best epoch with ``tolerance=None``).

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        cost: Cost of the network as it is now.
        stages: What can be cut, by name.
        network: Dotted name of the network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RoundSettings,
        cost: ModelCost,
        stages: Mapping[str, Stage],
        *,
        network: str = "",
        monitor: str = "accuracy",
    ) -> None:
        self.model = model
        self.network = model.get_submodule(network) if network else model
        self.settings: Any = settings
        self.stages = dict(stages)
        self.cost = cost
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
        self._last_value: float | None = None
        self.distillation: SelfDistillation | None = None
        if settings.distillation:
            name = network if settings.distillation_module is None else settings.distillation_module
            weight, temperature = settings.distillation, settings.distillation_temperature
            self.distillation = SelfDistillation(model, self.record, name, weight=weight, temperature=temperature)

    # --- what pruners of other units add ------------------------------------------------------------------------

    def describe(self, record: RoundRecord) -> RoundRecord:
        """Complete the record of the present structure."""
        return record

    def remove(self, budget: float, optimizers: Iterable[Optimizer]) -> bool:
        """Cut the network down to a budget; return whether it is met."""
        stage = next(iter(self.stages.values()))
        return stage.apply(stage.plan(budget, self.cost), optimizers)

    def check_target(self) -> None:
        """Refuse a target that no cut can reach, or not in the rounds of the settings."""

    @property
    def original_known(self) -> bool:
        """Whether the cost is that of the original network, so that targets can be checked."""
        return self.cost.knows(self.settings.target_kind)

    def measured_cost(self) -> ModelCost:
        """Cost of the network as it is now; it changes when layers lose channels."""
        return self.cost

    # --- one epoch ----------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank per group and layer."""
        return {name: pair.rank for name, pair in named_pairs(self.network).items()}

    @property
    def warming_up(self) -> bool:
        """Whether no cut was due yet."""
        return self.scheduled == 0

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""
        return any(stage.needs_gradients for stage in self.stages.values())

    def begin(self, epoch: int) -> None:
        """Start the warm-up at an epoch other than 0."""
        self.first_epoch = epoch
        self.next_cut = epoch + self.settings.warmup_epochs

    def cut_due(self, epoch: int) -> bool:
        """Whether a cut has to be made before `epoch` (counted from 0) trains."""
        return not self.stopped and self.scheduled < self.settings.rounds and epoch >= self.next_cut

    def update(self, optimizer: Optimizer | None = None, *, optimizers: Sequence[Optimizer] = ()) -> None:
        """Add the scores of the gradients that stand now, then penalties to the gradients; once per optimizer step.

        Penalties only prepare cuts: none is added after the last one.

        Args:
            optimizer: The one that is about to step, where there are several; what it does not concern waits.
            optimizers: All there are. Without them, one that holds part of what is scored scores all of it.
        """
        for stage in self.stages.values():
            if optimizer is None or stage.holds(optimizer):
                stage.update(optimizer, optimizers)
                if not self.stopped and self.scheduled < self.settings.rounds:
                    stage.penalise(optimizer)

    @contextmanager
    def collecting(
        self, scale: float = 1.0, parts: int = 1, *, scores: bool = True, statistics: bool = True
    ) -> Iterator[None]:
        """Watch the forward and backward passes inside the ``with`` block; a sample of the batches is enough.

        Args:
            scale: What the loss is multiplied with, under mixed precision.
            parts: What the loss is divided by, where gradients of so many batches are accumulated.
            scores: Whether to watch for scores, where they come from watching; all batches of a step.
            statistics: Whether to watch the features, whose means and energies need fewer batches than scores.
        """
        with ExitStack() as stack:
            for stage in self.stages.values():
                watching = stage.collecting(scale, parts, scores=scores, statistics=statistics)
                if watching is not None:
                    stack.enter_context(watching)
            yield

    @contextmanager
    def distilling(self, scale: float = 1.0) -> Iterator[None]:
        """Let forward passes inside the ``with`` block learn from the unpruned model, once something was cut.

        Nothing happens without `distillation` in the settings. Scores then see the gradient of the whole loss.

        Args:
            scale: What the loss is multiplied with before its backward pass, see `Distiller.attached`.
        """
        with nullcontext() if self.distillation is None else self.distillation.attached(scale):
            yield

    def start_epoch(self) -> None:
        """Forget scores of earlier warm-up epochs, when the head was still new; call it as an epoch starts."""
        if self.warming_up:
            for stage in self.stages.values():
                stage.reset()

    def cut(self, epoch: int, *, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Remove the weakest units down to the budget of the next round.

        Returns:
            Whether a cut was made. It is skipped, with a warning, when there are no finite scores, or when the weights
            have become NaN since they were taken.
        """
        settings = self.settings
        self.scheduled += 1
        self.next_cut = epoch + settings.epochs_per_round
        kept = kept_share(self.scheduled, rounds=settings.rounds, target=settings.target, schedule=settings.schedule)
        before = self.record.rounds[-1].accuracy_best if self._last_value is None else self._last_value
        try:
            if not self._is_sound():
                raise NoScoresError("the weights are NaN or infinite.")
            if self.distillation is not None and self.record.reference_state is None:  # there was no validation
                self._keep_reference()
            reached = self.remove(kept * self.record.original(settings.target_kind), list(optimizers))
        except NoScoresError as error:
            warnings.warn(f"pruning round {self.scheduled} is skipped: {error}", stacklevel=2)
            return False
        self.cost = self.measured_cost()
        for stage in self.stages.values():
            stage.rebind()
        self.record.rounds.append(self._round_record(len(self.record.rounds), epoch, before))
        if self.scheduled == settings.rounds and not reached:
            warnings.warn(
                "the last round did not reach the budget: a lower bound per layer or the largest share of a layer that "
                "one round may remove stood in the way; use more rounds or loosen it.",
                stacklevel=2,
            )
        return True

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
            self._keep_reference()
        elif self.tolerated(value):
            # Rounds only ever get smaller, so the newest tolerated structure is the smallest.
            self._keep_candidate(value)

    def tolerated(self, value: float) -> bool:
        """Whether a monitored value is within the tolerance of the reference."""
        if self.settings.tolerance is None or self.record.reference is None:
            return True
        sign = 1.0 if self.settings.mode == "max" else -1.0
        return bool(sign * (value - self.record.reference) >= -self.settings.tolerance - 1e-12)

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

    # --- the end ------------------------------------------------------------------------------------------------

    def restore(self, *, optimizers: Iterable[Optimizer] = ()) -> RoundRecord:
        """Put the smallest model that met the tolerance back, whatever was tried later.

        A model whose weights have become NaN or infinite gives way to the last sound one in any case.

        Returns:
            The round the model now has.
        """
        state, shape, index = None, {}, len(self.record.rounds) - 1
        newest = self.candidate is not None and self.candidate["round"] == self.record.rounds[-1].round
        broken = not self._is_sound()
        if self.candidate is not None and (newest or broken or self.settings.tolerance is not None):
            state, index = self.candidate["state"], self.candidate["round"]
            shape = self.candidate["shape"]
        elif (broken or self.settings.tolerance is not None) and self.record.reference_state is not None:
            state, index, shape = self.record.reference_state, 0, self.record.reference_shape
        if broken:
            left = f"the model of round {index} is taken" if state is not None else "no validation saw a sound model"
            warnings.warn(f"the weights have become NaN or infinite: {left}. Lower the learning rate.", stacklevel=2)
        if state is not None:
            set_shape(self.model, shape)
            load_values(self.model, state)
            drop_stale_state(optimizers)
        self.finish(index)
        return self.record.rounds[index]

    def finish(self, index: int | None = None) -> None:
        """Mark a round (by default the newest) as the one the run ended with, and let the candidate go."""
        self.record.chosen = len(self.record.rounds) - 1 if index is None else index
        self.candidate = None
        if self.distillation is not None:
            self.distillation.forget()
        for stage in self.stages.values():
            stage.reset()

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores and statistics over processes, before `cut`."""
        for stage in self.stages.values():
            stage.reduce(reduce)

    def set_cost(self, cost: ModelCost) -> None:
        """Replace the cost, once MACs could be measured; no layer may have lost channels yet.

        Raises:
            ValueError: If the target is out of reach.
        """
        self.cost = self.record.cost = cost
        self.check_target()
        for i, old in enumerate(self.record.rounds):
            macs = None if cost.fixed_macs is None else cost.deployed(old.ranks, "macs")
            self.record.rounds[i] = RoundRecord(**{**vars(old), "macs": macs})

    # --- state --------------------------------------------------------------------------------------------------

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
            "stages": {name: stage.state_dict() for name, stage in self.stages.items()},
            "record": self.record.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the model must have the structure of then (of an ended run, the weights, too)."""
        self.scheduled, self.failed_rounds = int(state["scheduled"]), int(state["failed_rounds"])
        self.stopped, self._last_value = bool(state["stopped"]), state["last_value"]
        self.judged_round, self.next_cut = int(state["judged_round"]), int(state["next_cut"])
        self.first_epoch = int(state["first_epoch"])
        self.candidate = state["candidate"]
        for name, stage in self.stages.items():
            if name in state["stages"]:
                stage.load_state_dict(state["stages"][name])
        record, settings = self.record, self.settings
        monitor, network = record.monitor, record.network
        record.load_state_dict(state["record"])
        if record.chosen is not None:
            self._go_on_from(record.chosen)
        if record.tolerance != settings.tolerance:
            self.failed_rounds, self.stopped = 0, False
        # What decides from now on are the settings of this run, and reports must say so.
        record.monitor, record.network, record.mode = monitor, network, settings.mode
        record.target, record.target_kind = settings.target, settings.target_kind
        record.tolerance = settings.tolerance
        if self.candidate is not None and not self.tolerated(self.candidate["value"]):
            self.candidate = None
        self.cost = record.cost
        self.cost = self.measured_cost()
        if self.distillation is not None and self.distillation.started and record.reference_state is None:
            self.distillation.teacher()  # which says why there is none

    def _go_on_from(self, index: int) -> None:
        """Take up a run that ended with a round: its model is the one to fall back on, though it was let go then."""
        record = self.record
        record.rounds = record.rounds[: index + 1]
        record.chosen, self.failed_rounds, self.stopped = None, 0, False
        self.judged_round = min(self.judged_round, index)
        value = record.rounds[index].accuracy_best
        if value is None or not self._is_sound():
            return
        self._last_value = value
        if index > 0:
            self._keep_candidate(value)
        elif record.reference_state is None:
            self._keep_reference()

    def _keep_candidate(self, value: float) -> None:
        state, shape = self._state(), shape_of(self.model)
        self.candidate = {"round": self.record.rounds[-1].round, "value": value, "state": state, "shape": shape}

    def _keep_reference(self) -> None:
        self.record.reference_state, self.record.reference_shape = self._state(), shape_of(self.model)

    def _better(self, value: float, other: float) -> bool:
        return value > other if self.settings.mode == "max" else value < other

    def _is_sound(self) -> bool:
        # Buffers may hold infinity, in masks of attention.
        broken = any(bool(buffer.isnan().any()) for buffer in self.model.buffers())
        return not broken and all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _state(self) -> dict[str, Tensor]:
        return copy_values(self.model, device="cpu")

    def _round_record(self, index: int, epoch: int, before: float | None = None) -> RoundRecord:
        cost, ranks = self.cost, self.ranks
        record = RoundRecord(
            round=index,
            epoch=epoch,
            ranks=ranks,
            bases=cost.deployed(ranks, "bases"),
            params=cost.deployed(ranks, "params"),
            macs=None if cost.fixed_macs is None else cost.deployed(ranks, "macs"),
            accuracy_before=before,
            latency=None if cost.fixed_latency is None else cost.deployed(ranks, "latency"),
        )
        return self.describe(record)
