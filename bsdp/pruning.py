"""Removing the bases that a plan does not keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.layers import BasisPair, named_pairs
from bsdp.optimizer_state import cut_state
from bsdp.plain_layers import weight_of
from bsdp.selection import PruningPlan


@torch.no_grad()
def prune(
    model: nn.Module,
    plan: PruningPlan,
    *,
    means: Mapping[str, Tensor] | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Remove, in place, every basis that the plan does not keep.

    Parameters keep their identity, so an optimizer that holds them goes on; its per-element state (momentum) must be
    cut as well, which happens for the optimizers given here.

    Args:
        model: A decomposed model.
        plan: Made by `select` for this model's present ranks.
        means: ``E[a]`` of the features per layer, ``[groups * rank]`` (see `FeatureStatistics`). When given, what the
            removed bases contributed on average moves into the bias, so that the expected output stays.
        optimizers: Optimizers to keep in step.

    Raises:
        ValueError: If the plan names unknown layers or was made for other ranks.
    """
    pairs, optimizers = named_pairs(model), list(optimizers)
    for name, rank in plan.ranks_before.items():
        if name not in pairs:
            raise ValueError(f"`plan` names layer {name!r}, which the model does not have as a pair.")
        if pairs[name].rank != rank:
            raise ValueError(
                f"`plan` was made for rank {rank} of layer {name!r}, which has rank {pairs[name].rank} now."
            )
    for name, keep in plan.keep.items():
        pair = pairs[name]
        if len(keep) == pair.groups * pair.rank:
            continue
        if means is not None and name in means:
            pair.scaling.bias.add_(mean_contribution(pair, means[name], keep))
        _keep(pair, keep, optimizers)


def _keep(pair: BasisPair, keep: Tensor, optimizers: list[Optimizer]) -> None:
    local = pair.local_positions(keep)
    shapes: dict[Tensor, torch.Size] = {parameter: parameter.shape for parameter in pair.parameters()}
    pair.keep(keep)
    cuts: dict[Tensor, Callable[[Tensor], Tensor]] = {
        pair.scaling.delta: lambda value: value[keep.to(value.device)],
        pair.scaling.weight: partial(pair.columns, local=local),
        weight_of(pair.basis): partial(pair.basis_rows, local=local),
    }
    for parameter, cut in cuts.items():
        cut_state(optimizers, parameter, shapes[parameter], cut)


def mean_contribution(pair: BasisPair, means: Tensor, keep: Tensor) -> Tensor:
    """Expected output of the bases that are not kept, ``sum s_k sigma_k E[a_k] v_k``, as ``[out_channels]``."""
    dropped = means.to(pair.scaling.delta, copy=True)
    dropped[keep.to(dropped.device)] = 0
    columns = pair.scaling.scaled_weight.view(pair.groups, pair.out_per_group, pair.rank)
    return (columns @ dropped.view(pair.groups, pair.rank, 1)).flatten()
