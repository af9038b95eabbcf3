"""What a pruning callback reads from a trainer while it trains, and what it logs at once."""

from __future__ import annotations

import inspect
import math
from types import CodeType

import torch
from lightning.pytorch import LightningModule, Trainer

from bsdp.callbacks._processes import mean_over_processes
from bsdp.record import PruningRecord

_SCORED_STEPS = 32  # optimizer steps per epoch, about, for which scores are taken by watching
_FEATURE_STEPS = 16  # the same for features, of which a few batches tell enough, ...
_FEATURE_STRIDE = 5  # ... so that they are watched on every which step of a short epoch, ...
_FEWEST_STEPS = 4  # ... but on so many, if there are
_UNKNOWN_STRIDE = 51  # every which step, when the length of an epoch is not known


def watched(trainer: Trainer, step: int, *, parts: int = 1, scores: bool = False) -> dict[str, bool]:
    """What is watched on the batches of an optimizer step: on all of them, as scores are those of a whole step.

    Strides are odd: a layer that only every other step calls is seen as well. Where both are watched, features are on
    some of the steps that are scored, as every watched step of a compiled network runs without its graphs.

    Args:
        trainer: The trainer, in training.
        step: The step, counted from 0 in every epoch.
        parts: Batches whose gradients are accumulated in a step.
        scores: Whether scores come from watching: short epochs are then watched as a whole.

    Returns:
        Arguments of `RoundPruner.collecting`.
    """
    if trainer.num_training_batches == math.inf:
        first = step % _UNKNOWN_STRIDE == 0
        return {"scores": scores and first, "statistics": first}
    steps = math.ceil(trainer.num_training_batches / parts)
    scored = max(1, steps // _SCORED_STEPS) | 1 if scores else 1
    wanted = max(1, min(_FEATURE_STRIDE, steps // _FEWEST_STEPS), steps // _FEATURE_STEPS)
    features = scored * (math.ceil(wanted / scored) | 1)
    return {"scores": scores and step % scored == 0, "statistics": step % features == 0}


def monitored_value(trainer: Trainer, monitor: str, *, needed: bool, needed_by: object) -> float | None:
    """The logged value of the monitored metric, averaged over all processes, which must take the same decisions.

    Args:
        trainer: The trainer, after a validation.
        monitor: Name of the metric.
        needed: Whether it has to be there.
        needed_by: The callback, for the error.

    Raises:
        ValueError: If it is needed and was not logged.
    """
    value = trainer.callback_metrics.get(monitor)
    if value is not None:
        tensor = torch.as_tensor(float(value), device=trainer.strategy.root_device)
        return float(mean_over_processes(trainer, tensor)) if trainer.world_size > 1 else float(value)
    if needed:
        logged = sorted(k for k in trainer.callback_metrics if not k.startswith("bsdp/"))
        raise ValueError(
            f"`{type(needed_by).__name__}(monitor={monitor!r})` is never logged in validation; logged are "
            f"{logged}. Name one of them (with the matching `mode`), log it in `validation_step`, or set "
            "`tolerance: null`."
        )
    return None


def shows_metrics(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the sanity check logs what a validation will: not with several loaders, nor if the module asks for it."""
    loaders = trainer.val_dataloaders
    several = isinstance(loaders, (list, tuple, dict)) and len(loaders) > 1
    own = [
        kind for kind in type(pl_module).__mro__ if issubclass(kind, LightningModule) and kind is not LightningModule
    ]
    codes = (_code_of(value) for kind in own for value in vars(kind).values())
    return not several and not any(_asks_for(code, "sanity_checking") for code in codes if code is not None)


def _code_of(attribute: object) -> CodeType | None:
    """The code of a method or property, decorated or not."""
    function = attribute.fget if isinstance(attribute, property) else attribute
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def _asks_for(code: CodeType, name: str) -> bool:
    """Whether a function, or one inside it, reads an attribute or global of that name."""
    inner = (value for value in code.co_consts if isinstance(value, CodeType))
    return name in code.co_names or any(_asks_for(value, name) for value in inner)


def log_around_cut(trainer: Trainer, record: PruningRecord) -> None:
    """Log the monitored value before and after the newest cut, once the latter is known."""
    last = record.rounds[-1]
    values = {"bsdp/accuracy_before": last.accuracy_before, "bsdp/accuracy_after": last.accuracy_after}
    known = {key: value for key, value in values.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=trainer.global_step)


def loss_scale(trainer: Trainer) -> float:
    """What the loss is multiplied with before the backward pass; 1 but for mixed precision with float16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
