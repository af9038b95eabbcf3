"""Removing the bases that a plan does not keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import memory_format_of, weight_of
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
    for optimizer, (parameter, cut) in itertools.product(optimizers, cuts.items()):
        cut_optimizer_state(optimizer, parameter, shapes[parameter], cut)


def mean_contribution(pair: BasisPair, means: Tensor, keep: Tensor) -> Tensor:
    """Expected output of the bases that are not kept, ``sum s_k sigma_k E[a_k] v_k``, as ``[out_channels]``."""
    dropped = means.to(pair.scaling.delta, copy=True)
    dropped[keep.to(dropped.device)] = 0
    columns = pair.scaling.scaled_weight.view(pair.groups, pair.out_per_group, pair.rank)
    return (columns @ dropped.view(pair.groups, pair.rank, 1)).flatten()


def cut_optimizer_state(
    optimizer: Optimizer, parameter: Tensor, shape: torch.Size, cut: Callable[[Tensor], Tensor]
) -> None:
    """Cut the per-element state that an optimizer holds for a parameter that has lost some of its elements.

    State with some axes of size 1, as of factored second moments, is cut along the others. State of any other shape
    cannot be followed: it is dropped with all that the optimizer holds for the parameter, which then starts anew.

    Args:
        optimizer: Any optimizer; nothing happens when it holds no state for the parameter.
        parameter: The parameter, already cut.
        shape: Its shape before.
        cut: Takes a tensor of that shape to one of the present shape.
    """
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if not any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
            continue
        if not isinstance(value, Tensor) or not _spans(value, shape):
            del optimizer.state[parameter]
            return
        state[key] = _cut_spanning(value, shape, cut)


def _spans(value: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor has a shape but for axes of size 1."""
    return value.dim() == len(shape) and all(own in (1, whole) for own, whole in zip(value.shape, shape, strict=True))


def _cut_spanning(value: Tensor, shape: torch.Size, cut: Callable[[Tensor], Tensor]) -> Tensor:
    result = cut(value.expand(shape).contiguous())
    for axis, size in enumerate(value.shape):
        if size == 1:
            result = result.narrow(axis, 0, 1)
    return result.clone(memory_format=memory_format_of(value))


def drop_stale_optimizer_state(optimizer: Optimizer) -> None:
    """Forget the state of parameters whose shape has changed since, so that their momentum starts anew."""
    for parameter, state in list(optimizer.state.items()):
        if any(isinstance(v, Tensor) and v.dim() > 0 and v.shape != parameter.shape for v in state.values()):
            del optimizer.state[parameter]
