"""How much a channel matters: the formulas, each for the units of one group (see `bsdp.channel_group`).

Scores are non-negative; higher means keep. Removing a unit means that every layer that reads it ignores it, so the
first-order change of the loss is the sum of ``x * dL/dx`` over its readers, examples and positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bsdp._checks import check_choice
from bsdp.channel_group import ChannelGroup
from bsdp.factorize import to_float64
from bsdp.layers import BasisPair
from bsdp.plain_layers import is_transposed, layer_groups, matrix_of, weight_of

NORMALIZATIONS = ("auto", "none", "l2", "mean")
_AUTO = {"taylor_2016": "l2", "l1": "mean", "l2": "mean", "fpgm": "mean"}


def reader_terms(layer: nn.Module) -> Tensor:
    """``sum of x * dL/dx`` per input channel of a plain layer, from the gradient of its weight.

    RECONSTRUCTED: the output is linear in ``x`` and in the weight, so scaling an input channel and scaling the weights
    that meet it are the same, and the sum over batch and positions equals ``sum of w * dL/dw`` over those weights.

    Args:
        layer: A convolution, transposed convolution or linear layer with ``weight.grad`` in place.

    Returns:
        ``[input channels]``, in float32 at least.
    """
    weight = weight_of(layer)
    assert weight.grad is not None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    product = weight.detach().to(dtype) * weight.grad.to(dtype)
    if is_transposed(layer):
        return product.flatten(1).sum(1)
    groups = layer_groups(layer)
    grouped = product.reshape(groups, product.shape[0] // groups, product.shape[1], -1)
    return grouped.sum((1, 3)).flatten()


def taylor_2019(terms: Tensor) -> Tensor:
    """Squared first-order change of the loss in one minibatch (Molchanov et al., CVPR 2019).

    CODE: the square per minibatch, averaged over minibatches since the last pruning. RECONSTRUCTED: the term of a group
    is the sum over its readers, as the gradient of one gate that all of them share.

    Args:
        terms: Signed sums of ``x * dL/dx`` over readers, examples and positions, ``[units]``.
    """
    return terms.square()


def taylor_2016(terms: Tensor) -> Tensor:
    """Absolute first-order change per example, summed over the examples of a batch (Molchanov et al., 1611.06440).

    PUBLISHED: ``|mean over positions of a * dC/da|`` per example, averaged over the examples, then divided by the l2
    norm of the layer. The loss of a batch is taken to be the mean over its examples, so each gradient holds the factor
    ``1 / examples`` already and the sum here is the average. RECONSTRUCTED: a group's term is the sum over its readers.

    Args:
        terms: Means over positions of ``x * dL/dx``, ``[examples, units]``.
    """
    return terms.abs().sum(0)


def unit_filters(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The weights that make each unit, of all layers that write to the group side by side, ``[units, weights]``.

    Depthwise convolutions only pass channels on and are left out, but where nothing else makes the channels. The weight
    of a pair is its product.
    """
    parts = []
    for member in list(group.sides("out")) or group.sides("both"):
        layer = model.get_submodule(member.layer)
        matrix = layer.product if isinstance(layer, BasisPair) else matrix_of(layer)
        rows = to_float64(matrix.detach()).flatten(0, 1)  # [output channels, fan in]
        parts.append(rows[member.index.to(rows.device)].flatten(1))
    return torch.cat(parts, 1)


def l1(filters: Tensor) -> Tensor:
    """Sum of absolute weights of each unit (Li et al., arXiv 1608.08710; biases do not count).

    Args:
        filters: From `unit_filters`, ``[units, weights]``.
    """
    return filters.abs().sum(1)


def l2(filters: Tensor) -> Tensor:
    """Euclidean norm of each unit's weights; `filters` as in `l1`."""
    return torch.linalg.vector_norm(filters, dim=1)  # type: ignore[no-any-return]


