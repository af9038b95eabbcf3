"""Convolutions and linear layers: their sizes, their weights as matrices, and new ones like them.

A weight as a matrix is ``[groups, out_per_group, fan_in]``, where `fan_in` counts the inputs of one filter
(``in_channels / groups * kernel positions``). Whatever takes a layer here takes a `bsdp.BasisPair`, too, which has the
geometry of the layer that it stands in for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CONV_TYPES: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_TYPES: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SUPPORTED_TYPES: tuple[type[nn.Module], ...] = (*CONV_TYPES, *TRANSPOSED_TYPES, nn.Linear)

_CONV_GEOMETRY = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
GEOMETRY = (*_CONV_GEOMETRY, "output_padding", "transposed", "out_channels", "in_features", "out_features")


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer, or the product of a pair."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def layer_groups(layer: nn.Module) -> int:
    """Number of groups of a convolution; 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def layer_inputs(layer: nn.Module) -> int:
    """Input channels or features of a layer or pair."""
    return int(getattr(layer, "in_features" if hasattr(layer, "in_features") else "in_channels"))


def layer_outputs(layer: nn.Module) -> int:
    """Output channels or features of a layer or pair."""
    return int(getattr(layer, "out_features" if hasattr(layer, "out_features") else "out_channels"))


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution through which channels pass one by one."""
    groups = layer_groups(module)
    return groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer or pair is a transposed convolution."""
    return bool(getattr(layer, "transposed", False))


def spatial_dims(layer: nn.Module) -> int:
    """Spatial dimensions of a layer: 1 to 3 for a convolution, 0 for a linear layer."""
    return weight_of(layer).dim() - 2


def new_layer(
    like: nn.Module,
    outputs: int,
    *,
    bias: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    **sizes: int,
) -> nn.Module:
    """A layer with the geometry of another one (or of a pair's original), its own number of outputs and no values.

    Args:
        like: The other layer.
        outputs: Output channels or features.
        bias: Whether it has a bias.
        device: Where its parameters are.
        dtype: Of what type they are.
        **sizes: What else differs: ``in_channels``, ``in_features`` or ``groups``.
    """
    kind = kind_of(like)
    names = ("in_features",) if kind is nn.Linear else _CONV_GEOMETRY
    geometry = {name: getattr(like, name) for name in names} | sizes
    if is_transposed(like):
        geometry["output_padding"] = like.output_padding
    layer = _empty(kind, device, **geometry, **{width_name(kind): outputs}, bias=bias, dtype=dtype)
    seen: Any = like.basis if hasattr(like, "original_type") else like
    weight_of(layer).data = weight_of(layer).data.contiguous(memory_format=memory_format_of(weight_of(seen)))
    return layer


def new_pointwise(
    like: nn.Module,
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A 1x1 layer of the same kind (not transposed) and groups, without values."""
    kind = kind_of(like)
    if kind is nn.Linear:
        return _empty(kind, device, in_features=inputs, out_features=outputs, bias=bias, dtype=dtype)
    if kind in TRANSPOSED_TYPES:
        kind = CONV_TYPES[TRANSPOSED_TYPES.index(kind)]
    sizes = {"in_channels": inputs, "out_channels": outputs, "kernel_size": 1, "groups": layer_groups(like)}
    return _empty(kind, device, **sizes, bias=bias, dtype=dtype)


def _empty(kind: Callable[..., nn.Module], device: torch.device | None, **arguments: Any) -> nn.Module:
    # Born on the meta device: an initialisation that nobody reads would cost time and move the global random state.
    layer = kind(**arguments, device="meta")
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=device, dtype=parameter.dtype)))
    return layer


def plain_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The type among `SUPPORTED_TYPES` that a type is or derives from."""
    return next((base for base in kind.__mro__ if base in SUPPORTED_TYPES), None)


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The type among `SUPPORTED_TYPES` that a layer has, or that a pair stands in for."""
    kind: type[nn.Module] | None = getattr(layer, "original_type", None) or plain_type(type(layer))
    assert kind is not None
    return kind


def width_name(kind: type[nn.Module]) -> str:
    """The attribute that holds the number of outputs of layers of a type."""
    return "out_features" if kind is nn.Linear else "out_channels"


def to_matrix(weight: Tensor, groups: int, *, transposed: bool = False) -> Tensor:
    """Bring a weight to ``[groups, out_per_group, fan_in]``.

    Args:
        weight: ``[out, in / groups, *kernel]``; ``[in, out / groups, *kernel]`` of a transposed convolution.
        groups: Groups of the convolution.
        transposed: Which of the two it is.
    """
    if transposed:
        outputs = weight.shape[1]
        grouped = weight.reshape(groups, weight.shape[0] // groups, outputs, -1)
        return grouped.transpose(1, 2).reshape(groups, outputs, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(matrix: Tensor, kernel: tuple[int, ...], *, transposed: bool = False) -> Tensor:
    """The inverse of `to_matrix`.

    Args:
        matrix: ``[groups, out_per_group, fan_in]``.
        kernel: Kernel size; empty for a linear layer.
        transposed: As there.
    """
    groups, outputs, fan_in = matrix.shape
    inputs = fan_in // math.prod(kernel)
    if transposed:
        grouped = matrix.reshape(groups, outputs, inputs, -1).transpose(1, 2)
        return grouped.reshape(groups * inputs, outputs, *kernel)
    return matrix.reshape(groups * outputs, inputs, *kernel)


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight of a plain layer as ``[groups, out_per_group, fan_in]``."""
    return to_matrix(weight_of(layer), layer_groups(layer), transposed=is_transposed(layer))


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """``channels_last`` (or that of three dimensions) where a tensor is laid out so and not otherwise, else contiguous.

    Where both are true, as of 1x1 weights, it makes no difference.
    """
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if form is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=form):
        return torch.contiguous_format
    return form


def set_data(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter data of another shape, keeping its identity and its memory format."""
    value = value.contiguous(memory_format=memory_format_of(parameter))
    parameter.grad = None
    # A loss that the caller still holds keeps the parameter's gradient accumulator alive, which remembers the old shape
    # and makes the next backward fail. Torch renews it on a change of dtype only, hence this step in between.
    other = torch.float16 if value.dtype != torch.float16 else torch.float32
    parameter.data = value.new_empty(0, dtype=other)
    parameter.data = value
