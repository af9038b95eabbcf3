"""Channels that can only be removed together, in plain names and positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
