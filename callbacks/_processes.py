"""What processes of one distributed run have to do together."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn


def mean_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself when there is one."""
    if trainer.world_size == 1:
        return tensor
    reduced = trainer.strategy.reduce(tensor.clone(), reduce_op="mean")  # which works in place
    assert isinstance(reduced, Tensor)
    return reduced


def all_agree(trainer: Trainer, module: nn.Module, agrees: bool) -> bool:
    """Whether something is so in all processes; they must all ask."""
    if trainer.world_size == 1:
        return agrees
    share = next(module.parameters()).new_tensor(float(agrees), dtype=torch.float32)
    return float(mean_over_processes(trainer, share)) >= 1.0


def rewrap(trainer: Trainer) -> None:
    """Wrap the model anew after a cut, for DDP keeps buckets in the old shapes."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.model = trainer.strategy.lightning_module
        trainer.strategy.configure_ddp()
