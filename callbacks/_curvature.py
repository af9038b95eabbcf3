"""Curvature scores beside a trainer: the module's own `training_step` on batches of our own, leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._own_steps import OwnStep, own_steps, why_no_step
from bsdp.callbacks._processes import mean_over_processes
from bsdp.importance import ScoreAccumulator

_ADVICE = "Choose another score, such as `importance: fisher`."


def check_curvature(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, before the first step, what leaves no way to take the curvature of the loss."""
    reason = why_no_step(pl_module)
    if reason is not None:
        raise ValueError(f"`importance: second_order` takes the loss from `training_step`, but {reason}. {_ADVICE}")
    loader = trainer.train_dataloader
    if loader is None or isinstance(loader, (list, tuple, dict)):
        raise ValueError(
            "`importance: second_order` reads some training batches before every cut and needs one training loader, "
            f"not {'none' if loader is None else 'a collection of them'}. {_ADVICE}"
        )
    if isinstance(loader, Iterator):
        raise ValueError(
            f"`importance: second_order` reads some training batches again before every cut, but the training loader "
            f"{type(loader).__name__} can be read only once. {_ADVICE}"
        )


def add_curvature(
    trainer: Trainer, pl_module: LightningModule, scores: ScoreAccumulator, *, batches: int, seed: int
) -> None:
    """Score the first training batches of an order of our own, by the loss that `training_step` returns.

    In mixed precision the loss is computed in float32 for that. Modules stay in the mode they are in. Afterwards random
    numbers, gradients, buffers (as of batch norms), metrics, loggers and the module's own attributes are as before.

    Args:
        trainer: The trainer, in training.
        pl_module: The module, in automatic optimization.
        scores: Of the importance ``"second_order"``.
        batches: How many batches; there may be fewer.
        seed: Of the order of the batches and everything else that is random.
    """
    signs = torch.Generator().manual_seed(seed)
    limit = int(min(batches, trainer.num_training_batches))
    with random_state_kept(), own_steps(trainer, pl_module, limit, seed=seed) as steps:
        for step in steps:
            with suppress(_Skipped):
                scores.update_curvature(partial(_loss_of, step), generator=signs)


def complete_scores(
    trainer: Trainer, pl_module: LightningModule, scores: ScoreAccumulator, *, batches: int, seed: int
) -> None:
    """Before a cut, take the curvature if scores are made of it, in all processes; see `add_curvature`."""
    if not scores.needs_curvature:
        return
    scores.reset()
    add_curvature(trainer, pl_module, scores, batches=batches, seed=seed)
    if trainer.world_size > 1:
        scores.reduce(lambda tensor: mean_over_processes(trainer, tensor))


class _Skipped(Exception):
    """The step gave no loss for a batch."""


def _loss_of(step: OwnStep) -> Tensor:
    outputs = step()
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if not isinstance(loss, Tensor):
        raise _Skipped
    return loss
