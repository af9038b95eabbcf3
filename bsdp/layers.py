"""The pair of layers that replaces one convolution or linear layer.

One layer with matrix ``M``, ``[groups, out_per_group, fan_in]`` (see `bsdp.plain_layers`), becomes
``M = V diag(sigma) U^T`` per group: ``U^T`` is the `basis` layer, ``V diag(sigma)`` the 1x1 `scaling` layer, and each
column of the latter has one trainable scaling factor ``s = 1 + delta``. Transposed convolutions differ in the order of
the weight's axes only; their `scaling` runs at the output's resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp.plain_layers import (
    GEOMETRY,
    from_matrix,
    is_transposed,
    kind_of,
    layer_groups,
    layer_outputs,
    matrix_of,
    new_layer,
    set_data,
    spatial_dims,
    to_matrix,
    weight_of,
    width_name,
)

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class BasisScalingConv(nn.Module):
    """The second layer of a pair: 1x1 weights back to the output channels, one scaling factor per basis.

    The frozen `weight` is ``V diag(sigma)``, of shape ``[out_channels, rank, 1, ...]`` (``[out_features, rank]`` behind
    a linear layer); with groups it is a grouped 1x1 convolution and `rank` counts per group. `delta`, of shape
    ``[groups * rank]``, is the only parameter that trains by default: the scaling factors are ``1 + delta``, so that
    any weight decay pulls them to 1, where the layer's function is the original one.

    Args:
        out_channels: Output channels (or features) of the pair.
        rank: Basis vectors per group.
        groups: Groups of the original convolution.
        dims: Spatial dimensions, 0 for a linear layer.
    """

    sigma: Tensor

    def __init__(self, out_channels: int, rank: int, *, groups: int = 1, dims: int = 2, **factory: Any) -> None:
        super().__init__()
        self.groups = groups
        self.dims = dims
        shape = (out_channels, rank) + (1,) * dims
        self.weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=False)
        self.delta = nn.Parameter(torch.zeros(groups * rank, **factory))
        self.bias = nn.Parameter(torch.zeros(out_channels, **factory), requires_grad=False)
        self.register_buffer("sigma", torch.ones(groups * rank, **factory))

    @property
    def scale(self) -> Tensor:
        """The scaling factors ``s = 1 + delta``, ``[groups * rank]``."""
        return 1.0 + self.delta

    @property
    def scaled_weight(self) -> Tensor:
        """The 1x1 weights with the factors multiplied in, same shape as `weight`."""
        ones = (1,) * self.dims
        if self.groups == 1:
            return self.weight * self.scale.view(1, -1, *ones)
        grouped = self.weight.view(self.groups, -1, *self.weight.shape[1:])
        return (grouped * self.scale.view(self.groups, 1, -1, *ones)).view_as(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[batch, groups * rank, ...]`` to ``[batch, out_channels, ...]``."""
        if self.dims == 0:
            return F.linear(features, self.scaled_weight, self.bias)
        return _CONVOLVE[self.dims](features, self.scaled_weight, self.bias, groups=self.groups)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        return f"rank={self.weight.shape[1]}, out_channels={self.weight.shape[0]}, groups={self.groups}"


