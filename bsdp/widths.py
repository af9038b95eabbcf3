"""The widths of a model whose channels were pruned, as plain values, and giving them to another one.

Every module that lost channels keeps its original sizes in a mark, from which `widths_of` and reports read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bsdp.layers import BasisPair
from bsdp.plain_layers import set_data, weight_of

_MARK = "_original_widths"


def widths_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Sizes of all modules that lost channels, as values that JSON and ``weights_only=True`` can hold.

    Returns:
        ``{module name: {"attributes": {name: size}, "shapes": {tensor name: sizes}}}`` with every name of a module.
    """
    return {
        name: _sizes(module, vars(module)[_MARK])
        for name, module in model.named_modules(remove_duplicate=False)
        if _MARK in vars(module)
    }


def original_widths(module: nn.Module) -> dict[str, Any] | None:
    """Sizes of a module before it lost channels, in the form of `widths_of`; None if it never did."""
    return vars(module).get(_MARK)


def set_widths(model: nn.Module, widths: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a model the sizes that `widths_of` told of another one, in place; tensors that change are undefined.

    Modules that lost channels here but not there get their original sizes back.

    Args:
        model: The original architecture, or one that lost channels; plain or decomposed.
        widths: From `widths_of`.

    Raises:
        ValueError: If they do not fit the model, which is then as it was.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    check_widths(model, widths)
    wanted = {modules[name]: entry for name, entry in widths.items()}
    for module in list(modules.values()):
        original = original_widths(module)
        if module in wanted:
            mark_widths(module)
            _resize(module, wanted[module])
        elif original is not None:
            _resize(module, original)
            del vars(module)[_MARK]


def check_widths(model: nn.Module, widths: object) -> None:
    """Refuse widths that do not fit a model, see `set_widths`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(widths, Mapping):
        raise ValueError("the saved structure has a table `widths` that is none.")
    for name, entry in widths.items():
        module = modules.get(name) if isinstance(name, str) else None
        if module is None:
            raise ValueError(
                f"the saved structure has widths of {str(name)[:60]!r}, which the model does not have: build the same "
                "architecture that was pruned."
            )
        if not isinstance(entry, Mapping) or not _fits(entry, original_widths(module) or _own_sizes(module)):
            raise ValueError(
                f"the saved structure has widths of {name!r} that do not fit its {type(module).__name__}: build the "
                "same architecture that was pruned."
            )


def _fits(entry: Mapping[str, Any], original: Mapping[str, Any]) -> bool:
    attributes, shapes = entry.get("attributes"), entry.get("shapes")
    if not isinstance(attributes, Mapping) or not isinstance(shapes, Mapping):
        return False
    tables = ((attributes, original["attributes"]), (shapes, original["shapes"]))
    return all(key in own and _smaller(value, own[key]) for table, own in tables for key, value in table.items())


def _smaller(value: object, own: object) -> bool:
    if isinstance(value, list) and isinstance(own, list):
        return len(value) == len(own) and all(map(_smaller, value, own))
    return type(value) is int and type(own) is int and 1 <= value <= own


def _own_sizes(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, BasisPair):
        return _pair_sizes(module)
    attributes = {key: _plain(value) for key, value in vars(module).items() if _is_size(value)}
    tensors = {**module._parameters, **module._buffers}
    shapes = {key: list(value.shape) for key, value in tensors.items() if isinstance(value, Tensor)}
    return {"attributes": attributes, "shapes": shapes}


def _sizes(module: nn.Module, original: Mapping[str, Any]) -> dict[str, Any]:
    """The present sizes of what a mark lists, as far as they differ from it."""
    now = _own_sizes(module)
    return {
        table: {key: now[table][key] for key, value in original[table].items() if now[table][key] != value}
        for table in ("attributes", "shapes")
    }


def _pair_sizes(pair: BasisPair) -> dict[str, Any]:
    """A pair is described as the plain layer it stands for."""
    linear = pair.original_type is nn.Linear
    names = ("in_features", "out_features") if linear else ("in_channels", "out_channels")
    inputs, outputs = (int(getattr(pair, name)) for name in names)
    first = [inputs, outputs // pair.groups] if pair.transposed else [outputs, inputs // pair.groups]
    shapes = {"weight": [*first, *weight_of(pair.basis).shape[2:]]}
    if pair.had_bias:
        shapes["bias"] = [outputs]
    return {"attributes": dict(zip(names, (inputs, outputs), strict=True)), "shapes": shapes}


def mark_widths(module: nn.Module) -> None:
    """Note the sizes of a module before it loses channels, unless that was done before."""
    if _MARK not in vars(module):
        vars(module)[_MARK] = _own_sizes(module)


def note_new_bias(layer: nn.Module) -> None:
    """Let a convolution or linear layer that lost channels know that the bias it got belongs to its original, too."""
    mark = original_widths(layer)
    if mark is not None:
        name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
        mark["shapes"].setdefault("bias", [mark["attributes"][name]])


def move_mark(old: nn.Module, new: nn.Module) -> None:
    """Let the replacement of a layer know that the layer had lost channels."""
    mark = original_widths(old)
    if mark is not None:
        keys = _own_sizes(new)
        vars(new)[_MARK] = {table: {k: v for k, v in mark[table].items() if k in keys[table]} for table in keys}


def forget_widths(model: nn.Module) -> None:
    """Remove every mark."""
    for module in model.modules():
        vars(module).pop(_MARK, None)


def _resize(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Give a module sizes, those not named being the original ones."""
    original = vars(module)[_MARK]
    attributes = {**original["attributes"], **sizes["attributes"]}
    if isinstance(module, BasisPair):
        inputs, outputs = list(_pair_sizes(module)["attributes"])
        fan_in = attributes[inputs] // module.groups * math.prod(weight_of(module.basis).shape[2:])
        rank = min(module.rank, fan_in, attributes[outputs] // module.groups)
        module.set_widths(attributes[inputs], attributes[outputs], rank)
        return
    for key, value in attributes.items():
        setattr(module, key, tuple(value) if isinstance(value, list) else value)
    for key, shape in {**original["shapes"], **sizes["shapes"]}.items():
        tensor = getattr(module, key)
        if list(tensor.shape) == shape:
            continue
        fresh = tensor.detach().new_zeros(shape)
        if isinstance(tensor, nn.Parameter):
            set_data(tensor, fresh)
        else:
            module._buffers[key] = fresh


def _is_size(value: object) -> bool:
    return type(value) is int or (isinstance(value, tuple) and all(type(entry) is int for entry in value))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
