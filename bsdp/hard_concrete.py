"""Hard-concrete gates: random gates that are often exactly 0 or 1 and yet have a gradient.

PUBLISHED (Louizos, Welling, Kingma, arXiv 1712.01312; Guo, Rush, Kim, arXiv 2012.07463)::

    s = sigmoid((log u - log(1 - u) + alpha) / temperature),  u uniform in (0, 1)
    z = min(1, max(0, s (high - low) + low)),  low < 0 < 1 < high
    P(z > 0) = sigmoid(alpha - temperature * log(-low / high))

The sum of P(z > 0) is the expected number of open gates, the "L0 norm", and is differentiable in alpha. Without noise
z = min(1, max(0, sigmoid(alpha) (high - low) + low)). Louizos et al. use temperature 2/3, low -0.1 and high 1.1; Guo et
al. temperature 1 (that is, none), low -1.5 and high 1.5, which makes the logarithm vanish: the defaults here.

Gates may stand for anything, in any shape: single weights, whole layers, basis vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_stretch(low: float, high: float, temperature: float = 1.0) -> None:
    """Refuse a stretch in which a gate could not be exactly 0 and exactly 1, and a temperature that is not above 0.

    Args:
        low: Lower end of the stretched interval.
        high: Upper end.
        temperature: How soft the gates are.
    """
    if not (-math.inf < low < 0.0 and 1.0 < high < math.inf):
        raise ValueError(f"`low` must be below 0 and `high` above 1, both finite, got low={low!r}, high={high!r}.")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be above 0 and finite, got {temperature!r}.")


def uniform_noise(alpha: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Noise in (0, 1), ends excluded, in the shape, type and place of `alpha`.

    Args:
        alpha: One number per gate.
        generator: On the CPU, whatever the device of `alpha`, so that runs on all devices draw the same. None: torch's.
    """
    noise = torch.rand(alpha.shape, generator=generator)  # in float32: half precision would often round to 0 or 1
    edge = torch.finfo(torch.float32).eps
    return noise.clamp_(edge, 1.0 - edge).to(alpha.device)


def sample_gates(
    alpha: Tensor, noise: Tensor, *, low: float = -1.5, high: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Gates in [0, 1] for given noise, differentiable in `alpha`.

    Args:
        alpha: One number per gate.
        noise: From `uniform_noise`.
        low: Lower end of the stretched interval, below 0.
        high: Upper end, above 1.
        temperature: How soft the gates are.

    Example:
        >>> sample_gates(torch.tensor([-9.0, 0.0, 9.0]), torch.full((3,), 0.5), low=-0.5, high=1.5)
        tensor([0.0000, 0.5000, 1.0000])
    """
    soft = torch.sigmoid((torch.logit(noise) + alpha) / temperature)
    return (soft * (high - low) + low).clamp(0.0, 1.0).to(alpha.dtype)


def deterministic_gates(alpha: Tensor, *, low: float = -1.5, high: float = 1.5) -> Tensor:
    """The gates without noise, as they are used for evaluation.

    Args:
        alpha: One number per gate.
        low: Lower end of the stretched interval, below 0.
        high: Upper end, above 1.
    """
    return (torch.sigmoid(alpha) * (high - low) + low).clamp(0.0, 1.0)


def open_probability(alpha: Tensor, *, low: float = -1.5, high: float = 1.5, temperature: float = 1.0) -> Tensor:
    """P(z > 0) of every gate, differentiable in `alpha`.

    Args:
        alpha: One number per gate.
        low: Lower end of the stretched interval, below 0.
        high: Upper end, above 1.
        temperature: How soft the gates are.
    """
    return torch.sigmoid(alpha - temperature * math.log(-low / high))


def expected_l0(alpha: Tensor, *, low: float = -1.5, high: float = 1.5, temperature: float = 1.0) -> Tensor:
    """Expected number of gates that are not 0, differentiable in `alpha`.

    Args:
        alpha: One number per gate.
        low: Lower end of the stretched interval, below 0.
        high: Upper end, above 1.
        temperature: How soft the gates are.

    Example:
        >>> expected_l0(torch.zeros(10))
        tensor(5.)
    """
    return open_probability(alpha, low=low, high=high, temperature=temperature).sum()