class BasisPair(nn.Module):
    """Stands in the place of one convolution or linear layer: ``scaling(basis(x))``.

    Its state dict has the keys ``basis.weight``, ``scaling.weight``, ``scaling.delta``, ``scaling.bias`` and
    ``scaling.sigma``. Loading a state dict of another rank, smaller or larger, resizes the pair.

    Args:
        layer: The layer to stand in for; only its geometry is read.
        rank: Basis vectors per group; None for the full rank ``min(fan_in, out_per_group)``.

    Attributes:
        whole: Whether the model uses the layer in a way that two plain layers in a row do not offer: it reads the
            weight or bias, or passes more than the input. Such a pair folds to one layer: removing bases saves nothing.
        watched: Whether uses count for `whole` now; `measure_cost` and `describe` set it while they run the model.
        reads: How often the model read the weight in the last run that was watched.
        pair_limit: The largest rank at which it is deployed as two layers, by measured times; None: as its weights say.
    """

    def __init__(self, layer: nn.Module, *, rank: int | None = None) -> None:
        super().__init__()
        self.whole = self.watched = False
        self.reads = 0
        self.pair_limit: int | None = None
        weight, outputs = weight_of(layer), layer_outputs(layer)
        self.groups = layer_groups(layer)
        self.transposed = is_transposed(layer)
        self.out_per_group = outputs // self.groups
        self.fan_in = weight.numel() // outputs
        self.full_rank = min(self.fan_in, self.out_per_group)
        self.had_bias = layer.bias is not None
        self.original_type = kind_of(layer)
        for name in GEOMETRY:
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        rank = self.full_rank if rank is None else rank
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.basis = new_layer(layer, self.groups * rank, bias=False, **factory).requires_grad_(False)
        self.scaling = BasisScalingConv(outputs, rank, groups=self.groups, dims=spatial_dims(layer), **factory)

    @property
    def rank(self) -> int:
        """Basis vectors per group."""
        return self.scaling.weight.shape[1]

    @property
    def scale(self) -> Tensor:
        """The scaling factors, ``[groups * rank]``."""
        return self.scaling.scale

    @property
    def bias(self) -> Tensor:
        """The bias of the pair, ``[out_channels]``; zeros while the original had none and nothing was cut."""
        self.whole = self.whole or self.watched
        return self.scaling.bias

    @property
    def weight(self) -> Tensor:
        """The differentiable product ``V diag(s sigma) U^T`` in the original weight's shape, for code that reads it."""
        if self.watched:
            self.whole = True
            self.reads += 1
        return self._as_weight(self.product)

    @property
    def product(self) -> Tensor:
        """`weight` as ``[groups, out_per_group, fan_in]``."""
        return to_matrix(self.scaling.scaled_weight, self.groups) @ matrix_of(self.basis)

    @property
    def needs_bias(self) -> bool:
        """Whether the folded layer has a bias: the original had one, or a cut moved means into it."""
        return self.had_bias or bool(self.scaling.bias.detach().any())

    def forward(self, inputs: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Apply the pair; the same shapes, and the same further arguments, as the original layer."""
        if self.watched and (arguments or named):
            self.whole = True
        outputs: Tensor = self.scaling(self.basis(inputs, *arguments, **named))
        return outputs

    def keep(self, indices: Tensor) -> None:
        """Remove every basis but those named, keeping the identity of all parameters.

        Args:
            indices: Positions to keep among the ``groups * rank`` bases, ascending, as many in every group.
        """
        local, scaling = self.local_positions(indices), self.scaling
        rows, columns = self.basis_rows(weight_of(self.basis).data, local), self.columns(scaling.weight.data, local)
        indices = indices.to(scaling.delta.device)
        self._assign(rows, columns, scaling.delta.data[indices], scaling.sigma[indices])

    def local_positions(self, indices: Tensor) -> Tensor:
        """Positions among all bases as positions in each group, ``[groups, kept]``.

        Raises:
            ValueError: If they are not ascending, or not as many in every group.
        """
        rank, groups = self.rank, self.groups
        first = rank * torch.arange(groups, device=indices.device)[:, None]
        if indices.numel() == 0 or indices.numel() % groups or (indices.diff() <= 0).any():
            raise ValueError(f"`indices` must be ascending and keep at least one basis in each of the {groups} groups.")
        local = indices.view(groups, -1) - first
        if (local < 0).any() or (local >= rank).any():
            raise ValueError(f"`indices` must keep equally many of the {rank} bases in each of the {groups} groups.")
        return local

    def basis_rows(self, weight: Tensor, local: Tensor) -> Tensor:
        """The part of the basis layer's weight, or of a tensor of that shape, that belongs to some bases.

        Args:
            weight: As the weight is before a cut.
            local: From `local_positions`.
        """
        matrix = to_matrix(weight, self.groups, transposed=self.transposed)
        local = local.to(weight.device)
        return self._as_weight(matrix.gather(1, local[:, :, None].expand(-1, -1, self.fan_in)))

    def columns(self, weight: Tensor, local: Tensor) -> Tensor:
        """As `basis_rows`, of the 1x1 layer's weight."""
        grouped = weight.view(self.groups, self.out_per_group, -1)
        index = local.to(weight.device)[:, None, :].expand(-1, self.out_per_group, -1)
        return grouped.gather(2, index).reshape(weight.shape[0], -1, *weight.shape[2:])

    @torch.no_grad()
    def set_factors(self, basis: Tensor, coefficients: Tensor, sigma: Tensor) -> None:
        """Write factors of the present rank, with all scaling factors at 1.

        Args:
            basis: ``[groups, rank, fan_in]``.
            coefficients: ``[groups, out_per_group, rank]``.
            sigma: ``[groups, rank]``.
        """
        weight_of(self.basis).copy_(self._as_weight(basis))
        self.scaling.weight.copy_(coefficients.reshape(self.scaling.weight.shape))
        self.scaling.sigma.copy_(sigma.flatten())
        self.scaling.delta.zero_()

    def resize(self, rank: int) -> None:
        """Allocate another rank, smaller or larger; the values are undefined until a state dict is loaded."""
        if not 1 <= rank <= self.full_rank:
            raise ValueError(f"a rank must be between 1 and the full rank {self.full_rank}, got {rank}.")
        scaling, basis = self.scaling, weight_of(self.basis).data
        total = self.groups * rank
        self._assign(
            self._as_weight(basis.new_zeros(self.groups, rank, self.fan_in)),
            scaling.weight.data.new_zeros(scaling.weight.shape[0], rank, *scaling.weight.shape[2:]),
            scaling.delta.data.new_zeros(total),
            scaling.sigma.new_ones(total),
        )

    def set_widths(self, inputs: int, outputs: int, rank: int) -> None:
        """Allocate other numbers of channels (or features) and another rank; all values but the bias are undefined.

        The bias keeps its identity, and its values where the number of outputs stays.
        """
        linear = self.original_type is nn.Linear
        for name, width in zip(
            ("in_features", "out_features") if linear else ("in_channels", "out_channels"),
            (inputs, outputs),
            strict=True,
        ):
            setattr(self, name, width)
        setattr(self.basis, "in_features" if linear else "in_channels", inputs)
        self.fan_in = inputs // self.groups * math.prod(weight_of(self.basis).shape[2:])
        self.out_per_group = outputs // self.groups
        self.full_rank = min(self.fan_in, self.out_per_group)
        scaling = self.scaling
        if outputs != len(scaling.bias):
            set_data(scaling.bias, scaling.bias.data.new_zeros(outputs))
            scaling.weight.data = scaling.weight.data.new_empty(outputs, *scaling.weight.shape[1:])
        self.resize(rank)

    def _assign(self, basis: Tensor, weight: Tensor, delta: Tensor, sigma: Tensor) -> None:
        targets = (weight_of(self.basis), self.scaling.weight, self.scaling.delta)
        for target, value in zip(targets, (basis, weight, delta), strict=True):
            set_data(target, value)
        self.scaling.sigma = sigma.contiguous()
        setattr(self.basis, width_name(self.original_type), delta.numel())

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return from_matrix(matrix, weight_of(self.basis).shape[2:], transposed=self.transposed)

    def follow_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Take the rank of a state dict that is loaded next; this pair's names in it begin with `prefix`."""
        incoming = state_dict.get(f"{prefix}scaling.weight")
        if isinstance(incoming, Tensor) and incoming.dim() == self.scaling.weight.dim():
            rank = int(incoming.shape[1])
            if rank != self.rank and 1 <= rank <= self.full_rank:
                self.resize(rank)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Runs before the children load, so that a checkpoint of another rank fits without knowing any structure.
        self.follow_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Show the rank in ``print(model)``."""
        return f"rank={self.rank}, full_rank={self.full_rank}"


def column_matrix(pair: BasisPair) -> Tensor:
    """The 1x1 weights with the factors multiplied in, ``[groups, out_per_group, rank]``."""
    return pair.scaling.scaled_weight.detach().view(pair.groups, pair.out_per_group, pair.rank)


def named_pairs(model: nn.Module) -> dict[str, BasisPair]:
    """All pairs of a model by dotted name, in module order; a shared pair once, under its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BasisPair)}


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Note in `BasisPair.whole` how a model that runs inside the ``with`` block uses its pairs."""
    pairs = [pair for pair in modules if isinstance(pair, BasisPair)]
    for pair in pairs:
        pair.watched, pair.reads = True, 0
    try:
        yield
    finally:
        for pair in pairs:
            pair.watched = False
