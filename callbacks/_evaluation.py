"""Testing a module in the state it has, or in a saved one, beside the trainer that fits it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from bsdp.snapshots import copy_values, load_values
from bsdp.structure import set_shape, shape_of


def cannot_test(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Why the module cannot be tested; None if it can."""
    if not is_overridden("test_step", pl_module, LightningModule):
        return f"{type(pl_module).__name__} has no `test_step`"
    data = _datamodule(trainer)
    owner = pl_module if data is None else data
    parent: Any = LightningModule if data is None else LightningDataModule
    if not is_overridden("test_dataloader", owner, parent):
        return f"{type(owner).__name__} has no `test_dataloader`"
    return None


def evaluate(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """What the module logs in a test of its present weights: by a quiet trainer of its own, on one device.

    Call it on all processes of a distributed run, for each tests everything, and metrics talk to each other. The
    references to `trainer` in module and data module and the modes of all modules are as before afterwards, whatever
    happens.
    """
    data = _datamodule(trainer)
    modes = {module: module.training for module in pl_module.modules()}
    # An attribute on the instance hides the method: callbacks that the module brings along must not act in a test.
    pl_module.__dict__["configure_callbacks"] = lambda: []
    try:
        with _quiet():
            tester = _tester(trainer)
            tester.test(pl_module, datamodule=data, verbose=False)
    finally:
        del pl_module.__dict__["configure_callbacks"]
        pl_module.trainer = trainer
        if data is not None:
            data.trainer = trainer
        for module, mode in modes.items():
            module.training = mode
    return {key: float(value) for key, value in tester.callback_metrics.items()}


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Give all random generators their states back afterwards, whatever happens.

    Args:
        seed: Torch's seed inside the ``with`` block: what is drawn from a loader is then the same in a resumed run.
    """
    kept = isolate_rng()
    kept.__enter__()
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        kept.__exit__(None, None, None)  # by hand, because `isolate_rng` does not restore after an error


@contextmanager
def weights(pl_module: LightningModule, state: Mapping[str, Tensor], shape: Mapping[str, Any]) -> Iterator[None]:
    """Give the module other weights (of any ranks and widths) for a while; its own are back afterwards in any case.

    Args:
        pl_module: The module.
        state: The other weights, see `bsdp.snapshots.copy_values`.
        shape: Widths and scales that go with them, see `bsdp.structure.shape_of`.
    """
    own, own_shape = copy_values(pl_module), shape_of(pl_module)
    try:
        set_shape(pl_module, shape)
        load_values(pl_module, state)
        yield
    finally:
        set_shape(pl_module, own_shape)
        load_values(pl_module, own)


def _tester(trainer: Trainer) -> Trainer:
    device = trainer.strategy.root_device
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=1 if device.index is None else [device.index],
        precision=trainer.precision,
        plugins=[LightningEnvironment()],  # a cluster's environment would expect its own number of devices
        logger=DummyLogger(),  # so that `self.logger.experiment` in a test step goes on working
        callbacks=[],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_test_batches=trainer.limit_test_batches,
        inference_mode=trainer.test_loop.inference_mode,
        default_root_dir=trainer.default_root_dir,
    )


def _datamodule(trainer: Trainer) -> LightningDataModule | None:
    return trainer.datamodule  # type: ignore[attr-defined, no-any-return]


@contextmanager
def _quiet() -> Iterator[None]:
    """No lines on hardware and tips, no advice on workers; a fit has just said it all."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            yield
    finally:
        logger.setLevel(level)
