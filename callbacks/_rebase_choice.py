"""`rebase: auto`: whether bases can be chosen anew by the KFAC metric in the warm-up of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bsdp._checks import check_choice
from bsdp.callbacks._own_steps import OwnPasses
from bsdp.callbacks._processes import all_agree
from bsdp.importance import DATA_FREE
from bsdp.rebasing import REBASE_TIMES

LEAST_WARMUP = 2  # an epoch that trains the head, and one that scores the new bases


def rebase_settings(
    rebase: str, metric: str | None, *, warmup_epochs: int, importance: str
) -> dict[Literal["rebase", "metric"], Any]:
    """The settings of a pruner to begin with, before the run shows whether the KFAC metric can be taken.

    Args:
        rebase: ``auto``, or one of `bsdp.rebasing.REBASE_TIMES`.
        metric: None for the default.
        warmup_epochs: Epochs before the first cut.
        importance: Score of the bases.

    Returns:
        `rebase` and `metric` for `PruningSettings`.
    """
    check_choice("rebase", rebase, ("auto", *REBASE_TIMES))
    if rebase != "auto":
        return {"rebase": rebase, "metric": metric or "activation"}
    if metric is not None:
        return {"rebase": "warmup", "metric": metric}
    hopeless = warmup_epochs in range(LEAST_WARMUP) or importance in DATA_FREE
    return {"rebase": "never", "metric": "activation"} if hopeless else {"rebase": "warmup", "metric": "kfac"}


def why_not_kfac(trainer: Trainer, pl_module: LightningModule, settings: Any) -> str | None:
    """Why the bases of this run cannot, or should not, be chosen by the KFAC metric; the same in all processes.

    Args:
        trainer: The trainer, in `fit`, before the first step.
        pl_module: Its module.
        settings: Of the run, for example `PruningSettings`.

    Returns:
        Half a sentence; None if they can.
    """
    if settings.warmup_epochs < LEAST_WARMUP:
        return f"that needs `warmup_epochs` of at least {LEAST_WARMUP}, not {settings.warmup_epochs}"
    if settings.importance in DATA_FREE:
        return f"`importance: {settings.importance}` ranks bases without scores of the loss"
    loader = trainer.train_dataloader
    if loader is None or isinstance(loader, (list, tuple, dict)):
        return "that needs one training loader"
    if isinstance(loader, Iterator):
        return f"the training loader {type(loader).__name__} can be read only once"
    reason = _why_no_classes(trainer, pl_module)
    return reason if all_agree(trainer, pl_module, reason is None) else reason or "another process cannot"


def _why_no_classes(trainer: Trainer, pl_module: LightningModule) -> str | None:
    passes = OwnPasses(trainer, pl_module, setting="rebase: auto", batches=1, outputs=True)
    try:
        first = passes.check()
    except ValueError as error:
        return f"on a training batch {error}"
    if first is None:
        return "there is no training batch"
    batch, logits = first
    if not any(_are_classes(leaf, logits) for leaf in tree_leaves(batch)):
        return "no tensor of a training batch holds the classes that the network's outputs would be scores of"
    return None


def _are_classes(labels: Any, logits: Tensor) -> bool:
    """Whether a tensor holds classes for logits ``[batch, classes, ...]``: their numbers, or shares that sum to 1."""
    if not isinstance(labels, Tensor) or labels.dtype is torch.bool:
        return False
    if labels.is_floating_point():
        if labels.shape != logits.shape or bool((labels < 0).any()):
            return False
        return bool(((labels.sum(1) - 1).abs() < 0.01).all())
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        return False
    known = (labels >= 0) & (labels < logits.shape[1])  # others are ignored, as -100 or 255 in masks
    return float(known.float().mean()) > 0.5
