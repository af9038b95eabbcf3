"""Which channels of which layers have to go together: the one place that knows torch-pruning.

torch-pruning only ever sees a copy. Its dependency graph is read into `ChannelGroup`, plain names and positions. To
learn what a removal does to every tensor, the copy's tensors are filled with the positions of their own elements before
the graph prunes them: what is left there says which elements of the real tensors stay, whatever kind of layer it is.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bsdp._checks import check_patterns, matches
from bsdp.compiling import uncompiled
from bsdp.folding import empty_folded
from bsdp.layers import SUPPORTED_TYPES, named_pairs
from bsdp.probing import as_inputs
from bsdp.scale_hooks import drop_scales

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BLAME_SECONDS = 20.0  # to look for the layers at fault in a model that is refused
_STEPS_PER_LINK = 20  # DenseNet-121 takes fewer steps than it has links
_COUPLING_NORMS = (nn.LayerNorm, nn.GroupNorm)  # they mix channels, so a removed one is missed by its neighbours


class UntraceableError(ValueError):
    """The dependencies between the channels of a model could not be found, or are not what the graph says."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


@dataclass(frozen=True)
class ChannelMember:
    """One side of one layer that belongs to a group.

    Attributes:
        layer: Dotted name in the model.
        side: ``"out"``: the layer makes the channels; ``"in"``: it reads them; ``"both"``: they pass one by one, as
            through a depthwise convolution or a batch norm.
        index: Positions of each unit on that side, ``[units, positions per unit]``.
        batch_norm: Whether it is a batch norm.
        weighted: Whether it is a convolution or linear layer.
    """

    layer: str
    side: str
    index: Tensor
    batch_norm: bool = False
    weighted: bool = True


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, as in a residual stream.

    Attributes:
        name: Name of the layer it is called after, one that makes the channels.
        units: Output channels of that layer per unit, ``[units, channels per unit]``. A unit is one channel, or one in
            each group of a grouped convolution or group norm.
        members: All sides of all layers that change with it.
    """

    name: str
    units: Tensor
    members: tuple[ChannelMember, ...]

    @property
    def size(self) -> int:
        """Number of units."""
        return self.units.shape[0]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.units.numel()

    def sides(self, side: str) -> Iterator[ChannelMember]:
        """Convolutions and linear layers on one side."""
        return (member for member in self.members if member.weighted and member.side == side)


@dataclass(frozen=True)
class ModuleChange:
    """What a removal does to one module.

    Attributes:
        tensors: For parameters and buffers that shrink, the flat positions that stay, in the new shape.
        attributes: Sizes that change, such as ``out_channels``.
    """

    tensors: dict[str, Tensor]
    attributes: dict[str, Any]


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
        plain = _plain_copy(model)
        groups = _read_groups(_trace(plain, inputs), plain, ignored)
    except ImportError:
        raise
    except Exception as error:  # whatever the tracer stumbles over in a model it does not understand
        raise _untraceable(model, f"{type(error).__name__}: {error}") from error
    if not groups:
        raise _untraceable(model, "no channel can be removed without changing the output")
    fault = _fault(model, inputs, groups) if check else None
    if fault is not None:
        bad = _at_fault(model, inputs, groups)
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
    copied = _plain_copy(model)
    _cut(copied, as_inputs(example_input), groups, remove, number=True)
    return _changes(_plain_copy(model), copied)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode with one plain layer, of undefined values, for every pair; all parameters want gradients."""
    pairs = named_pairs(model).values()
    memo: dict[int, Any] = {id(p): empty_folded(p, kind="fused", rank=p.rank, bias=True) for p in pairs}
    with uncompiled(model):
        plain = copy.deepcopy(model, memo).eval()
    drop_scales(plain)
    for parameter in plain.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    for module in plain.modules():
        if getattr(module, "padding_mode", "zeros") != "zeros":
            vars(module)["padding_mode"] = "zeros"  # other paddings are slices, which the graph takes for channels
    for module in memo.values():
        if isinstance(module, SUPPORTED_TYPES):
            for parameter in module.parameters():
                nn.init.constant_(parameter, 1e-3)  # memory as it was found may hold NaN, which some models refuse
    return plain


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]), uncompiled():
        warnings.simplefilter("ignore")
        yield


def _torch_pruning() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_pruning
    except ImportError as error:
        raise ImportError(
            "channel pruning needs torch-pruning, which is not installed: `pip install 'bsdp[channels]'`. "
            "Basis pruning needs it not."
        ) from error
    return torch_pruning


