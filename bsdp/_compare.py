"""How far the outputs of two models are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Difference:
    """The largest difference between two lists of outputs.

    Attributes:
        absolute: The largest absolute difference of two numbers.
        relative: That, divided by the largest absolute value of the first outputs.
    """

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.absolute:.1e}" if self.absolute == 0.0 else f"{self.absolute:.1e}, relative {self.relative:.1e}"


def largest_difference(expected: Any, found: Any) -> Difference:
    """Compare all floating-point outputs; NaN in one of them gives NaN, and other shapes give infinity.

    Args:
        expected: A tensor, or any nest of tensors.
        found: The same from elsewhere.
    """
    pairs = list(zip(tensors_of(expected), tensors_of(found), strict=False))
    sizes = [max(a.numel(), 1) for a, _ in pairs]
    if len(tensors_of(expected)) != len(tensors_of(found)) or any(a.shape != b.shape for a, b in pairs) or not sizes:
        return Difference(float("inf"), float("inf"))
    gaps = torch.stack([(a.double() - b.double()).abs().max() if a.numel() else torch.zeros(()) for a, b in pairs])
    largest = torch.stack([a.double().abs().max() if a.numel() else torch.zeros(()) for a, _ in pairs]).max()
    absolute = float(gaps.max())
    return Difference(absolute, absolute / float(largest) if largest > 0 else absolute)


def tensors_of(outputs: Any) -> list[Tensor]:
    """All tensors in a nest of outputs, on the CPU."""
    return [leaf.detach().cpu() for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def tolerance_for(model: nn.Module) -> float:
    """The relative difference that rounding explains: 1e-4 in float32 and above, more in half precision."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return 1e-4 if not dtypes & {torch.float16, torch.bfloat16} else 3e-2
