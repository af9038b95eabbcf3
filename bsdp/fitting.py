"""Whether tensors of unknown origin fit a model: told by names, shapes, types and values, before the model changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import parameter

from bsdp.cost import layer_cost
from bsdp.plain_layers import new_layer
from bsdp.reading import shown
from bsdp.surgery import module_names


def meta_layer(layer: nn.Module) -> nn.Module:
    """The plain layer of a layer's (or pair's original) geometry on the meta device: sizes without memory."""
    options: dict[str, Any] = {"device": torch.device("meta"), "dtype": next(layer.parameters()).dtype}
    cost = layer_cost(layer)
    return new_layer(layer, cost.out_channels, bias=cost.bias, **options)


def expected_state(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> dict[str, Any]:
    """The state dict that a model will have, without changing it.

    Args:
        model: The model.
        replacements: What will stand in the place of some of its modules; meta tensors will do.

    Returns:
        Names and tensors; those under several names are the same objects.
    """
    everywhere = module_names(model)
    named = {name: new for old, new in replacements.items() for name in everywhere[old]}
    prefixes = tuple(f"{name}." if name else "" for name in named)
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.startswith(prefixes)}
    for name, new in named.items():
        state.update(new.state_dict(keep_vars=True, prefix=f"{name}." if name else ""))
    return state


def check_names_and_shapes(
    expected: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, path: object, strict: bool = True
) -> None:
    """Refuse a file whose tensors do not fit, by their names and shapes alone.

    Args:
        expected: From `expected_state`.
        shapes: Shape of every tensor of the file.
        path: The file, for the error.
        strict: Whether the names must be the same.
    """
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if strict and (missing or extra):
        raise ValueError(
            f"{path} does not fit the model: it lacks {shown(missing[:3])} and has unknown {shown(extra[:3])}; "
            "pass the original architecture."
        )
    for key, shape in shapes.items():
        own = expected.get(key)
        if isinstance(own, Tensor) and not parameter.is_lazy(own) and shape != tuple(own.shape):
            raise ValueError(
                f"{path} does not fit the model: {key!r} has shape {shown(shape)}, the model needs "
                f"{tuple(own.shape)}; pass the original architecture with the same number of classes."
            )


def check_names(expected: Mapping[str, Any], state: Mapping[str, Any], *, path: object, strict: bool = True) -> None:
    """`check_names_and_shapes` of tensors that are in memory; what is no tensor is compared by its name alone."""
    for key, value in state.items():
        if isinstance(expected.get(key), Tensor):
            _refuse_odd(key, value, path)
    shapes = {key: tuple(value.shape) if is_ordinary(value) else () for key, value in state.items()}
    check_names_and_shapes(expected, shapes, path=path, strict=strict)


def check_values(expected: Mapping[str, Any], tensors: Mapping[str, Tensor], *, path: object) -> None:
    """Refuse tensors that the model's cannot be copied from: of another kind, NaN, infinite, or tied but different.

    Floating-point tensors may be of another precision, for loading converts them to the model's, if their values
    remain finite. Every other type must be the model's own. Infinity is allowed where the model has the same now (the
    masks of attention are kept like that).

    Args:
        expected: From `expected_state`; names that are not in it are skipped.
        tensors: The file's tensors, of the expected shapes.
        path: The file, for the error.
    """
    first: dict[int, str] = {}
    for key, value in tensors.items():
        own = expected.get(key)
        if not isinstance(own, Tensor):
            continue
        check_tensor(key, value, own, path=path)
        twin = first.setdefault(id(own), key)
        if twin != key and not torch.equal(value, tensors[twin]):
            raise ValueError(
                f"{path} does not fit the model: {twin!r} and {key!r} are one tensor there, but differ here."
            )


def check_tensor(key: str, value: Tensor, own: Tensor, *, path: object) -> None:
    """Refuse one tensor, see `check_values`."""
    floating = value.is_floating_point() and own.is_floating_point()
    if value.dtype != own.dtype and not floating:
        raise ValueError(f"{path} does not fit the model: {key!r} is {value.dtype}, the model needs {own.dtype}.")
    if not floating and not value.is_complex():
        return
    try:
        converted = value.detach().to(own.dtype)
        wide = converted if converted.element_size() > 1 else converted.float()  # 8-bit floats have few operations
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} does not fit the model: {key!r} is {value.dtype}, not {own.dtype}.") from error
    if not wide.isfinite().all() and (own.is_meta or not torch.equal(own.detach().cpu(), converted.cpu())):
        precision = "" if value.dtype == own.dtype else f" (in {own.dtype}, which the model has)"
        raise ValueError(f"{path} holds NaN or infinity in {key!r}{precision}; take a file from before it diverged.")


def _refuse_odd(key: str, value: object, path: object) -> None:
    if not is_ordinary(value):
        raise ValueError(f"{path} does not fit the model: {key!r} is not an ordinary dense tensor.")


def is_ordinary(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor with values, of no subclass: what weights are made of."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized
