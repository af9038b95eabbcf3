"""Batch norms after a cut, on the training batches of all processes."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from bsdp.callbacks._own_steps import OwnPasses
from bsdp.callbacks._processes import mean_over_processes
from bsdp.recalibration import recalibrate_by_running, tracking_norms


def recalibrate(trainer: Trainer, pl_module: LightningModule, batches: int) -> None:
    """Recompute the running statistics of all batch norms on training batches, the mean over processes.

    The module is run as it trains, see `OwnPasses`; the iterator that the trainer has of its data, modes and random
    states are left alone. Batches that give no finite statistics change nothing, with a warning.

    Args:
        trainer: The trainer, in `fit`.
        pl_module: Its module.
        batches: Batches to read in each process, at most.

    Raises:
        ValueError: If the module cannot be run on a batch.
    """
    passes = OwnPasses(trainer, pl_module, setting="recalibration_batches", batches=batches)
    passes.check()
    norms = list(tracking_norms(pl_module).values())
    before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    problem = ""
    try:
        recalibrate_by_running(pl_module, passes.runs(changing=norms))
    except ValueError as error:
        problem = f": {error}"
    if trainer.world_size > 1 and norms:
        # Every process takes part in every mean, whatever it saw: one that left early would keep the others waiting.
        share = next(norms[0].buffers()).new_tensor(float(not problem), dtype=torch.float32)
        sound = float(mean_over_processes(trainer, share)) >= 1.0
        for norm, old in zip(norms, before, strict=True):
            for key in old if not sound else ("running_mean", "running_var"):
                buffer = norm.get_buffer(key)
                buffer.copy_(mean_over_processes(trainer, buffer) if sound else old[key])
        if not sound and not problem:
            problem = ": the training batches of another process give none"
    if problem:
        rank_zero_warn(f"the batch norms keep their statistics after this cut{problem}")
