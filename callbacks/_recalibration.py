"""Batch norms after a cut, on the training batches of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

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

    with random_state_kept(seed=0):
        try:
            names = recalibrate_batch_norms(pl_module, images())
        except NoImagesError:
            raise
        except ValueError as error:
            rank_zero_warn(f"the batch norms keep their statistics after this cut: {error}")
            names = []
    if trainer.world_size > 1:
        for name in names:
            for key in ("running_mean", "running_var"):
                buffer = pl_module.get_submodule(name).get_buffer(key)
                buffer.copy_(mean_over_processes(trainer, buffer))


class NoImagesError(ValueError):
    """A batch holds no tensor that a network could read."""
