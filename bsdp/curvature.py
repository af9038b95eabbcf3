"""Curvature of the loss in the scaling factors alone: Hutchinson's estimate of the Hessian's diagonal.

With random signs ``v`` (Rademacher), ``E[v * (H v)]`` is the diagonal of ``H`` (Hutchinson 1990; Bekas et al. 2007);
one sample costs one product ``H v``. Layout: scaling factors of all layers stand side by side in one flat vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bsdp._checks import check_whole

Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Curvature:
    """First and second derivatives of a loss.

    Attributes:
        gradient: ``[all factors]``, float32 at least.
        diagonal: Estimate of the Hessian's diagonal, ``[all factors]``, float32 at least.
    """

    gradient: Tensor
    diagonal: Tensor


def hutchinson_diagonal(
    loss: Tensor, scales: Sequence[Tensor], *, samples: int = 2, generator: torch.Generator | None = None
) -> Curvature:
    """Estimate the diagonal by differentiating twice, in the scaling factors only.

    Args:
        loss: A scalar whose graph still stands.
        scales: The scaling factors (or ``delta``), which require gradients; those without influence get zeros.
        samples: Vectors of signs to average over.
        generator: Where the signs come from.

    Raises:
        RuntimeError: If an operation has no second derivative; see `hutchinson_by_differences`.
    """
    check_whole("samples", samples, 1)
    gradient = _flat_gradient(loss, scales, create_graph=True)
    diagonal = torch.zeros_like(gradient)
    if not gradient.requires_grad:  # the loss is linear in all of them
        return Curvature(gradient, diagonal)
    _refuse_once_differentiable(gradient)
    for _ in range(samples):
        signs = _signs(gradient, generator)
        diagonal = diagonal + signs * _flat_gradient((gradient * signs).sum(), scales, retain_graph=True)
    return Curvature(gradient.detach(), diagonal / samples)


def hutchinson_by_differences(
    closure: Closure, scales: Sequence[Tensor], *, samples: int = 2, generator: torch.Generator | None = None
) -> Curvature:
    """Estimate the diagonal from central differences of gradients, for networks without second derivatives.

    Args:
        closure: Gives the loss of the same minibatch whenever it is called, with the same random numbers.
        scales: As in `hutchinson_diagonal`; they are moved a little, and back again.
        samples: Vectors of signs to average over, two gradients each.
        generator: Where the signs come from.
    """
    check_whole("samples", samples, 1)
    gradient = _flat_gradient(closure(), scales)
    diagonal = torch.zeros_like(gradient)
    # The usual compromise between the truncation, of the second order in the step, and rounding.
    step = max(torch.finfo(scale.dtype).eps for scale in scales) ** (1 / 3)
    for _ in range(samples):
        signs = _signs(gradient, generator)
        ahead, behind = (_gradient_at(closure, scales, signs * way) for way in (step, -step))
        diagonal = diagonal + signs * (ahead - behind) / (2.0 * step)
    return Curvature(gradient, diagonal / samples)


def measure_curvature(
    closure: Closure, scales: Sequence[Tensor], *, samples: int = 2, generator: torch.Generator | None = None
) -> Curvature:
    """`hutchinson_diagonal` where the network has second derivatives, else `hutchinson_by_differences`.

    ``grad`` of all parameters stays as it is. The scaling factors need not require gradients.
    """
    with _requiring_gradients(scales), torch.enable_grad():
        try:
            return hutchinson_diagonal(closure(), scales, samples=samples, generator=generator)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # some operation cannot be differentiated twice; any other error comes again below
            return hutchinson_by_differences(closure, scales, samples=samples, generator=generator)


def _flat_gradient(
    loss: Tensor, scales: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> Tensor:
    parts = torch.autograd.grad(
        loss,
        list(scales),
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    flat = torch.cat([part.flatten() for part in parts])
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _refuse_once_differentiable(gradient: Tensor) -> None:
    """Refuse a graph that runs through functions marked as differentiable once.

    They raise only if the derivative in the inputs that they hide is asked for; that in the scaling factors just
    goes without their part.
    """
    waiting: list[Any] = [gradient.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):
            raise RuntimeError("an operation of the network can be differentiated only once (`once_differentiable`).")
        waiting += [following for following, _ in node.next_functions]


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=device)
    return (2 * drawn - 1).to(like)


def _gradient_at(closure: Closure, scales: Sequence[Tensor], move: Tensor) -> Tensor:
    kept = [scale.detach().clone() for scale in scales]
    moves = torch.split(move, [scale.numel() for scale in scales])
    try:
        with torch.no_grad():
            for scale, by in zip(scales, moves, strict=True):
                scale.add_(by.view_as(scale).to(scale))
        return _flat_gradient(closure(), scales)
    finally:
        with torch.no_grad():
            for scale, old in zip(scales, kept, strict=True):
                scale.copy_(old)


@contextmanager
def _requiring_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_()
        yield
    finally:
        for tensor, required in zip(tensors, before, strict=True):
            tensor.requires_grad_(required)
