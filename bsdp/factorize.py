"""Factorising a weight matrix into bases and coefficients.

Matrices are ``[groups, out_per_group, fan_in]``. All factors are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("euclidean", "activation", "kfac")
_RIDGE = 1e-4  # share of the power that is added to measured moments
_GRAM_FROM = 48  # rank from which eigenvectors of the Gram matrix are faster than an SVD


@dataclass(frozen=True)
class Factors:
    """The factors of one weight, ordered by descending sigma in every group.

    Attributes:
        basis: ``[groups, rank, fan_in]``.
        coefficients: ``[groups, out_per_group, rank]``; ``coefficients @ basis`` is the weight.
        sigma: ``[groups, rank]``: singular values, or root-mean-square outputs (weighted in the
            KFAC metric) of each basis otherwise.
    """

    basis: Tensor
    coefficients: Tensor
    sigma: Tensor


def factorize(
    matrix: Tensor, *, metric: str = "euclidean", moment: Tensor | None = None, gradient: Tensor | None = None
) -> Factors:
    """Factorise ``M = coefficients @ basis`` at full rank.

    ``"euclidean"`` is the SVD of Wong et al. (arXiv 2108.02893): orthonormal bases, coefficients ``V diag(sigma)``.
    ``"activation"`` takes V from the eigenvectors of the output second moment ``E[y y^T]`` and sets
    ``basis = diag(1 / lambda) V^T M``: the truncation that is optimal for the layer's output on the data that gave the
    moment; the bases then are orthonormal in the data's metric, not in the Euclidean one. ``"kfac"`` weighs output
    errors by the second moment of the loss gradient there (Martens and Grosse, arXiv 1503.05671): the truncation that
    is optimal for the loss, to second order and within that approximation; V then is not orthonormal.

    Args:
        matrix: ``[groups, out_per_group, fan_in]``, any floating dtype.
        metric: One of `METRICS`.
        moment: For ``"activation"`` and ``"kfac"``: ``[groups * out_per_group, groups * out_per_group]``, of which only
            the diagonal blocks of the groups are used, or these blocks, ``[groups, out_per_group, out_per_group]``.
        gradient: For ``"kfac"``: the second moment of the gradients at its outputs, in the same form.

    Returns:
        Factors in float64, on the matrix's device where that supports float64 and on the CPU otherwise.

    Raises:
        ValueError: If the matrix or the moment holds NaN or infinity, or the moment has another size.
    """
    matrix = to_float64(matrix)
    if not matrix.isfinite().all():
        raise ValueError("its weight holds NaN or infinity; load sound weights before decomposing.")
    if metric == "euclidean":
        if min(matrix.shape[1:]) >= _GRAM_FROM:
            return _gram_factors(matrix)
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(basis=right, coefficients=left * sigma[:, None, :], sigma=sigma)
    if moment is None:
        raise ValueError(f"`metric={metric!r}` needs the second moment of its outputs.")
    if metric == "activation":
        return _weighted_factors(matrix, blocks_of(moment, matrix), None)
    if gradient is None:
        raise ValueError(f"`metric={metric!r}` needs the second moment of the gradients at its outputs.")
    return _weighted_factors(matrix, blocks_of(moment, matrix), blocks_of(gradient, matrix, what="gradient"))


def refactorize(
    coefficients: Tensor,
    basis: Tensor,
    *,
    metric: str = "euclidean",
    moment: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Factors:
    """Factorise the product of two factors anew; as many bases as before reproduce it exactly.

    Everything is done inside the space that the columns of `coefficients` span, so that matrices are ``rank x rank``
    and ``rank x fan_in`` at most. When the product's rank is lower, the last bases have a sigma of 0 (or next to it).

    Args:
        coefficients: ``[groups, out_per_group, rank]``, any floating dtype.
        basis: ``[groups, rank, fan_in]``.
        metric: See `factorize`.
        moment: See `factorize`.
        gradient: See `factorize`.

    Returns:
        Factors of the same rank, as those of `factorize`.

    Raises:
        ValueError: As `factorize`.
    """
    coefficients, basis = to_float64(coefficients), to_float64(basis)
    product = coefficients @ basis
    if basis.shape[1] == product.shape[1] or not product.isfinite().all():
        return factorize(product, metric=metric, moment=moment, gradient=gradient)
    space = torch.linalg.qr(coefficients).Q
    inside = factorize(
        space.mT @ coefficients @ basis,
        metric=metric,
        moment=None if moment is None else space.mT @ blocks_of(moment, product) @ space,
        gradient=None if gradient is None else space.mT @ blocks_of(gradient, product, what="gradient") @ space,
    )
    return Factors(inside.basis, space @ inside.coefficients, inside.sigma)


def blocks_of(moment: Tensor, matrix: Tensor, *, what: str = "output") -> Tensor:
    """The diagonal blocks of a moment, one for each group, ``[groups, out_per_group, out_per_group]`` in float64.

    Args:
        moment: These blocks, or the whole.
        matrix: The weight, ``[groups, out_per_group, fan_in]``.
        what: What the moment is of, for errors.

    Raises:
        ValueError: If its size is another, or it holds NaN or infinity.
    """
    groups, out = matrix.shape[:2]
    if moment.shape not in ((groups * out, groups * out), (groups, out, out)):
        total = groups * out
        raise ValueError(f"its {what} statistics must be {total} x {total}, got the shape {tuple(moment.shape)}.")
    if not moment.isfinite().all():
        raise ValueError(f"its {what} statistics hold NaN or infinity; check the calibration data.")
    moment = to_float64(moment).to(matrix.device)
    if moment.dim() == 3:
        return moment
    return torch.stack([moment[g * out : (g + 1) * out, g * out : (g + 1) * out] for g in range(groups)])


def to_float64(tensor: Tensor) -> Tensor:
    """Bring a tensor to float64, on the CPU where its own device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _gram_factors(matrix: Tensor) -> Factors:
    """Singular vectors from the eigenvectors of the smaller Gram matrix: several times faster than an SVD.

    The basis is orthonormal and the product exact for any matrix. Squaring costs digits only where singular values are
    tiny: below 1e-8 of the largest, the coefficients of two bases need not be orthogonal to each other.
    """
    wide = matrix.shape[1] <= matrix.shape[2]
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    values, basis = values.flip(1), vectors.flip(2).mT
    if wide and bool((values[:, -1] > 1e-3 * values[:, 0]).all()):  # well conditioned: orthonormal as it is
        sigma = values.sqrt()
        return Factors(basis @ matrix / sigma[:, :, None], vectors.flip(2) * sigma[:, None, :], sigma)
    if wide:
        basis = torch.linalg.qr((basis @ matrix).mT).Q.mT
    coefficients = matrix @ basis.mT
    sigma, order = torch.linalg.vector_norm(coefficients, dim=1).sort(dim=1, descending=True, stable=True)
    basis = basis.gather(1, order[:, :, None].expand_as(basis))
    return Factors(basis, coefficients.gather(2, order[:, None, :].expand_as(coefficients)), sigma)


