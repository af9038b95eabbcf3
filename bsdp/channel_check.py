"""Whether groups of channels are what a dependency graph says: removed channels against ignored ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bsdp.channel_group import ChannelGroup, UntraceableError
from bsdp.compiling import uncompiled
from bsdp.dependency_graph import cut_copy, plain_copy, quietly

_BLAME_SECONDS = 20.0  # to look for the layers at fault in a model that is refused
_COUPLING_NORMS = (nn.LayerNorm, nn.GroupNorm)  # they mix channels, so a removed one is missed by its neighbours


def removal_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> str | None:
    """What is wrong with a copy that lacks half of the channels, compared with one whose readers ignore them."""
    masked, cut = plain_copy(model), plain_copy(model)
    remove = _half(groups)
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


def check_training(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> None:
    """Refuse groups whose channels are read by a layer that runs in train mode only, which no graph shows.

    Args:
        model: A plain or decomposed model; it is not changed.
        inputs: One example of each input. Where the model does not run on them in train mode, nothing is refused.
        groups: From `channel_groups` of this model.

    Raises:
        UntraceableError: If training fails without some channels, with the layer and the way out.
    """
    layer = _training_fault(model, inputs, groups)
    if layer is not None:
        raise UntraceableError(read_in_training(layer, groups_at_fault(model, inputs, groups, fault=_training_fault)))


def read_in_training(layer: str, makers: Iterable[str]) -> str:
    """An error message on a layer that reads channels in training only, and the layers that make them."""
    return (
        f"layer {layer!r} runs in training, but not in `forward` in eval mode, so a cut would not follow the channels "
        f"that it reads. Let these stay: name the layers that make them ({', '.join(makers)}) in `exclude`; or prune "
        "bases instead (`IterativeBasisPruning`)."
    )


def _training_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> str | None:
    """The layer in which a copy that lacks half of the channels fails in train mode."""
    whole = plain_copy(model)
    batch = tuple(torch.cat([value, value]) if isinstance(value, Tensor) else value for value in inputs)
    evaluated: list[str] = []
    trained: list[str] = []
    try:
        _run(whole, batch, evaluated)
        _run(whole.train(), batch, trained)
    except Exception:  # it may want targets in training, or a trainer
        return None
    if set(trained) <= set(evaluated):
        return None
    cut, seen = plain_copy(model), [""]
    cut_copy(cut, inputs, groups, _half(groups), number=False)
    try:
        _run(cut.train(), batch, seen)
    except Exception:  # whatever the layer makes of a wrong number of channels
        return seen[-1]
    return None


def _run(copied: nn.Module, batch: tuple[Any, ...], seen: list[str]) -> None:
    """Run a copy and note the modules without children as they are entered."""
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: seen.append(name))
        for name, module in copied.named_modules()
        if not any(True for _ in module.children())
    ]
    try:
        with quietly(), torch.no_grad():
            copied(*batch)
    finally:
        for handle in handles:
            handle.remove()


def _half(groups: Mapping[str, ChannelGroup]) -> dict[str, Tensor]:
    return {name: torch.arange(group.size)[1::2] for name, group in groups.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * one.abs().max().clamp(min=1e-6))


def groups_at_fault(
    model: nn.Module,
    inputs: tuple[Any, ...],
    groups: Mapping[str, ChannelGroup],
    *,
    fault: Callable[[nn.Module, tuple[Any, ...], Mapping[str, ChannelGroup]], str | None] = removal_fault,
) -> list[str]:
    """Groups that go wrong on their own, found by halving; only the first ones where that takes long."""
    bad: list[str] = []
    parts = [list(groups)]
    deadline = time.monotonic() + _BLAME_SECONDS
    while parts and time.monotonic() < deadline:
        names = parts.pop()
        if fault(model, inputs, {name: groups[name] for name in names}) is None:
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
