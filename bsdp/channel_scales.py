"""Channel scaling: one trainable factor per channel, multiplied onto what the next layers read.

Wong et al. (ISBI 2021, arXiv 2103.12228), PUBLISHED: a scaling layer follows each frozen convolution after its
activation and multiplies channel-wise; its weights train with an L1 penalty; channels below a threshold are removed;
the scaling layers are then taken out. RECONSTRUCTED: factors start at 1, the penalty is on them alone, the threshold is
on their absolute value, and they fold into the input channels of the next layers, which is exact because nothing stands
between a factor and its readers.

TransTailor (arXiv 2103.01542), PUBLISHED: channels are removed by their importance for the target task. From CODE of
third parties: one factor per channel trains on frozen weights, ranked by ``abs(alpha * dL/dalpha)``, the lowest few
percent of all are removed at a time, then all weights train with gradients weighted by importance. OURS: factors start
at 1 (one of those programs starts at random), a schedule of rounds says how many go, and weights stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.channel_group import ChannelGroup
from bsdp.importance import NoScoresError
from bsdp.layers import BasisPair
from bsdp.optimizer_state import cut_state
from bsdp.plain_layers import layer_inputs, set_data
from bsdp.scale_hooks import ChannelScales, scales_of


def scale_layout(network: nn.Module, groups: Mapping[str, ChannelGroup]) -> tuple[dict[str, list[int]], int]:
    """Which factor stands before which input channel, and how many there are; in the order of the groups."""
    readers: dict[str, list[int]] = {}
    first = 1
    for group in groups.values():
        for member in group.sides("in"):
            layer = network.get_submodule(member.layer)
            index = readers.setdefault(member.layer, [0] * layer_inputs(layer))
            for unit, positions in enumerate(member.index.tolist()):
                for position in positions:
                    index[position] = first + unit
        first += group.size
    return readers, first - 1


def add_scales(network: nn.Module, groups: Mapping[str, ChannelGroup]) -> ChannelScales:
    """Give a plain network one factor per unit of its groups, all 1, so that its function stays.

    Raises:
        ValueError: If the network is decomposed: its scales train already.
    """
    if any(isinstance(module, BasisPair) for module in network.modules()):
        raise ValueError(
            "channel scaling needs a plain network, but this one is decomposed and has scaling factors of its own: "
            "leave `BasisDecomposition` out, or choose another `criterion`."
        )
    readers, units = scale_layout(network, groups)
    return ChannelScales(network, readers, units=units)


def keep_scales(
    network: nn.Module, groups: Mapping[str, ChannelGroup], keep: Tensor, optimizers: Sequence[Any] = ()
) -> None:
    """Follow a removal: keep some factors, and find their readers' channels anew.

    Args:
        network: The network after the removal.
        groups: Its groups now.
        keep: Positions of the factors that stay.
        optimizers: Optimizers to keep in step.
    """
    scales = scales_of(network)
    assert scales is not None
    keep, shape = keep.to(scales.weight.device), scales.weight.shape
    set_data(scales.weight, scales.weight.detach()[keep])
    cut_state(optimizers, scales.weight, shape, lambda value: value[keep.to(value.device)])
    readers, units = scale_layout(network, groups)
    assert units == len(scales.weight)
    scales.bind(network, readers)


class ScaleScores:
    """Scores of channels from their factors: the size of the factor, or its Taylor term as TransTailor takes it.

    Args:
        network: The network with its factors.
        groups: The groups they belong to.
        taylor: Score ``mean abs(alpha * dL/dalpha)`` over minibatches instead of ``abs(alpha)``.
    """

    needs_hooks = False

    def __init__(self, network: nn.Module, groups: Mapping[str, ChannelGroup], *, taylor: bool) -> None:
        self.network, self.taylor = network, taylor
        self.rebind(groups)

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""
        return self.taylor

    def rebind(self, groups: Mapping[str, ChannelGroup]) -> None:
        """Follow a removal."""
        self.sizes = {name: group.size for name, group in groups.items()}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sum: Tensor | None = None
        self._steps: Tensor | float = 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Add the terms of the gradient that stands now."""
        weight = self._weight()
        if not self.taylor or weight.grad is None:
            return
        value = (weight * weight.grad).abs().float()
        finite = value.isfinite().all()
        value = torch.where(finite, value, 0.0)
        self._sum = value if self._sum is None else self._sum + value
        self._steps = self._steps + finite.float()

    @contextmanager
    def collecting(self, scale: float = 1.0) -> Iterator[None]:
        """Nothing to watch."""
        yield

    def compute(self) -> dict[str, Tensor]:
        """Importance per group, ``[units]``.

        Raises:
            NoScoresError: If no finite gradient was seen, or a factor is NaN or infinite.
        """
        flat = self._weight().detach().abs().float()
        if self.taylor:
            if self._sum is None or float(self._steps) == 0:
                raise NoScoresError("no finite gradient of the channel scales was accumulated.")
            flat = self._sum / self._steps
        if not flat.isfinite().all():
            raise NoScoresError("scores are NaN or infinite: the loss is exploding.")
        return dict(zip(self.sizes, torch.split(flat, list(self.sizes.values())), strict=True))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes."""
        if self.taylor:
            weight = self._weight()
            total = torch.zeros_like(weight, dtype=torch.float32) if self._sum is None else self._sum
            self._sum, self._steps = reduce(total), reduce(torch.as_tensor(self._steps, device=weight.device))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {"sum": self._sum, "steps": float(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.reset()
        if state["sum"] is not None:
            if len(state["sum"]) != len(self._weight()):
                raise ValueError("the saved scores belong to a model of other widths.")
            self._sum = state["sum"].to(self._weight().device)
        self._steps = float(state["steps"])

    def _weight(self) -> nn.Parameter:
        scales = scales_of(self.network)
        assert scales is not None
        return scales.weight
