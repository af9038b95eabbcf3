"""Moments of a module's layers on the training batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from bsdp.callbacks._own_steps import OwnPasses
from bsdp.callbacks._processes import mean_over_processes
from bsdp.gradient_moments import MetricCollector
from bsdp.layers import BasisPair
from bsdp.moments import LayerMoment

Moments = dict[str, LayerMoment]


def module_moments(
    trainer: Trainer, pl_module: LightningModule, pairs: Mapping[str, BasisPair], *, metric: str, batches: int
) -> tuple[Moments, Moments]:
    """What a metric needs of some layers, measured on the first training batches of every process.

    The module is run as it trains, see `OwnPasses`; the iterator that the trainer has of its data, modes and random
    states are left alone.

    Args:
        trainer: The trainer, in `fit`.
        pl_module: Its module.
        pairs: The layers, by name.
        metric: ``"activation"`` or ``"kfac"``, for which labels are drawn from what the module predicts.
        batches: Batches to read, at most.

    Returns:
        Output moments and gradient moments by name. Layers where they are not finite are left out, with a warning.

    Raises:
        ValueError: If there is no batch, the module cannot be run on one, or puts out no logits, which the KFAC metric
            needs.
    """
    needs = f"metric: {metric}"
    passes = OwnPasses(trainer, pl_module, setting=needs, batches=batches, outputs=metric == "kfac")
    passes.check()
    collector, seen = MetricCollector(pairs, metric), 0
    with collector.collecting(pl_module) as take:
        for run in passes.runs():
            take(run(), None)
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
