"""From the inputs of layers to the scores of channels: which positions belong to which unit, and sums over units.

Layout: the input channels of all readers stand side by side in one flat axis, in the order of `Readers.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bsdp.channel_group import ChannelGroup


class Readers:
    """All layers that read the channels of some groups, and where their inputs belong.

    Args:
        model: The model of the groups.
        groups: The groups, by name.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, ChannelGroup]) -> None:
        names = dict.fromkeys(member.layer for group in groups.values() for member in group.sides("in"))
        self.layers = {name: model.get_submodule(name) for name in names}
        self.widths = {name: input_channels(layer) for name, layer in self.layers.items()}
        self.offsets = dict(zip(self.widths, _starts(self.widths.values()), strict=True))
        self.of_group = [[member.layer for member in group.sides("in")] for group in groups.values()]
        self.sizes = [group.size for group in groups.values()]
        self._plan: list[Tensor] = []
        self._rows = self._layout(groups)

    def _layout(self, groups: Mapping[str, ChannelGroup]) -> Tensor:
        """Positions per unit and reader, by their number, and which of these belong to each unit, padded with -1."""
        by_count: dict[int, list[tuple[int, int, Tensor]]] = {}
        for number, group in enumerate(groups.values()):
            for place, member in enumerate(group.sides("in")):
                index = member.index.cpu() + self.offsets[member.layer]
                by_count.setdefault(index.shape[1], []).append((number, place, index))
        starts = _starts(self.sizes)
        most = max((len(names) for names in self.of_group), default=1)
        rows = torch.full((sum(self.sizes), most), -1)
        row = 0
        for entries in by_count.values():
            self._plan.append(torch.cat([index for _, _, index in entries]))
            for number, place, index in entries:
                units = torch.arange(row, row + len(index))
                rows[starts[number] : starts[number] + len(index), place] = units
                row += len(index)
        return torch.where(rows < 0, row, rows)

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values per reader, ``[..., input channels]`` each, side by side; zeros for readers without."""
        like = next(iter(values.values()))
        shape = like.shape[:-1]
        return torch.cat([values.get(n, like.new_zeros(())).expand(*shape, w) for n, w in self.widths.items()], -1)

    def units(self, flat: Tensor, *, mean: bool = False) -> Tensor:
        """Sum over the readers of each unit, ``[..., all channels]`` to ``[..., all units]``.

        Always in the same order, so that the same run gives the same scores.

        Args:
            flat: From `flat`.
            mean: Whether to take the mean of a reader's positions of one unit (after a flatten) and not the sum.
        """
        if self._rows.device != flat.device:
            self._plan = [index.to(flat.device) for index in self._plan]
            self._rows = self._rows.to(flat.device)
        parts = [flat[..., index] for index in self._plan]
        parts = [part.mean(-1) if mean else part.sum(-1) for part in parts]
        parts.append(flat.new_zeros(*flat.shape[:-1], 1))  # what the padding points at
        return torch.cat(parts, -1)[..., self._rows].sum(-1)


def input_channels(layer: nn.Module) -> int:
    """Input channels or features of a layer or pair."""
    return int(getattr(layer, "in_features" if hasattr(layer, "in_features") else "in_channels"))


def _starts(sizes: Iterable[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts


def trains(layer: nn.Module) -> bool:
    """Whether the gradient of a reader's weight tells its terms: it is a plain layer that trains."""
    weight = layer._parameters.get("weight")  # not `.weight`: that of a pair or a parametrization is made when read
    return weight is not None and weight.requires_grad


def widened(values: Tensor) -> Tensor:
    """The same in float32 at least: sums grow with the data."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def by_example(layer: nn.Module, values: Tensor, *, mean: bool = True) -> Tensor:
    """Means or sums over the positions, ``[examples, channels]``, of values that have the shape of a layer's input.

    Args:
        layer: The layer; channels are last for a linear one.
        values: ``[examples, channels, ...]``, or without examples; reduced as they lie in memory.
        mean: Whether to take means.
    """
    dims = len(getattr(layer, "kernel_size", ()))
    if values.dim() == dims + 1:  # no batch axis
        values = values[None]
    over = [axis for axis in range(1, values.dim()) if axis != values.dim() - 1 - dims]
    if not over:
        return values
    return values.mean(over) if mean else values.sum(over)