def _weighted_factors(matrix: Tensor, blocks: Tensor, gradient: Tensor | None) -> Factors:
    """Factors by which a truncation has the least output error, weighted by a second moment of output gradients.

    With ``C = M A M^T`` the output moment, G that of the gradients (None for the identity) and ``G^(1/2) C G^(1/2) =
    W diag(lambda^2) W^T``: coefficients ``G^(-1/2) W diag(lambda)``, bases ``diag(1 / lambda) W^T G^(1/2) M``. This is
    the SVD of ``G^(1/2) M A^(1/2)``.
    """
    out, fan_in = matrix.shape[1:]
    # Outputs lie in the column space of the matrix. Working inside it keeps full rank exact when fan_in < out and the
    # moment, often summed in float32, holds noise outside of it.
    space = torch.linalg.qr(matrix).Q if fan_in < out else None
    if space is not None:
        blocks, matrix = space.mT @ blocks @ space, space.mT @ matrix
        gradient = None if gradient is None else space.mT @ gradient @ space
    # The ridge is an isotropic input moment of a share of the measured output power: it keeps directions that the
    # calibration data never excite in a sensible order, and every kept lambda away from zero.
    blocks = blocks + _RIDGE * isotropic(matrix, blocks)
    root, inverse = (None, None) if gradient is None else _roots(gradient)
    if root is not None:
        blocks, matrix = root @ blocks @ root, root @ matrix
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    values, vectors = values.flip(1), vectors.flip(2)
    sigma = values.clamp_min(0).sqrt()
    floor = sigma[:, :1] * 1e-7
    safe = torch.where(sigma > floor, sigma, torch.where(floor > 0, floor, torch.ones_like(floor)))
    basis = (vectors.mT @ matrix) / safe[:, :, None]
    outward = vectors if inverse is None else inverse @ vectors
    outward = outward if space is None else space @ outward
    return Factors(basis=basis, coefficients=outward * safe[:, None, :], sigma=safe)


def isotropic(matrix: Tensor, blocks: Tensor) -> Tensor:
    """The output moment that white inputs would give, scaled to the power of a measured one.

    Args:
        matrix: ``[groups, out_per_group, fan_in]``.
        blocks: ``[groups, out_per_group, out_per_group]``.
    """
    gram = matrix @ matrix.mT
    power = blocks.diagonal(dim1=1, dim2=2).sum(1) / gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
    return power[:, None, None] * gram


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """``(G + ridge)^(1/2)`` and its inverse per group, scaled to a mean power of 1; identities where G is zero."""
    identity = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    power = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    unit = torch.where(power > 0, moment / power.clamp_min(1e-300), identity)
    values, vectors = torch.linalg.eigh((unit + unit.mT) / 2 + _RIDGE * identity)
    values = values.clamp_min(_RIDGE / 2)[:, None, :].sqrt()
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT
