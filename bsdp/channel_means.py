"""Means of removed channels move into the biases of the layers that read them, so that their expected output stays.

The counterpart, for channels, of moving the means of removed bases (DERIVED; exact up to the border that padding
makes). Compensation-aware pruning (Xie et al., arXiv 2108.13728) has the same term in its bias, beside a correction of
the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.channel_group import ChannelGroup
from bsdp.channel_watching import by_example, widened
from bsdp.compiling import uncompiled
from bsdp.input_watching import watch_inputs
from bsdp.layers import BasisPair
from bsdp.plain_layers import is_transposed, layer_groups, to_matrix, weight_of


class InputMeans:
    """Running mean per channel of what the readers of some groups read; recorded while `collecting` is open.

    Args:
        model: The model of the groups.
        groups: The groups.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, ChannelGroup]) -> None:
        self.model = model
        self.rebind(groups)

    def rebind(self, groups: Mapping[str, ChannelGroup]) -> None:
        """Follow a removal, forgetting everything."""
        names = dict.fromkeys(member.layer for group in groups.values() for member in group.sides("in"))
        self.layers = {n: layer for n in names if _takes_means(layer := self.model.get_submodule(n))}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, Tensor] = {}
        self._batches: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, name: str, inputs: Tensor) -> None:
        """Add the mean over examples and positions of one batch; one with NaN or infinity counts for nothing."""
        mean = by_example(self.layers[name], widened(inputs.detach())).mean(0)
        finite = mean.isfinite().all()
        value, count = torch.where(finite, mean, 0.0), finite.float()
        known = name in self._sums  # out of place below: a state dict taken earlier must not change
        self._sums[name] = self._sums[name] + value if known else value
        self._batches[name] = self._batches[name] + count if known else count

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Record every forward pass made inside the ``with`` block."""
        handles = [watch_inputs(layer, self._sink(name)) for name, layer in self.layers.items()]
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _sink(self, name: str) -> Callable[[Tensor], None]:
        return lambda inputs: self.update(name, inputs)

    def compute(self) -> dict[str, Tensor]:
        """``E[x]`` per reader, ``[in_channels]``; readers without any batch are left out."""
        return {name: total / self._batches[name] for name, total in self._sums.items() if self._batches[name] > 0}

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes."""
        for name, layer in self.layers.items():
            width = int(getattr(layer, "in_features" if hasattr(layer, "in_features") else "in_channels"))
            zeros = torch.zeros(width, device=next(layer.parameters()).device)
            self._sums[name] = reduce(self._sums.get(name, zeros))
            self._batches[name] = reduce(self._batches.get(name, zeros.sum()))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {"sums": dict(self._sums), "batches": dict(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the layers must have the widths of then."""
        self.reset()
        for name, layer in self.layers.items():
            if name in state["sums"]:
                device = next(layer.parameters()).device
                self._sums[name] = state["sums"][name].to(device)
                self._batches[name] = state["batches"][name].to(device)


@torch.no_grad()
def move_means_to_bias(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    remove: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> None:
    """Add to every reader's bias what the channels that are about to go give it on average.

    Only layers that have a bias take part: pairs below full rank, and those whose original had one.

    Args:
        model: The model before the removal.
        groups: Its groups.
        remove: Units that go, per group.
        means: ``E[x]`` per reader, from `InputMeans`.
    """
    lost: dict[str, list[Tensor]] = {}
    for name, units in remove.items():
        for member in groups[name].sides("in"):
            if member.layer in means:
                lost.setdefault(member.layer, []).append(member.index[units].flatten())
    for name, parts in lost.items():
        layer, index = model.get_submodule(name), torch.cat(parts)
        if index.numel() and _takes_means(layer):
            bias = layer.scaling.bias if isinstance(layer, BasisPair) else layer.bias
            assert isinstance(bias, Tensor)
            bias.add_(_contribution(layer, means[name], index).to(bias))


def _contribution(layer: nn.Module, mean: Tensor, index: Tensor) -> Tensor:
    """Mean output of some input channels, ``[out_channels]``."""
    groups = layer_groups(layer)
    if isinstance(layer, BasisPair):
        matrix = layer.product
    else:
        matrix = to_matrix(weight_of(layer), groups, transposed=is_transposed(layer))
    kept = torch.zeros_like(mean, dtype=matrix.dtype)
    kept[index.to(kept.device)] = mean.to(matrix.dtype)[index.to(mean.device)]
    inputs = kept.view(groups, 1, -1, 1)
    per_channel = matrix.reshape(groups, matrix.shape[1], inputs.shape[2], -1)  # [groups, out, in, kernel positions]
    result: Tensor = (per_channel * inputs).sum((2, 3)).flatten()
    return result


def _takes_means(layer: nn.Module) -> bool:
    if is_transposed(layer):
        return False  # how many kernel positions meet at an output depends on the stride
    if isinstance(layer, BasisPair):
        return layer.had_bias or layer.rank < layer.full_rank
    return isinstance(layer._parameters.get("bias"), Tensor)
