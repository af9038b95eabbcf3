"""Plain layers that compute the same as layers with code of their own: standardised, normed or parametrized weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bsdp.plain_layers import (
    SUPPORTED_TYPES,
    is_transposed,
    layer_outputs,
    new_layer,
    plain_type,
    spatial_dims,
    weight_of,
)
from bsdp.probing import evaluating

_CHUNK = 64  # output channels whose filters are read off at once
_TOLERANCE = 1e-5  # relative; some layers compute their weights in float32


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's own types, with a weight of its own and no `forward` put on the instance."""
    return type(layer) in SUPPORTED_TYPES and not parametrize.is_parametrized(layer) and "forward" not in layer.__dict__


def plain_equivalent(layer: nn.Module) -> nn.Module | None:
    """Find the plain layer that computes the same function as a layer of a derived type.

    The layer is run on a few random inputs, in both modes, and compared. Weight standardisation, weight norm and
    converged spectral norm have an equivalent, for their weights do not depend on the input; padding that depends on
    the input's size, noise, or anything that is not linear has none.

    Args:
        layer: A layer derived from one of `SUPPORTED_TYPES`; it is not changed.

    Returns:
        A new layer with the same dtype and device, or None.
    """
    kind = plain_type(type(layer))
    if kind is None or type(layer).__module__.startswith("torch.ao."):  # fake quantisation wants to go on observing
        return None
    if any(not isinstance(child, nn.ModuleDict) for child in layer.children()):
        return None  # adapters and the like
    try:
        exact = copy.deepcopy(layer).cpu().double()
        with evaluating(exact):
            return _found(layer, exact)
    except Exception:  # whatever foreign code raises on inputs it does not expect
        return None


def idle_parameter(layer: nn.Module) -> str | None:
    """Find a parameter that a layer of a derived type has beside weight and bias, and that does nothing yet.

    Adapters begin as zeros, or switched off. The layer then computes what a plain one does, in whose form they are
    lost.

    Args:
        layer: As in `plain_equivalent`; it is not changed.

    Returns:
        The name of the first one that is all zero, or whose change does not change the outputs; None if there is none.
    """
    names = [name for name, _ in layer.named_parameters() if not _is_weight(name)]
    idle = next((name for name in names if not layer.get_parameter(name).any()), None)
    if idle is not None or not names:
        return idle
    try:
        exact = copy.deepcopy(layer).cpu().double()
        with evaluating(exact):
            return next((name for name in names if not _matters(exact, name)), None)
    except Exception:  # as above; such a layer has no equivalent
        return None


def _is_weight(name: str) -> bool:
    """Tell weights and biases, and what weights are computed from where they are parametrized, from all else."""
    parents, _, last = name.rpartition(".")
    return name in ("weight", "bias") or (parents.startswith("parametrizations.") and last.startswith("original"))


def _matters(exact: nn.Module, name: str) -> bool:
    parameter, inputs = exact.get_parameter(name), _inputs(exact, batch=2, more=0)
    value, before = parameter.clone(), exact(inputs)
    parameter.add_(torch.randn_like(parameter))
    after = exact(inputs)
    parameter.copy_(value)
    return not torch.equal(before, after)


def _found(layer: nn.Module, exact: nn.Module) -> nn.Module | None:
    plain = new_layer(exact, layer_outputs(exact), bias=exact.bias is not None, dtype=torch.float64)
    if isinstance(exact.bias, Tensor) and isinstance(plain.bias, Tensor):
        plain.bias.copy_(exact.bias)
    weight_of(plain).copy_(weight_of(exact))
    if not _same(plain, exact):
        if is_transposed(exact):
            return None
        weight_of(plain).copy_(_weight_seen(plain, exact))
        if not _same(plain, exact):
            return None
    weight = weight_of(layer)
    return plain.to(device=weight.device, dtype=weight.dtype).train(layer.training)


def _same(plain: nn.Module, exact: nn.Module) -> bool:
    """Compare on inputs of two sizes, since padding may depend on it, and three scales, in both modes."""
    for training, more, scale in ((False, 0, 1.0), (True, 1, 1e3), (True, 0, 1e-3)):
        exact.train(training)
        inputs = scale * _inputs(plain, batch=2, more=more)
        expected, actual = exact(inputs), plain(inputs)
        if expected.shape != actual.shape or not (expected - actual).norm() <= _TOLERANCE * expected.norm():
            return False
    exact.eval()
    return True


def _weight_seen(plain: nn.Module, exact: nn.Module) -> Tensor:
    """Read the weights that a linear layer applies from the gradients of one output position.

    A plain layer whose weights are the numbers 1, 2, ... tells which entry of the gradient is which weight.
    """
    numbers = copy.deepcopy(plain)
    weight = weight_of(numbers)
    fan_in, outputs = weight[0].numel(), weight.shape[0]
    weight.copy_(torch.arange(1, fan_in + 1, dtype=weight.dtype).view(1, *weight.shape[1:]).expand_as(weight))
    rows = []
    for first in range(0, outputs, _CHUNK):
        chosen = torch.arange(first, min(first + _CHUNK, outputs))
        places = _gradient(numbers, chosen).round().long().flatten(1)
        seen = torch.zeros(len(chosen), fan_in + 1, dtype=torch.float64)
        rows.append(seen.scatter_(1, places, _gradient(exact, chosen).flatten(1))[:, 1:])
    return torch.cat(rows).view_as(weight)


def _gradient(layer: nn.Module, chosen: Tensor) -> Tensor:
    """Gradient of output ``chosen[i]`` at the middle position by the i-th input, ``[chosen, in, ...]``."""
    inputs = _inputs(layer, batch=len(chosen), more=0)
    with torch.enable_grad():
        inputs.requires_grad_(True)
        outputs = layer(inputs)
        middle = tuple(size // 2 for size in outputs.shape[2:])
        total = outputs[(torch.arange(len(chosen)), chosen, *middle)].sum()
        return torch.autograd.grad(total, inputs)[0]


def _inputs(layer: nn.Module, *, batch: int, more: int) -> Tensor:
    """Random inputs, large enough for a position that no padding touches."""
    if spatial_dims(layer) == 0:
        return torch.randn(batch, int(layer.in_features), dtype=torch.float64)  # type: ignore[arg-type]
    sizes = []
    geometry = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)  # type: ignore[arg-type]
    for kernel, dilation, stride in geometry:
        field = dilation * (kernel - 1) + 1
        sizes.append(3 * math.ceil(field / stride) * stride + more)
    return torch.randn(batch, int(layer.in_channels), *sizes, dtype=torch.float64)  # type: ignore[arg-type]
