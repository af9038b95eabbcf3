"""Whether layers that only `training_step` calls read channels that would be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bsdp.channel_check import read_in_training
from bsdp.channel_pruner import ChannelStage
from bsdp.compiling import plain_name, uncompiled
from bsdp.layers import named_pairs
from bsdp.plain_layers import SUPPORTED_TYPES

_BATCHES = 3  # of each epoch are looked at


class UnfollowedReaders:
    """Sees which layers run in training but not in the ``forward`` that was traced, and whose channels they read.

    The graph of gradients tells where an input comes from: going back from it, the first layers with weights that are
    met make its channels. Inputs without gradients tell nothing.

    Args:
        stage: The stage that cuts channels.
    """

    def __init__(self, stage: ChannelStage) -> None:
        self.stage = stage
        self._traced = {stage.network.get_submodule(name) for name, seen in stage.positions.items() if seen.outputs}
        self.found: dict[str, set[str]] = {}  # makers of the channels that a layer reads

    @contextmanager
    def watching(self, pl_module: LightningModule, batch_idx: int) -> Iterator[None]:
        """Look at what runs inside the ``with`` block."""
        layers = {} if batch_idx >= _BATCHES else _layers(pl_module)
        makers: dict[Any, nn.Module] = {}  # by their node in the graph of gradients
        handles = [layer.register_forward_hook(_noting(makers)) for layer in layers]
        for layer, name in layers.items():
            if layer not in self._traced:
                handles.append(layer.register_forward_pre_hook(self._reading(name, makers), with_kwargs=True))
        try:
            with uncompiled() if layers else nullcontext():
                yield
        finally:
            makers.clear()
            for handle in handles:
                handle.remove()

    def _reading(self, name: str, makers: dict[Any, nn.Module]) -> Any:
        def read(_layer: nn.Module, arguments: Any, named: Any) -> None:
            inputs = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
            cut = self._cut()
            met = {cut[maker] for tensor in inputs for maker in _made_by(tensor, makers) if maker in cut}
            if met:
                self.found.setdefault(name, set()).update(met)

        return read

    def _cut(self) -> dict[nn.Module, str]:
        """Layers whose channels may be cut, and the names of their groups."""
        return {
            self.stage.network.get_submodule(member.layer): group.name
            for group in self.stage.groups.values()
            for member in group.members
            if member.weighted and member.side != "in"
        }

    def problem(self) -> str:
        """What is wrong with a cut; "" if nothing is."""
        return next((read_in_training(name, sorted(makers)) for name, makers in self.found.items()), "")


def _layers(pl_module: LightningModule) -> dict[nn.Module, str]:
    """Pairs, and layers with weights that are not part of one."""
    pairs = named_pairs(pl_module)
    parts = {part for pair in pairs.values() for part in pair.modules()}
    layers = {m: name for name, m in pl_module.named_modules() if isinstance(m, SUPPORTED_TYPES) and m not in parts}
    return {module: plain_name(name) for module, name in ({pair: n for n, pair in pairs.items()} | layers).items()}


def _noting(makers: dict[Any, nn.Module]) -> Any:
    def note(layer: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            makers[output.grad_fn] = layer

    return note


def _made_by(tensor: Tensor, makers: dict[Any, nn.Module]) -> set[nn.Module]:
    """The layers that are met first on the way back from a tensor."""
    found: set[nn.Module] = set()
    nodes: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in makers:
            found.add(makers[node])
        else:
            nodes += [following for following, _ in node.next_functions]
    return found
