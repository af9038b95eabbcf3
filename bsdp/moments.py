"""Means and second moments of what comes out of layers, or of the gradients there, and how sure they are.

Layout: what one layer puts out is brought to ``[examples, positions, channels]``; moments run over examples and
positions alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bsdp.factorize import to_float64
from bsdp.layers import BasisPair
from bsdp.plain_layers import layer_groups, layer_outputs, spatial_dims, weight_of

_LARGEST = 2**24  # elements of an intermediate result


@dataclass(frozen=True)
class LayerMoment:
    """Moments of one layer's outputs (before the bias) or output gradients; float64.

    Attributes:
        second: ``E[y y^T]``, ``[channels, channels]``.
        mean: ``E[y]``, ``[channels]``.
        count: Columns y that were seen: examples times positions.
        spread: Expected squared error, in the Frobenius norm, of each group's block of `second`, ``[groups]``. It comes
            from the differences between examples, as positions of one example are far from independent.
    """

    second: Tensor
    mean: Tensor
    count: int
    spread: Tensor

    @property
    def covariance(self) -> Tensor:
        """``E[(y - E[y]) (y - E[y])^T]``, ``[channels, channels]``."""
        return self.second - torch.outer(self.mean, self.mean)


class LayerMoments:
    """Running sums of which `LayerMoment` is made.

    Args:
        layers: Pairs or plain convolution and linear layers, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._names = {layer: name for name, layer in layers.items()}
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, layer: nn.Module, columns: Tensor) -> None:
        """Add one batch, ``[examples, positions, channels]``."""
        flat = columns.flatten(0, 1)
        if not len(flat):
            return
        counts = torch.tensor([len(flat), len(columns)], device=flat.device)
        sums = [counts, flat.T @ flat, flat.sum(0), squared_norms(columns, layer_groups(layer)).sum(0)]
        self._add(self._names[layer], [to_float64(value) for value in sums])

    def _add(self, name: str, sums: list[Tensor]) -> None:
        if name in self._sums:
            sums = [old + new for old, new in zip(self._sums[name], sums, strict=True)]
        self._sums[name] = sums

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace all sums by their mean over processes."""
        for name, layer in self.layers.items():
            # A process that saw no batch of a layer joins with zeros: all must make the same calls.
            outputs, groups = layer_outputs(layer), layer_groups(layer)
            sizes = ((2,), (outputs, outputs), (outputs,), (groups,))
            like = to_float64(weight_of(layer.basis if isinstance(layer, BasisPair) else layer).detach())
            self._add(name, [like.new_zeros(size) for size in sizes])
            self._sums[name] = [reduce(value) for value in self._sums[name]]

    def compute(self) -> dict[str, LayerMoment]:
        """The moments by name; layers that were never called are left out."""
        return {n: _moment(sums, layer_groups(self.layers[n])) for n, sums in self._sums.items() if sums[0][1] > 0}


def _moment(sums: list[Tensor], groups: int) -> LayerMoment:
    (count, examples), second, total, norms = sums
    second = second / count
    blocks = second.view(groups, len(second) // groups, groups, -1).diagonal(dim1=0, dim2=2)
    norm = blocks.square().sum((0, 1))
    # The variance of the mean of the examples' own moments; of a single example nothing can be said.
    spread = (norms / examples - norm).clamp_min(0) / (examples - 1) if examples > 1 else norm
    return LayerMoment(second, total / count, round(float(count)), spread)


def squared_norms(columns: Tensor, groups: int) -> Tensor:
    """Squared Frobenius norms of each example's own second moment.

    Args:
        columns: ``[examples, positions, channels]``.
        groups: Groups of channels.

    Returns:
        ``[examples, groups]``.
    """
    examples, positions, channels = columns.shape
    rows = (columns / positions**0.5).view(examples, positions, groups, -1).transpose(1, 2).flatten(0, 1)
    small = rows if positions < channels // groups else rows.mT  # Y^T Y and Y Y^T have the same norm
    chunks = small.split(max(1, _LARGEST // small.shape[1] ** 2))
    return torch.cat([(part @ part.mT).square().sum((1, 2)) for part in chunks]).view(examples, groups)


def as_columns(layer: nn.Module, values: Tensor) -> Tensor:
    """Bring outputs of a layer, or gradients of that shape, to ``[examples, positions, channels]``.

    Args:
        layer: A pair or plain layer.
        values: ``[batch, channels, ...]``, ``[..., features]`` for a linear layer, with or without a batch axis.

    Returns:
        In float32 at least.
    """
    dims = layer.scaling.dims if isinstance(layer, BasisPair) else spatial_dims(layer)
    values = values.detach()
    if dims == 0:
        values = values.reshape(values.shape[0] if values.dim() > 1 else 1, -1, values.shape[-1])
    else:
        values = (values if values.dim() == dims + 2 else values.unsqueeze(0)).flatten(2).mT
    return values.to(torch.promote_types(values.dtype, torch.float32))
