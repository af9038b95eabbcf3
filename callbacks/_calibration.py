"""Moments of a module's layers on the training batches of all processes."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from bsdp.callbacks._own_steps import OwnPasses
from bsdp.callbacks._processes import all_agree, mean_over_processes
from bsdp.gradient_moments import MetricCollector
from bsdp.layers import BasisPair
from bsdp.moments import LayerMoment

Moments = dict[str, LayerMoment]


def module_moments(
    trainer: Trainer,
    pl_module: LightningModule,
    pairs: Mapping[str, BasisPair],
    *,
    metric: str,
    batches: int,
    optional: bool = False,
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
        optional: Whether the run can do without: then a module that raises on a batch, in any process, gives no
            moments, with a note.

    Returns:
        Output moments and gradient moments by name. Layers where they are not finite are left out, with a warning.

    Raises:
        ValueError: If there is no batch, the module cannot be run on one, or puts out no logits, which the KFAC metric
            needs.
    """
    needs = f"metric: {metric}"
    passes = OwnPasses(trainer, pl_module, setting=needs, batches=batches, outputs=metric == "kfac")
    if not optional:
        passes.check()
    collector, problem = MetricCollector(pairs, metric), ""
    try:
        _collect(collector, passes, pl_module, metric)
    except Exception as error:  # whatever a module may raise on a batch unlike those before
        if not optional:
            raise
        problem = f"{type(error).__name__}: {error}"
    if optional and not all_agree(trainer, pl_module, not problem):
        rank_zero_info(f"bsdp: bases stay as they are, for they could not be measured ({problem or 'another process'})")
        return {}, {}
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


def _collect(collector: MetricCollector, passes: OwnPasses, pl_module: LightningModule, metric: str) -> None:
    seen = 0
    with collector.collecting(pl_module) as take:
        for run in passes.runs():
            take(run(), None)
            seen += 1
    if not seen:
        raise ValueError(f"`metric: {metric}` found no training batch to measure on.")


def _is_finite(moment: LayerMoment) -> bool:
    return bool(moment.second.isfinite().all() and moment.spread.isfinite().all())
