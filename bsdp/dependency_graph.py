"""The one place that knows torch-pruning: tracing copies of a model, and removing channels from them.

torch-pruning only ever sees a copy. To learn what a removal does to every tensor, the copy's tensors are filled with
the positions of their own elements before the graph prunes them: what is left there says which elements of the real
tensors stay, whatever kind of layer it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.channel_group import ChannelGroup
from bsdp.compiling import uncompiled
from bsdp.folding import empty_folded
from bsdp.layers import named_pairs
from bsdp.plain_layers import SUPPORTED_TYPES
from bsdp.scale_hooks import drop_scales

_STEPS_PER_LINK = 20  # DenseNet-121 takes fewer steps than it has links


def plain_copy(model: nn.Module) -> nn.Module:
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
def quietly() -> Iterator[None]:
    """Run the library without its warnings, with gradients, and without a trace in the random state."""
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


def trace(plain: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Build the library's graph of a copy.

    Args:
        plain: From `plain_copy`.
        inputs: One example of each input.

    Returns:
        The graph, whose `walk` ends what would go on for ever; set its `steps` to 0 before each group.

    Raises:
        ImportError: If torch-pruning is not installed.
    """
    library = _torch_pruning()
    with quietly():
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


def cut_copy(
    plain: nn.Module,
    inputs: tuple[Any, ...],
    groups: Mapping[str, ChannelGroup],
    remove: Mapping[str, Tensor],
    *,
    number: bool,
) -> None:
    """Remove units from a plain copy through the graph; with `number`, of tensors that hold their own positions."""
    graph = trace(plain, inputs)
    if number:
        plain.double()
        for tensor in (*plain.parameters(), *plain.buffers()):
            if tensor.is_floating_point():
                tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    modules = dict(plain.named_modules())
    with quietly():
        for name, units in remove.items():
            if not units.numel():
                continue
            graph.walk.steps = 0
            root = modules[name]
            channels = groups[name].units[units].flatten().sort().values.tolist()
            graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, idxs=channels).prune()
