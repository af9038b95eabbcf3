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
from bsdp.layers import BasisPair
from bsdp.optimizer_state import forget
from bsdp.plain_layers import matrix_of, weight_of


def square_factor(pair: BasisPair) -> nn.Parameter | None:
    """The weight of a pair that is square in every group, the 1x1 layer's if both are; None below full rank."""
    if pair.rank < pair.full_rank:
        return None
    factor = pair.scaling.weight if pair.out_per_group <= pair.fan_in else weight_of(pair.basis)
    assert isinstance(factor, nn.Parameter)
    return factor


def condition_factors(
    pairs: Mapping[str, BasisPair], *, optimizers: Iterable[Optimizer] = (), rescale: bool = True
) -> bool:
    """Fix the square layer of every pair at full rank, let both layers of the others train; functions do not change.

    Call it before training, and after every cut and re-base. It changes nothing where nothing is to be done.

    Args:
        pairs: Pairs whose weights train, see `bsdp.freeze`.
        optimizers: Optimizers that hold them; what they remember of rescaled weights is dropped.
        rescale: False: only choose what trains, as for a run that is resumed, whose weights stay as they were.

    Returns:
        Whether another set of parameters trains now.
    """
    optimizers, changed = list(optimizers), False
    for pair in pairs.values():
        fixed = square_factor(pair)
        if rescale and _far_from_unit(_lengths(pair, fixed), exact=fixed is not None):
            _rescale(pair, _lengths(pair, fixed), by_columns=fixed is pair.scaling.weight)
            forget(optimizers, pair.parameters())
        for weight in (weight_of(pair.basis), pair.scaling.weight):
            changed = changed or weight.requires_grad != (weight is not fixed)
            weight.requires_grad_(weight is not fixed)
    return changed


def _lengths(pair: BasisPair, fixed: nn.Parameter | None) -> Tensor:
    """Lengths of the columns, if it is the 1x1 layer that is fixed, else of the basis filters, ``[groups, rank]``."""
    columns = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
    rows = columns.mT if fixed is pair.scaling.weight else matrix_of(pair.basis).detach()
    lengths: Tensor = torch.linalg.vector_norm(to_float64(rows), dim=2)
    return lengths


def _far_from_unit(lengths: Tensor, *, exact: bool) -> bool:
    """Fixed layers are of unit length but for rounding; those that train may drift."""
    low, high = (0.99, 1.01) if exact else (0.5, 2.0)
    far = ((lengths < low) & (lengths > 0)) | (lengths > high)
    return bool(far.any()) and bool(lengths.isfinite().all())


@torch.no_grad()
def _rescale(pair: BasisPair, lengths: Tensor, *, by_columns: bool) -> None:
    """Make columns or basis filters of these lengths ``[groups, rank]`` unit vectors; the others take them over."""
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    if by_columns:
        lengths = 1.0 / lengths
    columns = to_float64(pair.scaling.weight).view(pair.groups, pair.out_per_group, pair.rank) * lengths[:, None, :]
    basis = to_float64(matrix_of(pair.basis)) / lengths[:, :, None]
    delta = pair.scaling.delta.detach().clone()
    pair.set_factors(basis, columns, to_float64(pair.scaling.sigma).view_as(lengths) * lengths)
    pair.scaling.delta.copy_(delta)
