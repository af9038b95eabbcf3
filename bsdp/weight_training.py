"""Training the weights of pairs themselves, as well conditioned as training the layers they stand for.

A pair at full rank has as many outputs (or inputs) between its layers as the smaller side of its matrix. Training both
layers then moves the product along every direction twice, by steps whose size depends on how the singular values were
shared out: with Adam, which takes steps of one size, that destroys what was pretrained. So at full rank the square
layer stays fixed with columns (or rows) of unit length, and the other one trains: where the square layer is orthogonal
(always with euclidean bases) gradient descent on it is gradient descent on the original weight, in rotated coordinates.
A pair that was cut has no square layer any more: both train, with basis filters of unit length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.factorize import to_float64
from bsdp.layers import BasisPair, column_matrix, matrix_of, weight_of


def square_factor(pair: BasisPair) -> nn.Parameter | None:
    """The weight of a pair that is square in every group, the 1x1 layer's if both are; None below full rank."""
    if pair.rank < pair.full_rank:
        return None
    factor = pair.scaling.weight if pair.out_per_group <= pair.fan_in else weight_of(pair.basis)
    assert isinstance(factor, nn.Parameter)
    return factor


def hold_square_factors(pairs: Mapping[str, BasisPair], *, rescale: bool = True) -> None:
    """Fix the square layer of every pair at full rank; the function of the pairs does not change.

    Args:
        pairs: Pairs whose weights train, see `bsdp.freeze`.
        rescale: Bring the square layers to unit length; False when they have it, as in a run that is resumed.
    """
    for pair in pairs.values():
        factor = square_factor(pair)
        if factor is None:
            continue
        if rescale:
            _rescale(pair, _row_lengths(pair) if factor is not pair.scaling.weight else 1.0 / _column_lengths(pair))
        factor.requires_grad_(False)


def release_cut_factors(pairs: Mapping[str, BasisPair], *, optimizers: Iterable[Optimizer] = ()) -> bool:
    """Let both layers of every pair train that was cut since `hold_square_factors`, with filters of unit length.

    Args:
        pairs: The same pairs.
        optimizers: Optimizers that hold them; what they remember of the rescaled weights is dropped.

    Returns:
        Whether there was any.
    """
    optimizers = list(optimizers)
    released = [pair for pair in pairs.values() if pair.rank < pair.full_rank and not _trains(pair)]
    for pair in released:
        _rescale(pair, _row_lengths(pair))
        for parameter in (weight_of(pair.basis), pair.scaling.weight):
            parameter.requires_grad_(True)
        for optimizer in optimizers:
            for parameter in pair.parameters():
                optimizer.state.pop(parameter, None)
    return bool(released)


def _trains(pair: BasisPair) -> bool:
    return weight_of(pair.basis).requires_grad and pair.scaling.weight.requires_grad


def _row_lengths(pair: BasisPair) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(to_float64(matrix_of(pair.basis).detach()), dim=2)
    return lengths


def _column_lengths(pair: BasisPair) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(to_float64(column_matrix(pair)), dim=1)
    return lengths


@torch.no_grad()
def _rescale(pair: BasisPair, lengths: Tensor) -> None:
    """Divide the basis filters by `lengths`, ``[groups, rank]``, multiply the columns by it; factors become 1."""
    lengths = torch.where(lengths.isfinite() & (lengths > 0), lengths, torch.ones_like(lengths))
    columns = to_float64(column_matrix(pair)) * lengths[:, None, :]
    basis = to_float64(matrix_of(pair.basis)) / lengths[:, :, None]
    pair.set_factors(basis, columns, torch.linalg.vector_norm(columns, dim=1))
