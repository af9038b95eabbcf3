"""Making factors small before they are cut: an L1 penalty, as its subgradient.

Decomposed layers have the weight ``V diag(s sigma) U^T``. The penalty is on ``|s|`` alone, whatever `sigma` is: seen
from the singular values ``w = s sigma`` this is ``|w| / sigma``, an adaptive lasso (Zou, JASA 2006), which spares what
is large in the pretrained layer. Weighted with `sigma` it would be the trace norm, whose pull is strongest there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bsdp._checks import check_at_least, check_choice

SPARSIFIERS = ("none", "l1")


def check_sparsifier(sparsifier: str, weight: float) -> None:
    """Refuse a sparsifier that is not known, and a weight that is negative or has nothing to weigh."""
    check_choice("sparsifier", sparsifier, SPARSIFIERS)
    check_at_least("sparsity_weight", weight, 0)
    if weight and sparsifier == "none":
        raise ValueError(
            f"`sparsity_weight={weight}` weighs a penalty on the scaling factors, but `sparsifier` is 'none': set it "
            "to 'l1', or the weight to 0."
        )
    if not weight and sparsifier != "none":
        raise ValueError(f"`sparsifier={sparsifier!r}` does nothing without a `sparsity_weight` above 0, such as 1e-4.")


@torch.no_grad()
def add_l1_gradient(parameters: Iterable[Tensor], weight: float, *, origin: float = 0.0) -> None:
    """Add the subgradient of ``weight * sum |p - origin|`` to gradients, in place; 0 at the origin.

    Args:
        parameters: Those without a gradient now are left alone.
        weight: Weight of the penalty.
        origin: Where the penalty is 0; -1 for a `delta`, whose factor is ``1 + delta``.
    """
    if not weight:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.add_((parameter - origin).sign(), alpha=weight)
