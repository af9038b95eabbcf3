"""Low-rank layers that reproduce target outputs in the least-squares sense, from moments of layer outputs alone.

Layout: matrices are ``[groups, out_per_group, ...]`` in float64, and groups are independent of each other. ``y`` is
what a layer puts out in the original network, ``z`` what the same layer puts out, before it is shortened, on the inputs
that a shortened network gives it. Both have the layer's bias.

PUBLISHED: the best map of rank r with ``y ~ P z`` takes the least-squares map ``B = Cov(y, z) Cov(z)^-1`` and projects
it on the first r eigenvectors of the covariance of its outputs, ``B Cov(z) B^T`` (reduced-rank regression, Izenman
1975; for layers, with the targets of the original network, Zhang et al., arXiv 1505.06798). OURS: the ridge, which
pulls ``B`` to the identity, that is to the layer's own weights, by their Gram matrix; the sums are of outputs, never of
unfolded inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bsdp.joint_moments import JointMoments

RIDGE = 1e-4  # an isotropic input of so much of the power that was seen


@dataclass(frozen=True)
class LowRank:
    """A layer of low rank.

    Attributes:
        basis: ``[groups, rank, fan_in]``; rows have norm 1.
        coefficients: ``[groups, out_per_group, rank]``.
        bias: ``[out]``.
    """

    basis: Tensor
    coefficients: Tensor
    bias: Tensor


def reduced_rank_layer(
    left: Tensor, right: Tensor, bias: Tensor, moments: JointMoments, rank: int, *, ridge: float = RIDGE
) -> LowRank:
    """The layer of a given rank whose outputs come closest to the targets, in the mean square.

    Rows of the new basis are combinations of the old ones, so the layer's receptive field stays.

    Args:
        left: Old coefficients, ``[groups, out_per_group, old rank]``.
        right: Old basis, ``[groups, old rank, fan_in]``.
        bias: Old bias, ``[out]``.
        moments: Joint moments of its outputs with the targets.
        rank: New rank per group, at most the old one.
        ridge: Weight of the distance to the old weights: as if so large a share of the output's power came from white
            inputs, on which the old layer is right.

    Returns:
        The factors in float64. With targets equal to the outputs and the full rank, the layer is the old one.

    Raises:
        ValueError: If the moments hold NaN or infinity.
    """
    _check_finite(moments)
    weight = left @ right
    span = torch.linalg.qr(left).Q  # outputs lie in it, up to the bias; inside of it `Cov(z)` has full rank
    gram = span.mT @ weight @ weight.mT @ span
    inner = span.mT @ moments.covariance @ span
    power = inner.diagonal(dim1=1, dim2=2).sum(1) / gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
    # A layer that is silent on the data keeps its weights: then the ridge is all there is.
    prior = torch.where(power > 0, ridge * power, torch.ones_like(power))[:, None, None] * gram
    inner, cross = inner + prior, moments.cross @ span + span @ prior
    best = _solve(inner, cross.mT).mT  # B, ``[groups, out_per_group, old rank]``: y ~ B span^T z
    kept = torch.linalg.eigh(_symmetric(best @ inner @ best.mT)).eigenvectors.flip(2)[:, :, :rank]
    reduced = kept.mT @ best @ span.mT
    basis = reduced @ weight
    norms = torch.linalg.vector_norm(basis, dim=2).clamp_min(1e-300)
    moved = (kept @ reduced @ (moments.mean - bias).view(len(left), -1, 1)).flatten()
    return LowRank(basis / norms[:, :, None], kept * norms[:, None, :], moments.target_mean - moved)


def refitted_layer(
    left: Tensor, right: Tensor, bias: Tensor, moments: JointMoments, keep: Tensor, *, ridge: float = RIDGE
) -> LowRank:
    """The layer with some of its bases and the least-squares coefficients for them: ``V' = Cov(y, a) Cov(a)^-1``.

    Args:
        left: Old coefficients, ``[groups, out_per_group, old rank]``, of full column rank.
        right: Old basis, ``[groups, old rank, fan_in]``.
        bias: Old bias, ``[out]``.
        moments: Joint moments of the old layer's outputs with the targets.
        keep: Bases that stay, as many in every group, ``[groups * rank]``.
        ridge: Weight of the distance to the old coefficients, as a share of each feature's variance.

    Returns:
        The factors in float64.

    Raises:
        ValueError: If the moments hold NaN or infinity.
    """
    _check_finite(moments)
    groups, rank = right.shape[:2]
    local = keep.to(left.device).view(groups, -1) - rank * torch.arange(groups, device=left.device)[:, None]
    basis = right.gather(1, local[:, :, None].expand(-1, -1, right.shape[2]))
    old = left.gather(2, local[:, None, :].expand(-1, left.shape[1], -1))
    # Features from outputs: ``a = left^+ (z - b)``.
    read = torch.linalg.pinv(left).gather(1, local[:, :, None].expand(-1, -1, left.shape[1]))
    inner = read @ moments.covariance @ read.mT
    variances = inner.diagonal(dim1=1, dim2=2)
    # A feature that is silent on the data keeps its coefficients: then the ridge is all there is.
    prior = torch.diag_embed(torch.where(variances > 0, ridge * variances, torch.ones_like(variances)))
    coefficients = _solve(inner + prior, (moments.cross @ read.mT + old @ prior).mT).mT
    means = read @ (moments.mean - bias).view(groups, -1, 1)
    return LowRank(basis, coefficients, moments.target_mean - (coefficients @ means).flatten())


def _check_finite(moments: JointMoments) -> None:
    if not all(t.isfinite().all() for t in (moments.cross, moments.covariance, moments.mean, moments.target_mean)):
        raise ValueError("its outputs on the calibration data hold NaN or infinity; check the data and the weights.")


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a positive semidefinite matrix, whose directions of no power count for nothing."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    inverse = torch.where(values > 1e-12 * values[:, -1:], 1.0 / values, torch.zeros_like(values))
    solution: Tensor = vectors @ (inverse[:, :, None] * (vectors.mT @ right))
    return solution
