"""Batch norms that neither learn nor update anything, as one multiplication and addition.

``y = x a + b`` with ``a = weight / sqrt(running_var + eps)`` and ``b = bias - running_mean a`` is what a batch norm in
eval mode computes. Written so, its backward pass needs `a` only, while torch's own batch norm keeps its whole input:
with scaling factors alone to train, every layer would hold three feature maps (the input, the features of the bases,
the input of the batch norm), one more than when all weights train.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def lean_batch_norms(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Save memory and time in the forward and backward passes of fixed batch norms.

    Inside the ``with`` block they compute the same up to rounding. Those in train mode, with terms that require
    gradients, without terms or running statistics, or on inputs of another precision run as they always do.

    Args:
        norms: Batch norms, for example those of `fixed_batch_norms`; a forward pass inside the block is enough.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().requires_grad_(False)
        >>> images = torch.ones(1, 3, 4, 4)
        >>> with bsdp.lean_batch_norms(bsdp.fixed_batch_norms(model)):
        ...     outputs = model(images)
        >>> torch.allclose(outputs, model(images), atol=1e-6)
        True
    """
    kinds = {norm: type(norm) for norm in norms if isinstance(norm, _BatchNorm) and not isinstance(norm, _Lean)}
    try:
        for norm, kind in kinds.items():
            # Not `forward`: a copy made meanwhile would run the original module.
            norm.__class__ = _lean_kind(kind)  # type: ignore[assignment, arg-type]
        yield
    finally:
        for norm, kind in kinds.items():
            norm.__class__ = kind


class _Lean:
    """Goes before a batch norm's own class."""

    def forward(self, inputs: Tensor) -> Tensor:
        """As one multiplication and addition where that is the same."""
        assert isinstance(self, _BatchNorm)
        terms = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        fixed = len(terms) == 4 and not any(t.requires_grad or t.dtype != inputs.dtype for t in terms)
        if self.training or not fixed or inputs.dim() < 2:
            outputs: Tensor = super().forward(inputs)  # type: ignore[misc]
            return outputs
        weight, bias, mean, variance = terms
        factor = weight * torch.rsqrt(variance + self.eps)
        shape = (1, -1) + (1,) * (inputs.dim() - 2)
        return torch.addcmul((bias - mean * factor).view(shape), inputs, factor.view(shape))


@cache
def _lean_kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Lean{kind.__name__}", (_Lean, kind), {})
