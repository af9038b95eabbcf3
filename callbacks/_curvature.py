"""Curvature scores beside a trainer: the module's own `training_step` on batches of our own, leaving no trace."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import own_iterator
from bsdp.compiling import uncompiled
from bsdp.importance import ScoreAccumulator

_INTERNAL = frozenset(vars(LightningModule()))  # what Lightning and torch keep in every module
_ADVICE = "Choose another score, such as `importance: fisher`."


def check_curvature(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse, before the first step, what leaves no way to take the curvature of the loss."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            "`importance: second_order` takes the loss from `training_step`, but in manual optimization that makes "
            f"steps of its own. {_ADVICE}"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ValueError(
            f"`importance: second_order` gives batches to `training_step`, which takes `dataloader_iter`. {_ADVICE}"
        )
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
    limit = min(batches, trainer.num_training_batches)
    with ExitStack() as stack:
        for context in (random_state_kept(), uncompiled(), _muted(trainer, pl_module), _state_kept(pl_module)):
            stack.enter_context(context)
        _seed(seed)
        stack.enter_context(_generators_kept(trainer.train_dataloader))
        for index, batch in enumerate(islice(own_iterator(trainer.train_dataloader), int(limit))):
            with suppress(_Skipped):
                step = _Step(trainer, pl_module, batch, index, seed=seed + 1 + index)
                scores.update_curvature(step, generator=signs)


class _Skipped(Exception):
    """The step gave no loss for a batch."""


class _Step:
    """The loss of one batch, with the same random numbers in every call."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int, *, seed: int) -> None:
        self.trainer, self.module, self.index, self.seed = trainer, pl_module, index, seed
        _seed(seed)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = _owner(trainer, pl_module, "on_before_batch_transfer").on_before_batch_transfer(batch, 0)
        self.batch = trainer.strategy.batch_to_device(batch)

    def __call__(self) -> Tensor:
        _seed(self.seed)
        step = self.module.training_step
        batch = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.batch)
        arguments = (batch, self.index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)
        with self._precision():
            outputs = step(*arguments)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            raise _Skipped
        return loss

    def _precision(self) -> AbstractContextManager[Any]:
        plugin = self.trainer.precision_plugin
        # Second derivatives drown in the rounding of autocast, and no gradient scaler is at work here.
        return nullcontext() if isinstance(plugin, MixedPrecision) else plugin.train_step_context()


def _owner(trainer: Trainer, pl_module: LightningModule, hook: str) -> Any:
    """Who has a hook for batches: the data module, if it has its own, else the module."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data if data is not None and is_overridden(hook, data, LightningDataModule) else pl_module


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """Give a loader's own random generators their states back."""
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    holders.append(getattr(holders[-1], "sampler", None))
    found = {id(g): g for g in (getattr(h, "generator", None) for h in holders) if isinstance(g, torch.Generator)}
    kept = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


@contextmanager
def _muted(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Log nothing, to no logger, and put copies in the place of all metrics."""
    loggers, originals = trainer.loggers, _metrics(pl_module)
    names: tuple[str, ...] = ("log", "log_dict")
    taken = {key: pl_module.__dict__[key] for key in names if key in pl_module.__dict__}
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        for parent, name, metric in originals:
            parent._modules[name] = copy.deepcopy(metric)
        # An attribute on the instance hides the method.
        pl_module.__dict__["log"] = pl_module.__dict__["log_dict"] = lambda *_args, **_options: None
        yield
    finally:
        for key in names:
            pl_module.__dict__.pop(key, None)
        pl_module.__dict__.update(taken)
        for parent, name, metric in originals:
            parent._modules[name] = metric
        trainer.loggers = loggers


def _metrics(module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The outermost metrics of a module, with who holds them under which name."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in module.named_children():
        found += [(module, name, child)] if isinstance(child, (Metric, MetricCollection)) else _metrics(child)
    return found


@contextmanager
def _state_kept(pl_module: LightningModule) -> Iterator[None]:
    """Give buffers, and the plain attributes of the module itself, their values back."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in pl_module.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = {key: value for key, value in vars(pl_module).items() if key not in _INTERNAL}
    contents = {k: copy.copy(v) for k, v in attributes.items() if type(v) in (list, dict, set)}
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
        _restore(pl_module, attributes, contents)


def _restore(module: nn.Module, attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    for key in [key for key in vars(module) if key not in _INTERNAL and key not in attributes]:
        del module.__dict__[key]
    module.__dict__.update(attributes)
    for key, content in contents.items():
        value = attributes[key]
        value.clear()
        (value.extend if isinstance(value, list) else value.update)(content)
