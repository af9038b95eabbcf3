"""Replacing modules inside a model, wherever and however often they are registered."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All dotted names of every module; a module that is registered twice has two."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place that a dotted name describes."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, child, module)


def replace_modules(
    model: nn.Module, replacements: Mapping[nn.Module, nn.Module]
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Replace modules in place under every name they have.

    Args:
        model: The model to change. It cannot itself be one of the replaced modules.
        replacements: New module for each old one.

    Returns:
        ``{name: (old, new)}`` with all names, also the second one of a shared module.
    """
    if model in replacements:
        raise ValueError(
            "the model is itself a layer to replace, and a caller would keep the old one: wrap it, "
            "for example in `torch.nn.Sequential(model)`."
        )
    replaced: dict[str, tuple[nn.Module, nn.Module]] = {}
    for old, names in module_names(model).items():
        if old in replacements:
            for name in names:
                set_module(model, name, replacements[old])
                replaced[name] = (old, replacements[old])
    return replaced


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the forward and backward hooks of a module to its replacement; their handles keep working."""
    for table in _HOOK_TABLES:
        setattr(new, table, getattr(old, table))
        setattr(old, table, OrderedDict())
    new._is_full_backward_hook = old._is_full_backward_hook


def copy_hooks(old: nn.Module, new: nn.Module, memo: dict[int, Any]) -> None:
    """Give a module deep copies of the hooks of another one, as ``copy.deepcopy`` does with `memo`."""
    for table in (*_HOOK_TABLES, "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(new, table, copy.deepcopy(getattr(old, table), memo))
    new._is_full_backward_hook = old._is_full_backward_hook


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether something runs before the module's forward, as weight norm of the old style does."""
    return bool(module._forward_pre_hooks)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load tensors that this code's own modules wrote.

    A plain mapping has lost the version of every module, without which some take it for one of their oldest formats.

    Args:
        model: The model, changed in place.
        tensors: Values by name.
        strict: As in ``load_state_dict``.
    """
    state: Any = OrderedDict(tensors)
    modules = model.named_modules(remove_duplicate=False)
    state._metadata = {name: {"version": module._version} for name, module in modules}
    model.load_state_dict(state, strict=strict)
