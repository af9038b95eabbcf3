"""Which channels of which layers have to go together, read from a dependency graph into plain names and positions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_patterns, matches
from bsdp.channel_check import groups_at_fault, removal_fault
from bsdp.channel_group import ChannelGroup, ChannelMember, ModuleChange, UntraceableError
from bsdp.dependency_graph import cut_copy, plain_copy, quietly, trace
from bsdp.plain_layers import SUPPORTED_TYPES, is_depthwise, layer_groups
from bsdp.probing import as_inputs

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def channel_groups(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    exclude: Iterable[str] = (),
    check: bool = True,
) -> dict[str, ChannelGroup]:
    """Find the channels that can be removed, by groups that must go together.

    Left out are channels that reach the model's output, that nothing reads, and those of layers in `exclude`. The
    result is tested by removing half of every group from a copy: the outputs must be those of the model whose readers
    ignore the same channels.

    Args:
        model: A plain or decomposed model; it is not changed.
        example_input: One example, batch size 1.
        exclude: Layers whose channels must stay: names, or the name of a module that has them inside, or patterns with
            ``*``.
        check: Whether to test the result.

    Returns:
        Groups by name, in the order of the model's layers.

    Raises:
        UntraceableError: If the model's dependencies cannot be followed, with the way out.
        ValueError: If `exclude` names what the model does not have.
        ImportError: If torch-pruning is not installed.
    """
    inputs = as_inputs(example_input)
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    patterns = check_patterns("exclude", exclude, names)
    ignored = {name for name in names if matches(name, patterns)}
    try:
        plain = plain_copy(model)
        groups = _read_groups(trace(plain, inputs), plain, ignored)
    except ImportError:
        raise
    except Exception as error:  # whatever the tracer stumbles over in a model it does not understand
        raise _untraceable(model, f"{type(error).__name__}: {error}") from error
    if not groups:
        raise _untraceable(model, "no channel can be removed without changing the output")
    fault = removal_fault(model, inputs, groups) or _tied_fault(model, inputs, groups) if check else None
    if fault is not None:
        bad = groups_at_fault(model, inputs, groups)
        where = f"; these layers are at fault: {', '.join(bad)}" if bad else ""
        raise _untraceable(model, fault + where)
    return groups


def plan_removal(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    groups: Mapping[str, ChannelGroup],
    remove: Mapping[str, Tensor],
) -> dict[str, ModuleChange]:
    """Find out what the removal of some units does to every module.

    Args:
        model: A plain or decomposed model; it is not changed. Changes of a pair are told as those of its plain layer.
        example_input: One example, batch size 1.
        groups: From `channel_groups` of this model.
        remove: Units to remove per group.

    Returns:
        Changes by module name; modules that stay as they are are left out.
    """
    copied = plain_copy(model)
    cut_copy(copied, as_inputs(example_input), groups, remove, number=True)
    return _changes(plain_copy(model), copied)


def _tied_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> str | None:
    """What is wrong where layers share a parameter, and a group would have it cut in two ways."""
    users: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(parameter, []).append((name, key))
    for shared in (places for places in users.values() if len(places) > 1):
        layers = [name for name, _ in shared]
        concerned = [n for n, group in groups.items() if any(m.layer in layers for m in group.members)]
        if any(_cuts_apart(model, inputs, groups, name, shared) for name in concerned):
            return f"{' and '.join(layers)} share a parameter; these layers are at fault: {', '.join(concerned)}"
    return None


def _cuts_apart(
    model: nn.Module,
    inputs: tuple[Any, ...],
    groups: Mapping[str, ChannelGroup],
    name: str,
    shared: Iterable[tuple[str, str]],
) -> bool:
    """Whether a cut of one group takes different elements of what is one parameter in several places."""
    changes = plan_removal(model, inputs, groups, {name: torch.arange(groups[name].size)[1::2]})
    kept = [changes[layer].tensors.get(key) if layer in changes else None for layer, key in shared]
    return len({None if index is None else tuple(index.flatten().tolist()) for index in kept}) > 1


def _read_groups(graph: Any, plain: nn.Module, exclude: set[str]) -> dict[str, ChannelGroup]:
    names = {module: name for name, module in plain.named_modules()}
    ignored = {module for name, module in plain.named_modules(remove_duplicate=False) if name in exclude}
    found: dict[str, ChannelGroup] = {}
    with quietly():
        for raw in graph.get_all_groups(ignored_layers=[], root_module_types=list(SUPPORTED_TYPES)):
            graph.walk.steps = 0  # of this group; the library looks for the next one when asked
            if any("OutputOp" in type(item.dep.target.module).__name__ for item in raw):
                continue
            if any(item.dep.target.module in ignored and _makes(graph, item) for item in raw):
                continue
            group = _read_group(graph, raw, names)
            if group is not None:
                found[group.name] = group
    order = {name: i for i, name in enumerate(names.values())}
    return dict(sorted(found.items(), key=lambda entry: order[entry[0]]))


def _makes(graph: Any, item: Any) -> bool:
    return bool(graph.is_out_channel_pruning_fn(item.dep.handler))


def _read_group(graph: Any, raw: Any, names: Mapping[nn.Module, str]) -> ChannelGroup | None:
    root = raw[0].dep.target.module
    size = len(raw[0].idxs)
    parts, members = 1, []
    for item in raw:
        module = item.dep.target.module
        if not isinstance(module, nn.Module) or module not in names:
            continue  # an operation, or a parameter on its own, which `plan_removal` takes care of
        parts = math.lcm(parts, _parts(module))
        index = _positions(item, size)
        if index is None:
            return None
        weighted = isinstance(module, SUPPORTED_TYPES)
        side = "out" if _makes(graph, item) else "in"
        if not weighted or is_depthwise(module):
            side = "both"
        members.append(ChannelMember(names[module], side, index, isinstance(module, _BATCH_NORMS), weighted))
    if size % parts or not any(member.side == "in" and member.weighted for member in members):
        return None
    units = torch.arange(size).view(parts, -1).t()
    merged = [
        ChannelMember(m.layer, m.side, m.index[units].flatten(1), m.batch_norm, m.weighted) for m in _unique(members)
    ]
    return ChannelGroup(names[root], units, tuple(merged))


def _unique(members: Iterable[ChannelMember]) -> list[ChannelMember]:
    seen: dict[tuple[str, str], ChannelMember] = {}
    for member in members:
        seen.setdefault((member.layer, member.side), member)
    return list(seen.values())


def _positions(item: Any, size: int) -> Tensor | None:
    """Positions of each root channel on the item's side, ``[size, positions per channel]``."""
    index, root = torch.as_tensor(item.idxs), torch.as_tensor(item.root_idxs)
    if index.numel() % size or index.numel() != root.numel() or not index.numel():
        return None
    order = root.argsort(stable=True)
    if not torch.equal(root[order], torch.arange(size).repeat_interleave(index.numel() // size)):
        return None
    return index[order].view(size, -1)


def _parts(module: nn.Module) -> int:
    """In how many equal parts a module treats its channels, each of which must lose the same number."""
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    if isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    return 1 if is_depthwise(module) else layer_groups(module)


def _changes(before: nn.Module, after: nn.Module) -> dict[str, ModuleChange]:
    changes: dict[str, ModuleChange] = {}
    others = dict(after.named_modules())
    for name, module in before.named_modules():
        other = others[name]
        tensors = {}
        for key, old in (*module._parameters.items(), *module._buffers.items()):
            new = getattr(other, key)
            if isinstance(old, Tensor) and old.shape != new.shape:
                tensors[key] = new.detach().cpu().round().long()
        attributes = {
            key: vars(other)[key]
            for key, old in vars(module).items()
            if _is_size(old) and _is_size(vars(other).get(key)) and vars(other)[key] != old
        }
        if tensors or attributes:
            changes[name] = ModuleChange(tensors, attributes)
    return changes


def _is_size(value: object) -> bool:
    if isinstance(value, tuple):
        return all(type(entry) is int for entry in value)
    return type(value) is int


def _untraceable(model: nn.Module, reason: str) -> UntraceableError:
    return UntraceableError(
        f"the channels of {type(model).__name__} cannot be pruned: torch-pruning's dependency graph does not follow "
        f"this model ({reason}). Prune bases instead (`IterativeBasisPruning`), which needs no graph; "
        "or name layers at fault in `exclude`."
    )
