"""Fitting the rounds of a pruning run into a trainer's epochs and validations."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from bsdp.round_settings import RoundSettings, default_rounds


def scheduled_settings(
    trainer: Trainer, settings: RoundSettings, *, rounds: int | None, first_epoch: int
) -> RoundSettings:
    """The settings with `rounds` filled in from the trainer's epochs.

    Args:
        trainer: The trainer, once it knows the length of an epoch.
        settings: Settings whose own `rounds` do not count.
        rounds: Number of cuts; None for as many as fit.
        first_epoch: Epoch in which the warm-up begins.

    Raises:
        ValueError: If the trainer stops before the last round is over.
    """
    limits = {name: limit - first_epoch for name, limit in _limits(trainer).items()}
    epochs = min(limits.values(), default=None)
    if rounds is None:
        if epochs is None:
            raise ValueError(
                "`rounds` must be given when the trainer has no `max_epochs` and no `max_steps` from which the number "
                "of epochs follows (with manual optimization or a loader without length it does not)."
            )
        rounds = default_rounds(
            epochs=epochs, warmup_epochs=settings.warmup_epochs, epochs_per_round=settings.epochs_per_round
        )
    needed = settings.warmup_epochs + max(rounds, 1) * settings.epochs_per_round
    low = [name for name, limit in limits.items() if limit < needed]
    if low:
        given = ", ".join(f"`{name}={getattr(trainer, name)}`" for name in low)
        raise ValueError(
            f"the pruning schedule needs {needed} epochs (`warmup_epochs={settings.warmup_epochs}` + "
            f"`rounds={max(rounds, 1)}` x `epochs_per_round={settings.epochs_per_round}`), but the trainer stops "
            f"after {epochs} ({given}): raise {' and '.join(f'`{name}`' for name in low)} or lower one of them."
        )
    return replace(settings, rounds=rounds)


def planned_epochs(trainer: Trainer) -> int | None:
    """Epochs the trainer will run; None if it has no end."""
    return min(_limits(trainer).values(), default=None)


def _limits(trainer: Trainer) -> dict[str, int]:
    """Epochs after which the trainer stops, by the argument that says so."""
    limits = {"max_epochs": trainer.max_epochs, "max_steps": _epochs_of_steps(trainer)}
    return {name: limit for name, limit in limits.items() if limit is not None and limit >= 0}


def _epochs_of_steps(trainer: Trainer) -> int | None:
    """Whole epochs in `max_steps`; None where the steps of an epoch are not known before it is over."""
    batches, limit = trainer.num_training_batches, trainer.max_steps
    if limit is None or limit < 0 or batches == math.inf or not trainer.lightning_module.automatic_optimization:
        return None
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    scheduler = next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
    epochs, steps = -1, 0
    while steps <= limit:
        epochs += 1
        per_step = trainer.accumulate_grad_batches
        if scheduler is not None:
            per_step = scheduler.get_accumulate_grad_batches(epochs)
        steps += max(1, math.ceil(batches / per_step))
    return epochs


def check_validation(trainer: Trainer, settings: RoundSettings, monitor: str, *, needed_by: object) -> None:
    """Refuse a tolerance without validations: a round without one could never fall short of it."""
    if settings.tolerance is None:
        return
    if not trainer.enable_validation:
        raise ValueError(
            f"`{type(needed_by).__name__}(tolerance={settings.tolerance})` needs a validation loader that logs "
            f"{monitor!r}. Give one, or set `tolerance: null` to prune to the budget alone."
        )
    every = trainer.check_val_every_n_epoch
    if every is None:
        batches = max(1.0, float(trainer.num_training_batches))
        every = max(1, math.ceil((trainer.val_check_batch or 1) / batches))
    if every > min(settings.warmup_epochs, settings.epochs_per_round):
        raise ValueError(
            f"`tolerance={settings.tolerance}` needs a validation in the warm-up and in every round, but the "
            f"trainer validates every {every} epochs: raise `warmup_epochs` and `epochs_per_round` to {every}, "
            "validate more often, or set `tolerance: null`."
        )
