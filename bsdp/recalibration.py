"""Recomputing the running statistics of batch norms after a network has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bsdp.compiling import uncompiled
from bsdp.probing import as_inputs, evaluating


@torch.no_grad()
def recalibrate_batch_norms(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Recompute the running statistics of every batch norm that tracks them, as the plain mean over some batches.

    Batch norms normalise with the statistics of the batch meanwhile, everything else is in eval mode; weights do not
    change, and modes and momentum are what they were afterwards. A batch norm that no batch reaches keeps what it has.

    Args:
        model: Changed in place.
        batches: Inputs of the model: tensors, or tuples of arguments; no labels. Of equal sizes: each counts the same.

    Returns:
        Names of the batch norms that were recomputed.

    Raises:
        ValueError: If there is no batch, a batch has one value per channel only, or the new statistics hold NaN or
            infinity; the statistics are then the old ones.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1, affine=False))
        >>> bsdp.recalibrate_batch_norms(model, [torch.tensor([[1.0], [3.0]])])
        ['0']
        >>> model[0].running_mean
        tensor([2.])
    """
    return recalibrate_by_running(model, (partial(model, *as_inputs(batch)) for batch in batches))


@torch.no_grad()
def recalibrate_by_running(model: nn.Module, runs: Iterable[Callable[[], object]]) -> list[str]:
    """`recalibrate_batch_norms` for a model that does not take its batches as they are.

    Args:
        model: Changed in place.
        runs: Each runs the model on a batch.
    """
    norms = tracking_norms(model)
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: {key: value.clone() for key, value in norm.named_buffers()} for norm in norms.values()}
    done = False
    try:
        with evaluating(model), uncompiled():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the cumulative average
                norm.train()
            seen = False
            for run in runs:
                run()
                seen = True
        if norms and not seen:
            raise ValueError("`batches` is empty: batch norms need data to be recalibrated on.")
        reached = {name: norm for name, norm in norms.items() if int(_counter(norm)) > 0}
        broken = [name for name, norm in reached.items() if not _is_finite(norm)]
        if broken:
            raise ValueError(f"the statistics of {broken[0]!r} would be NaN or infinite: check `batches`.")
        done = True
    finally:
        for norm in norms.values():
            norm.momentum = momenta[norm]
            if not done or int(_counter(norm)) == 0:
                _restore(norm, before[norm])
    for norm in reached.values():
        _counter(norm).copy_(before[norm]["num_batches_tracked"])
    return list(reached)


def tracking_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms with running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}


def _counter(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


def _is_finite(norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return bool(norm.running_mean.isfinite().all() & norm.running_var.isfinite().all())


def _restore(norm: _BatchNorm, buffers: dict[str, Tensor]) -> None:
    for key, value in norm.named_buffers():
        value.copy_(buffers[key])
