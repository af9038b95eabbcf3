"""Batch norms after a cut, on the training batches of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import as_parameters, own_iterator
from bsdp.callbacks._processes import mean_over_processes
from bsdp.probing import first_tensor
from bsdp.recalibration import recalibrate_batch_norms


def recalibrate(trainer: Trainer, pl_module: LightningModule, batches: int) -> None:
    """Recompute the running statistics of all batch norms on training batches, the mean over processes.

    The iterator that the trainer has of its data, modes and random states are left alone. Batches that give no finite
    statistics change nothing, with a warning.

    Args:
        trainer: The trainer, in `fit`.
        pl_module: Its module; ``forward`` gets the first floating-point tensor of each batch.
        batches: Batches to read in each process, at most.

    Raises:
        ValueError: If a batch has no floating-point tensor.
    """

    def images() -> Iterator[Tensor]:
        for batch in islice(own_iterator(trainer.train_dataloader), batches):
            tensor = first_tensor(trainer.strategy.batch_to_device(batch))
            if tensor is None:
                raise NoImagesError(
                    "`recalibration_batches` reads the first floating-point tensor of a training batch, and there is "
                    "none: set it to 0."
                )
            yield as_parameters(tensor, pl_module)

    norms = _tracking_norms(pl_module)
    before = [{key: value.clone() for key, value in norm.named_buffers()} for norm in norms]
    problem = ""
    with random_state_kept(seed=0):
        try:
            recalibrate_batch_norms(pl_module, images())
        except NoImagesError:
            raise
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


def _tracking_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


class NoImagesError(ValueError):
    """A batch holds no tensor that a network could read."""
