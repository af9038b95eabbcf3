"""Moments of a module's layers on the training batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import as_parameters, own_iterator
from bsdp.callbacks._processes import mean_over_processes
from bsdp.gradient_moments import MetricCollector
from bsdp.layers import BasisPair
from bsdp.moments import LayerMoment
from bsdp.probing import first_tensor

Moments = dict[str, LayerMoment]


def module_moments(
    trainer: Trainer, pl_module: LightningModule, pairs: Mapping[str, BasisPair], *, metric: str, batches: int
) -> tuple[Moments, Moments]:
    """What a metric needs of some layers, measured on the first training batches of every process.

    The iterator that the trainer has of its data, modes and random states are left alone.

    Args:
        trainer: The trainer, in `fit`.
        pl_module: Its module.
        pairs: The layers, by name.
        metric: ``"activation"`` or ``"kfac"``, for which labels are drawn from what the module predicts.
        batches: Batches to read, at most.

    Returns:
        Output moments and gradient moments by name. Layers where they are not finite are left out, with a warning.

    Raises:
        ValueError: If there is no batch, a batch has no floating-point tensor, or the module puts out no logits, which
            the KFAC metric needs.
    """
    collector, seen = MetricCollector(pairs, metric), 0
    with random_state_kept(seed=0), collector.collecting(pl_module) as take:
        for batch in islice(own_iterator(trainer.train_dataloader), batches):
            images = first_tensor(trainer.strategy.batch_to_device(batch))
            if images is None:
                raise ValueError(
                    f"`metric: {metric}` reads the first floating-point tensor of a training batch, and there is none; "
                    "use `metric: euclidean`."
                )
            take(pl_module(as_parameters(images, pl_module)), None)
            seen += 1
    if not seen:
        raise ValueError(f"`metric: {metric}` found no training batch to measure on.")
    # Each process saw its own share of the data; all of them must get the same bases.
    collector.reduce(lambda tensor: mean_over_processes(trainer, tensor))
    outputs, gradients = collector.compute()
    broken = [n for n in outputs if not all(_is_finite(m[n]) for m in (outputs, gradients) if n in m)]
    if broken:
        rank_zero_warn(
            f"the outputs or gradients of {len(broken)} layers (first: {broken[0]!r}) are NaN or infinite on the first "
            "training batches: these layers keep their bases."
        )
    sound = [{n: m for n, m in found.items() if n not in broken} for found in (outputs, gradients)]
    return sound[0], sound[1]


def _is_finite(moment: LayerMoment) -> bool:
    return bool(moment.second.isfinite().all() and moment.spread.isfinite().all())
