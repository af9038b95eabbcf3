"""`rebase: auto`: whether bases can be chosen anew by the KFAC metric in the warm-up of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from bsdp._checks import check_choice
from bsdp.callbacks._own_steps import OwnPasses, why_no_step
from bsdp.callbacks._processes import all_agree
from bsdp.gradient_moments import check_logits
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

    Whatever is in doubt keeps the bases: the training data must be readable again without a loss, and the loss of
    `training_step` one over scores of classes.

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
    reason = _why_not_read_again(trainer.train_dataloader) or why_no_step(pl_module)
    if reason is None:
        passes = OwnPasses(trainer, pl_module, setting="rebase: auto", batches=1)
        try:
            reason = passes.look_at_first(why_no_class_scores)
        except Exception as error:  # whatever a module may raise out of its place
            reason = f"`training_step` cannot be run alone ({type(error).__name__}: {error})"
    return reason if all_agree(trainer, pl_module, reason is None) else reason or "another process cannot"


def _why_not_read_again(loader: Any) -> str | None:
    """Why batches cannot be read beside the training without a loss; None if they can.

    What is read is a copy of the loader, so that one which counts its batches, to be resumed, does not see it.
    """
    if loader is None or isinstance(loader, (list, tuple, dict)):
        return "that needs one training loader"
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return f"reading the training loader ({type(loader).__name__}) once more may lose batches of a stream"
    return None


def why_no_class_scores(result: Any, outputs: Any) -> str | None:
    """Why outputs are no scores of classes (logits, or log-probabilities) for the loss that was taken of them.

    A loss over scores of classes, such as cross entropy with any weights and targets, stays as it is when a number is
    added to all scores of an example, so that its gradient sums to 0 over the classes.

    Args:
        result: What a training step returned.
        outputs: What the network put out in it, with its graph.

    Returns:
        Half a sentence; None if they are.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        return "`training_step` returned no loss for the first batch"
    try:
        check_logits(outputs)
    except ValueError as error:
        return str(error)
    found = None
    if loss.requires_grad and outputs.requires_grad:
        (found,) = torch.autograd.grad(loss, [outputs], torch.ones_like(loss), allow_unused=True)
    if found is None:
        return "the loss does not depend on what the network puts out"
    gradient, scores = found.double(), outputs.detach().double()
    size = float(gradient.abs().sum())
    if not 0.0 < size < float("inf"):
        return "the loss of the first batch has no gradient, or none that is finite"
    are_logits = float(gradient.sum(1).abs().sum()) < _ROUNDING * size
    are_logs = bool(((scores.exp().sum(1) - 1).abs() < _ROUNDING).all())
    return None if are_logits or are_logs else "the loss does not take what the network puts out for scores of classes"


_ROUNDING = 0.02  # half precision rounds every gradient by up to 0.4 %