def fpgm(filters: Tensor) -> Tensor:
    """Sum of distances to the other units: small for one that others can stand in for.

    PUBLISHED: filter pruning via the geometric median (He et al., arXiv 1811.00250), Euclidean distances.
    RECONSTRUCTED: a unit that several layers make is one point, its filters side by side.

    Args:
        filters: From `unit_filters`, ``[units, weights]``.
    """
    return torch.cdist(filters, filters).sum(1)


def bn_scale(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """Mean absolute scale of the batch norms that each unit passes, ``[units]``; None where there is none.

    PUBLISHED: network slimming (Liu et al., arXiv 1708.06519) ranks by the scale of the batch norm behind a
    convolution. RECONSTRUCTED: several batch norms of a group count equally.
    """
    scales = []
    for member in group.members:
        weight = model.get_submodule(member.layer).weight if member.batch_norm else None
        if isinstance(weight, Tensor):
            scales.append(weight.detach().float().abs()[member.index.to(weight.device)].mean(1))
    return torch.stack(scales).mean(0) if scales else None


_FILTER_NORMS = {"l1": l1, "l2": l2, "fpgm": fpgm}
DATA_FREE = (*_FILTER_NORMS, "bn_scale")


def data_free_scores(model: nn.Module, groups: Mapping[str, ChannelGroup], criterion: str) -> dict[str, Tensor]:
    """Scores by one of `DATA_FREE`, ``{group name: [units]}``; groups without batch norm have no ``"bn_scale"``."""
    if criterion == "bn_scale":
        scales = {name: bn_scale(model, group) for name, group in groups.items()}
        return {name: scale for name, scale in scales.items() if scale is not None}
    norm = _FILTER_NORMS[criterion]
    return {name: norm(unit_filters(model, group)) for name, group in groups.items()}


def normalize_scores(scores: Tensor, how: str, *, criterion: str) -> Tensor:
    """Make the scores of groups comparable.

    Args:
        scores: Of one group, ``[units]``.
        how: ``"none"``, ``"l2"`` (unit norm), ``"mean"`` (mean 1) or ``"auto"``: what suits `criterion`, l2 for
            taylor_2016 as published, the mean for norms of weights, nothing for the rest.
        criterion: One of `bsdp.channel_importance.CRITERIA`.
    """
    check_choice("normalize", how, NORMALIZATIONS)
    how = _AUTO.get(criterion, "none") if how == "auto" else how
    if how == "none":
        return scores
    size = torch.linalg.vector_norm(scores) if how == "l2" else scores.mean()
    return torch.where(size > 0, scores / size, scores)  # all zeros stay zeros


def kept_by_cumsum(statistics: Tensor | Sequence[float], theta: float) -> int:
    """How many of the largest statistics hold the share `theta` of their sum (Zhong et al., arXiv 1810.01104).

    RECONSTRUCTED: the paper names the cumulative sum of activation statistics; its formula is not readable.

    Args:
        statistics: Non-negative, such as mean activations, ``[units]``.
        theta: Share to keep, in (0, 1].

    Returns:
        A number between 1 and ``units``. Units whose statistic is 0 are never among them, but for one if all are.

    Raises:
        ValueError: If `theta` or `statistics` is not allowed.
    """
    if not 0.0 < theta <= 1.0:
        raise ValueError(f"`theta` is the share of the sum to keep and must be in (0, 1], got {theta!r}.")
    values = torch.as_tensor(statistics).detach().cpu().double()
    if values.dim() != 1 or not len(values) or not (values.isfinite() & (values >= 0)).all():
        raise ValueError("`statistics` must be a vector of finite non-negative values, one per unit.")
    cumulative = values.sort(descending=True).values.cumsum(0)
    # Sums of equal values land a rounding error beside theta.
    return int(torch.searchsorted(cumulative, theta * cumulative[-1] * (1 - 1e-12))) + 1


def redundancy(statistics: Tensor | Sequence[float], theta: float) -> float:
    """Share of the units that are not needed for `theta` of the sum, ``1 - kept / units``; see `kept_by_cumsum`."""
    return 1.0 - kept_by_cumsum(statistics, theta) / len(statistics)
