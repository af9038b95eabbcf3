"""Copies of a model's values that are put back later, whatever its `state_dict` leaves out, renames or adds.

A module may keep a frozen part out of its files by overriding `state_dict`. What is put back within a run has to be
whole nevertheless, so parameters and buffers are read and written here without asking the modules that hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bsdp.diff_pruning import SparseDelta
from bsdp.layers import BasisPair


def named_values(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and persistent buffers, detached but not copied, under every name they have.

    The names are those of ``nn.Module.state_dict``.
    """
    values: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        lost = module._non_persistent_buffers_set
        own = module._parameters | {key: value for key, value in module._buffers.items() if key not in lost}
        prefix = f"{name}." if name else ""
        values.update({f"{prefix}{key}": value.detach() for key, value in own.items() if not _is_empty(value)})
    return values


def _is_empty(value: Tensor | None) -> TypeGuard[None]:
    return value is None or is_lazy(value)


def copy_values(model: nn.Module, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """`named_values`, copied.

    Args:
        model: The model.
        device: Where the copies go; None for where the values are.
    """
    return {key: value.to(device or value.device, copy=True) for key, value in named_values(model).items()}


@torch.no_grad()
def load_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values back in place. The widths must be those of then; pairs and deltas take the form of what they get.

    Args:
        model: The model, changed in place.
        values: From `copy_values`, or a state dict. What it lacks stays as it is, as older ones lack what the module's
            own `state_dict` left out.

    Raises:
        ValueError: If the model has no such value, or one of another shape.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BasisPair, SparseDelta)):
            module.follow_state(values, f"{name}." if name else "")
    own = named_values(model)
    for key, value in values.items():
        if key.rpartition(".")[2] == "_extra_state":
            continue
        if key not in own or own[key].shape != value.shape:
            found = f"has the shape {list(own[key].shape)} there" if key in own else "does not have it"
            raise ValueError(f"{key!r} of shape {list(value.shape)} cannot be put back: the model {found}.")
        own[key].copy_(value)
