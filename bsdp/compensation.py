"""Choosing the inputs of layers and compensating for the others, in closed form (Xie et al., arXiv 2108.13728).

CODE (ZhouyangXie/pseudopruner, formulas only): the gain of an input, forward selection, the compensation of weight and
bias, the restored output variance, constant inputs first. RECONSTRUCTED, ours: the sum over several readers, each in
units of its own output variance; the ridge, which pulls to the old weights; layers without a bias.

With ``C = E[x x^T] - E[x] E[x]^T`` of the inputs, ``W`` the weight and ``S`` the inputs that stay,

- the gain of ``t`` is ``||(W C[:,t] - W C[:,S] C_SS^-1 C_St) L^-T||^2`` with ``L L^T = C_tt - C_tS C_SS^-1 C_St``;
- ``W' = W C[:,S] C_SS^-1`` and ``b' = b + W E[x] - W' E[x_S]`` give the smallest mean squared error of the outputs.

The block-inverse update of ``C_SS^-1`` is carried out on the Schur complement itself: after each choice, ``C`` and
``W C`` are replaced by what the inputs chosen so far do not explain. That is the same, and needs no inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bsdp.input_moments import Moments

RIDGE = 1e-6  # of the mean variance of the inputs
_CONSTANT = 1e-12  # of the largest variance
_LOST = 0.01  # share of its variance below which an output is not scaled back to it


@dataclass(frozen=True)
class Reader:
    """A layer that reads the units among which to choose.

    Attributes:
        weight: ``[outputs, m]`` in float64.
        covariance: Of its inputs, ``[m, m]`` in float64; the second moment for a layer without a bias.
        columns: Positions of each unit among its inputs, ``[units, columns per unit]``.
        kept: Positions of other inputs that stay in any case.
    """

    weight: Tensor
    covariance: Tensor
    columns: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Selection:
    """Units in the order in which they are worth keeping.

    Attributes:
        order: All units. After those that the greedy search has taken come those that the others explain, then those
            whose inputs are constant.
        losses: Share of the readers' output variance that is not reproduced when only the first 0, 1, 2, ... units
            stay, after compensation; the mean over the readers, ``[units + 1]``.
        greedy: How many of `order` the search has taken.
    """

    order: Tensor
    losses: Tensor
    greedy: int


class _State:
    """What the inputs chosen so far do not explain of a reader's inputs and outputs."""

    def __init__(self, reader: Reader, ridge: float) -> None:
        weight, covariance = reader.weight, reader.covariance
        columns, kept = reader.columns.flatten(), reader.kept
        self.units, self.width = reader.columns.shape
        variances = covariance.diagonal()
        self.constant = (variances[reader.columns] <= _CONSTANT * variances.max()).all(1)
        jitter = _jitter(covariance, ridge)
        products = weight @ covariance
        output = (products * weight).sum()
        self.scale = 1.0 / float(output) if float(output) > 0 else 0.0
        self.inputs = covariance[columns][:, columns] + jitter * torch.eye(len(columns)).to(covariance)
        self.outputs = products[:, columns]
        loss = output
        if len(kept):
            factor = _cholesky(covariance[kept][:, kept], jitter)
            across = torch.linalg.solve_triangular(factor, covariance[kept][:, columns], upper=False)
            known = torch.linalg.solve_triangular(factor, products[:, kept].mT, upper=False)
            self.inputs = self.inputs - across.mT @ across
            self.outputs = self.outputs - known.mT @ across
            loss = output - known.square().sum()
        self.loss = max(0.0, float(loss) * self.scale)

    def gains(self) -> tuple[Tensor, Tensor]:
        """Gain of each unit, ``[units]``, and where there is one."""
        n, k = self.units, self.width
        blocks = self.inputs.view(n, k, n, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        factors, info = torch.linalg.cholesky_ex(blocks)
        sound = info == 0
        factors = torch.where(sound[:, None, None], factors, torch.eye(k).to(factors))
        shares = torch.linalg.solve_triangular(factors, self.outputs.mT.view(n, k, -1), upper=False)
        return shares.square().sum((1, 2)) * self.scale, sound

    def take(self, unit: int) -> None:
        """Let a unit explain what it can."""
        span = slice(unit * self.width, (unit + 1) * self.width)
        factor = torch.linalg.cholesky(self.inputs[span, span])
        across = torch.linalg.solve_triangular(factor, self.inputs[span], upper=False)
        known = torch.linalg.solve_triangular(factor, self.outputs[:, span].mT, upper=False)
        self.inputs = self.inputs - across.mT @ across
        self.outputs = self.outputs - known.mT @ across


@torch.no_grad()
def select_inputs(readers: Sequence[Reader], *, ridge: float = RIDGE) -> Selection:
    """Order units by greedy forward selection: next comes the one with the largest gain, summed over the readers.

    Args:
        readers: Layers that read the same units, at least one.
        ridge: Added to the variance of every input, as a share of their mean.
    """
    states = [_State(reader, ridge) for reader in readers]
    units = states[0].units
    constant = torch.stack([state.constant for state in states]).all(0)
    open_, order = ~constant, list[int]()
    losses = [sum(state.loss for state in states)]
    while bool(open_.any()):
        found = [state.gains() for state in states]
        usable = open_ & torch.stack([sound for _, sound in found]).all(0)
        if not bool(usable.any()):
            break  # nothing is left that the chosen ones do not explain
        total = torch.stack([gain for gain, _ in found]).sum(0)
        best = int(torch.where(usable, total, -1.0).argmax())
        for state in states:
            state.take(best)
        open_[best] = False
        order.append(best)
        losses.append(max(0.0, losses[-1] - float(total[best])))
    greedy = len(order)
    order += open_.nonzero().flatten().tolist() + constant.nonzero().flatten().tolist()
    losses += [losses[-1]] * (units - greedy)
    return Selection(torch.tensor(order), torch.tensor(losses, dtype=torch.float64) / len(states), greedy)


@torch.no_grad()
def compensate(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    keep: Tensor,
    *,
    ridge: float = RIDGE,
    restore_variance: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for some of the inputs, so that the outputs stay as close as they can to those of all inputs.

    With all inputs they are those that came, exactly. A layer without a bias is compensated by second moments about 0,
    as its mean cannot be corrected.

    Args:
        weight: ``[outputs, m]``.
        bias: ``[outputs]``, or None.
        moments: Of the inputs.
        keep: Which inputs stay, booleans ``[m]``; at least one.
        ridge: Weight of the distance to the old weights, as a share of the mean variance of the inputs.
        restore_variance: Scale each output to the variance it had, for layers followed by a batch norm. Outputs that
            have kept less than 1 % of it stay as they are.

    Returns:
        The weight ``[outputs, inputs that stay]`` and the bias, in float64.
    """
    weight, bias = weight.double(), None if bias is None else bias.double()
    if bool(keep.all()):
        return weight, bias
    covariance = moments.second if bias is None else moments.covariance
    inner = covariance[keep][:, keep]
    factor = _cholesky(inner, _jitter(covariance, ridge))
    missing = weight[:, ~keep] @ covariance[~keep][:, keep]
    new = weight[:, keep] + torch.cholesky_solve(missing.mT, factor).mT
    if restore_variance:
        before = ((weight @ covariance) * weight).sum(1)
        after = ((new @ inner) * new).sum(1)
        factors = torch.where(after > _LOST * before, (before / after).sqrt(), 1.0)
        new = new * factors[:, None]
    if bias is not None:
        bias = bias + weight @ moments.mean - new @ moments.mean[keep]
    return new, bias


@torch.no_grad()
def reconstruction_loss(weight: Tensor, new: Tensor, moments: Moments, keep: Tensor, *, biased: bool = True) -> float:
    """Mean squared error of the outputs, summed over them, when `new` reads the inputs that stay.

    For the compensated weight it is ``tr(W C W^T) - tr(B^T C_SS^-1 B)`` with ``B = C_S,all W^T``, up to the ridge.

    Args:
        weight: The old weight, ``[outputs, m]``.
        new: The new one, ``[outputs, inputs that stay]``.
        moments: Of the inputs.
        keep: Which inputs stay, booleans ``[m]``.
        biased: Whether a bias corrects the mean.
    """
    change = -weight.double()
    change[:, keep] += new.double()
    covariance = moments.covariance if biased else moments.second
    return float(((change @ covariance) * change).sum().clamp(min=0.0))


def _jitter(covariance: Tensor, ridge: float) -> float:
    return max(ridge * float(covariance.diagonal().mean()), 1e-30)


def _cholesky(matrix: Tensor, jitter: float) -> Tensor:
    """Of a covariance with something added to its diagonal: more, if rounding has left it indefinite."""
    eye = torch.eye(len(matrix)).to(matrix)
    for _ in range(20):
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * eye)
        if int(info) == 0:
            return factor
        jitter *= 10.0
    raise ValueError("the moments are no second moments: they are NaN, infinite or far from positive definite.")
