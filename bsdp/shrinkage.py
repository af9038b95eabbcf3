"""Moments that were measured on few examples, brought closer to what nothing would be known of the data.

A sample moment ``C`` of few examples has directions without any power, and others with too much. The convex combination
``(1 - p) C + p T`` with a structured target T has the least expected squared error at ``p = E|C - E C|^2 / E|C - T|^2``
(Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bsdp.factorize import METRICS, blocks_of, isotropic
from bsdp.moments import LayerMoment


@dataclass(frozen=True)
class MetricMoments:
    """What `factorize` needs for one layer, in float64.

    Attributes:
        moment: Output moment, ``[groups, out_per_group, out_per_group]``; None for the Euclidean metric.
        gradient: Moment of the gradients at the outputs, in the same form; for the KFAC metric only.
    """

    moment: Tensor | None
    gradient: Tensor | None


def shrunk(blocks: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Mix each block with its target, ``(1 - share) C + share T``.

    Args:
        blocks: ``[groups, n, n]``.
        target: ``[groups, n, n]``.
        share: ``[groups]``, in [0, 1].
    """
    return torch.lerp(blocks, target, share[:, None, None])


def best_share(blocks: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """The share of the target with the least expected squared error, ``[groups]``.

    Args:
        blocks: ``[groups, n, n]``.
        target: ``[groups, n, n]``.
        spread: Expected squared error of each block, ``[groups]``.
    """
    distance = (blocks - target).square().sum((1, 2))
    return torch.where(distance > 0, spread / distance.clamp_min(1e-300), torch.zeros_like(distance)).clamp(0, 1)


def metric_moments(
    matrix: Tensor,
    metric: str,
    moment: Tensor | LayerMoment | None,
    gradient: Tensor | LayerMoment | None,
    *,
    centred: bool = False,
    shrinkage: float | None = None,
) -> MetricMoments:
    """Make the moments of one layer ready for `factorize`.

    The target of the output moment is what white inputs of the same power would give, that of the gradients is a
    multiple of the identity.

    Args:
        matrix: The weight, ``[groups, out_per_group, fan_in]``, in float64.
        metric: One of `METRICS`.
        moment: Moment of the outputs before the bias.
        gradient: Moment of the gradients.
        centred: Take the covariance of the outputs instead of their second moment.
        shrinkage: Share of the targets, in [0, 1]; None for the best one given the spread between examples (0 where a
            moment is a plain tensor, whose spread nobody knows).

    Raises:
        ValueError: If a moment is of another size or not finite, or a plain tensor is to be centred.
    """
    assert metric in METRICS
    if metric == "euclidean":
        return MetricMoments(None, None)
    outputs, gradients = None, None
    if moment is not None:
        if centred and not isinstance(moment, LayerMoment):
            raise ValueError("`centred` needs moments with a mean, as `collect_output_moments` returns them.")
        values = moment if isinstance(moment, Tensor) else moment.covariance if centred else moment.second
        blocks = blocks_of(values, matrix)
        outputs = _shrink(blocks, isotropic(matrix, blocks), moment, shrinkage)
    if metric == "kfac" and gradient is not None:
        values = gradient if isinstance(gradient, Tensor) else gradient.second
        blocks = blocks_of(values, matrix, what="gradient")
        identity = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
        power = blocks.diagonal(dim1=1, dim2=2).mean(1)
        gradients = _shrink(blocks, power[:, None, None] * identity, gradient, shrinkage)
    return MetricMoments(outputs, gradients)


def _shrink(blocks: Tensor, target: Tensor, moment: Tensor | LayerMoment, shrinkage: float | None) -> Tensor:
    if shrinkage is not None:
        share = blocks.new_full((len(blocks),), shrinkage)
    elif isinstance(moment, LayerMoment):
        share = best_share(blocks, target, moment.spread.to(blocks))
    else:
        return blocks
    return shrunk(blocks, target, share)


def warn_of_few(names: Iterable[str]) -> None:
    """Warn, once for all, of layers of which fewer columns were seen than they have bases."""
    names = list(names)
    if names:
        shown = ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"fewer examples times positions were seen than there are bases in {len(names)} layers ({shown}): the "
            "order of their last bases is that of white inputs. Use more calibration data.",
            stacklevel=3,
        )


def is_few(moment: object, rank: int) -> bool:
    """Whether a moment cannot tell `rank` directions apart."""
    return isinstance(moment, LayerMoment) and moment.count < rank
