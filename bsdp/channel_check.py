"""Whether groups of channels are what a dependency graph says: removed channels against ignored ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bsdp.channel_group import ChannelGroup
from bsdp.compiling import uncompiled
from bsdp.dependency_graph import cut_copy, plain_copy

_BLAME_SECONDS = 20.0  # to look for the layers at fault in a model that is refused
_COUPLING_NORMS = (nn.LayerNorm, nn.GroupNorm)  # they mix channels, so a removed one is missed by its neighbours


def removal_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> str | None:
    """What is wrong with a copy that lacks half of the channels, compared with one whose readers ignore them."""
    masked, cut = plain_copy(model), plain_copy(model)
    remove = {name: torch.arange(group.size)[1::2] for name, group in groups.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter, twin in zip(masked.parameters(), cut.parameters(), strict=True):
        if parameter.is_floating_point() and parameter.dim() > 1:  # pretrained weights may hide a wrong position
            scale = (2.0 / max(1, parameter[0].numel())) ** 0.5
            twin.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            parameter.data.copy_(twin.data)
    try:
        cut_copy(cut, inputs, groups, remove, number=False)
        _ignore(masked, groups, remove)
        with torch.no_grad(), uncompiled():
            expected, outputs = masked(*inputs), cut(*inputs)
    except Exception as error:  # a wrong removal fails in the model's own forward
        return f"without some channels it fails ({type(error).__name__}: {error})"
    if any(isinstance(module, _COUPLING_NORMS) for module in model.modules()):
        return None
    leaves = zip(tree_leaves(expected), tree_leaves(outputs), strict=True)
    if all(_same(one, other) for one, other in leaves if isinstance(one, Tensor) and one.is_floating_point()):
        return None
    return "its outputs show that the graph connects the wrong channels"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * one.abs().max().clamp(min=1e-6))


def groups_at_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> list[str]:
    """Groups that go wrong on their own, found by halving; only the first ones where that takes long."""
    bad: list[str] = []
    parts = [list(groups)]
    deadline = time.monotonic() + _BLAME_SECONDS
    while parts and time.monotonic() < deadline:
        names = parts.pop()
        if removal_fault(model, inputs, {name: groups[name] for name in names}) is None:
            continue
        if len(names) == 1:
            bad += names
        else:
            half = len(names) // 2
            parts += [names[half:], names[:half]]
    return bad


@torch.no_grad()
def _ignore(plain: nn.Module, groups: Mapping[str, ChannelGroup], remove: Mapping[str, Tensor]) -> None:
    """Let every reader ignore the units, by zeros in its weights."""
    for name, units in remove.items():
        for member in groups[name].sides("in"):
            layer = plain.get_submodule(member.layer)
            weight: Any = layer.weight
            index = member.index[units].flatten()
            if getattr(layer, "transposed", False):
                weight[index] = 0
            elif int(getattr(layer, "groups", 1)) == 1:
                weight[:, index] = 0
            else:
                _zero_grouped(weight, index, int(layer.groups))  # type: ignore[arg-type]


def _zero_grouped(weight: Tensor, index: Tensor, groups: int) -> None:
    per_group = weight.shape[1]
    outputs = weight.shape[0] // groups
    for position in index.tolist():
        group = position // per_group
        weight[group * outputs : (group + 1) * outputs, position % per_group] = 0