def _trace(plain: nn.Module, inputs: tuple[Any, ...]) -> Any:
    library = _torch_pruning()
    with _quietly():
        graph = library.DependencyGraph().build_dependency(
            plain, example_inputs=tuple(inputs) if len(inputs) > 1 else inputs[0], verbose=False
        )
    nodes = list(graph.module2node.values())
    walk = _Walk(_STEPS_PER_LINK * (20 + sum(len(node.dependencies) for node in nodes)))
    for node in nodes:
        node.dependencies = _Links(node.dependencies, walk)
    graph.walk = walk
    return graph


class _Walk:
    """How far the library may go through the links of one graph; where slices stand in a circle it goes on for ever."""

    def __init__(self, most: int) -> None:
        self.most, self.steps = most, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > self.most:
            raise RecursionError("its dependencies go round in a circle")


class _Links(list[Any]):
    """Links of a node that count how often they are followed."""

    def __init__(self, links: Iterable[Any], walk: _Walk) -> None:
        super().__init__(links)
        self.walk = walk

    def __iter__(self) -> Iterator[Any]:
        self.walk.step()
        return super().__iter__()


def _read_groups(graph: Any, plain: nn.Module, exclude: set[str]) -> dict[str, ChannelGroup]:
    names = {module: name for name, module in plain.named_modules()}
    ignored = {module for name, module in plain.named_modules(remove_duplicate=False) if name in exclude}
    found: dict[str, ChannelGroup] = {}
    with _quietly():
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
        parts = max(parts, _parts(module))
        index = _positions(item, size)
        if index is None:
            return None
        weighted = isinstance(module, SUPPORTED_TYPES)
        side = "out" if _makes(graph, item) else "in"
        if not weighted or (_depthwise(module)):
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


def _depthwise(module: nn.Module) -> bool:
    groups = int(getattr(module, "groups", 1))
    return groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)


def _parts(module: nn.Module) -> int:
    """In how many equal parts a module treats its channels, each of which must lose the same number."""
    if isinstance(module, nn.GroupNorm):
        return int(module.num_groups)
    if isinstance(module, nn.MultiheadAttention):
        return int(module.num_heads)
    return 1 if _depthwise(module) else int(getattr(module, "groups", 1))


def _cut(
    plain: nn.Module,
    inputs: tuple[Any, ...],
    groups: Mapping[str, ChannelGroup],
    remove: Mapping[str, Tensor],
    *,
    number: bool,
) -> None:
    """Remove units from a plain copy through the graph; with `number`, of tensors that hold their own positions."""
    graph = _trace(plain, inputs)
    if number:
        plain.double()
        for tensor in (*plain.parameters(), *plain.buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    modules = dict(plain.named_modules())
    with _quietly():
        for name, units in remove.items():
            if not units.numel():
                continue
            graph.walk.steps = 0
            root = modules[name]
            channels = groups[name].units[units].flatten().sort().values.tolist()
            graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, idxs=channels).prune()


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


def _fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> str | None:
    """What is wrong with a copy that lacks half of the channels, compared with one whose readers ignore them."""
    masked, cut = _plain_copy(model), _plain_copy(model)
    remove = {name: torch.arange(group.size)[1::2] for name, group in groups.items()}
    generator = torch.Generator().manual_seed(0)
    for parameter, twin in zip(masked.parameters(), cut.parameters(), strict=True):
        if parameter.is_floating_point() and parameter.dim() > 1:  # pretrained weights may hide a wrong position
            scale = (2.0 / max(1, parameter[0].numel())) ** 0.5
            twin.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            parameter.data.copy_(twin.data)
    try:
        _cut(cut, inputs, groups, remove, number=False)
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


def _at_fault(model: nn.Module, inputs: tuple[Any, ...], groups: Mapping[str, ChannelGroup]) -> list[str]:
    """Groups that go wrong on their own, found by halving; only the first ones where that takes long."""
    bad: list[str] = []
    parts = [list(groups)]
    deadline = time.monotonic() + _BLAME_SECONDS
    while parts and time.monotonic() < deadline:
        names = parts.pop()
        if _fault(model, inputs, {name: groups[name] for name in names}) is None:
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


def _untraceable(model: nn.Module, reason: str) -> UntraceableError:
    return UntraceableError(
        f"the channels of {type(model).__name__} cannot be pruned: torch-pruning's dependency graph does not follow "
        f"this model ({reason}). Prune bases instead (`IterativeBasisPruning`), which needs no graph; "
        "or name layers at fault in `exclude`."
    )
