"""What optimizers remember of parameters (momentum), kept in step with parameters that lose elements.

An optimizer may wrap another one that does the steps, as Lookahead and SAM do: what that one remembers follows, too. It
is found among the attributes of the outer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from bsdp.plain_layers import memory_format_of


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Optimizers and those that they wrap, each once, the outer ones before the inner ones."""
    found, left = dict[int, Optimizer](), list(optimizers)
    while left:
        optimizer = left.pop(0)
        if id(optimizer) not in found:
            found[id(optimizer)] = optimizer
            left += [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    return list(found.values())


def forget(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Drop all that optimizers remember of some parameters, which then start anew."""
    parameters = list(parameters)
    for states in _states(optimizers):
        for parameter in parameters:
            states.pop(parameter, None)


def cut_state(
    optimizers: Iterable[Optimizer], parameter: Tensor, shape: torch.Size, cut: Callable[[Tensor], Tensor]
) -> None:
    """Cut the per-element state that optimizers hold for a parameter that has lost some of its elements.

    State with some axes of size 1, as of factored second moments, is cut along the others. State of any other shape
    cannot be followed: it is dropped with all that the optimizer holds for the parameter, which then starts anew.

    Args:
        optimizers: Any optimizers; nothing happens to those that hold no state for the parameter.
        parameter: The parameter, already cut.
        shape: Its shape before.
        cut: Takes a tensor of that shape to one of the present shape.
    """
    for states in _states(optimizers):
        state = states.get(parameter, {})
        for key, value in state.items():
            if not any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
                continue
            if not isinstance(value, Tensor) or not _spans(value, shape):
                del states[parameter]
                break
            state[key] = _cut_spanning(value, shape, cut)


def drop_stale_state(optimizers: Iterable[Optimizer]) -> None:
    """Forget the state of parameters whose shape has changed since, so that their momentum starts anew."""
    for states in _states(optimizers):
        for parameter, state in list(states.items()):
            if any(isinstance(v, Tensor) and v.dim() > 0 and v.shape != parameter.shape for v in state.values()):
                del states[parameter]


def _states(optimizers: Iterable[Optimizer]) -> list[MutableMapping[Tensor, Any]]:
    """The state of optimizers and of those that they wrap by parameter; one that several share, once."""
    return list({id(optimizer.state): optimizer.state for optimizer in with_inner(optimizers)}.values())


def _spans(value: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor has a shape but for axes of size 1."""
    return value.dim() == len(shape) and all(own in (1, whole) for own, whole in zip(value.shape, shape, strict=True))


def _cut_spanning(value: Tensor, shape: torch.Size, cut: Callable[[Tensor], Tensor]) -> Tensor:
    result = cut(value.expand(shape).contiguous())
    for axis, size in enumerate(value.shape):
        if size == 1:
            result = result.narrow(axis, 0, 1)
    return result.clone(memory_format=memory_format_of(value))
