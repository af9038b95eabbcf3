"""Saved times of the layers of a network, by width: what a budget of latency counts with when channels go.

A layer is timed at some numbers of inputs and outputs; between them times are linear. As in `bsdp.latency` all times
are whole nanoseconds of one forward pass at the batch size of the table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn

from bsdp.plain_layers import SUPPORTED_TYPES, layer_groups, layer_inputs, layer_outputs
from bsdp.reading import shown
from bsdp.stored_times import StoredTimes, listed
from bsdp.widths import original_widths


@dataclass(frozen=True)
class LayerWidths:
    """Times of one layer, summed over its calls in one pass of the network.

    Attributes:
        inputs: Numbers of input channels or features at which it was timed, ascending; the last is the original one.
        outputs: The same of its outputs; empty where they follow the inputs, as in a depthwise convolution.
        ns: Times, a row per number of inputs with an entry per number of outputs (one entry where `outputs` is
            empty), never falling as either rises.

    Example:
        >>> layer = bsdp.LayerWidths(inputs=(1, 9), outputs=(1, 5), ns=((10, 10), (10, 90)))
        >>> layer.at(9, 5), layer.at(9, 3), layer.at(5, 3)
        (90, 50, 30)
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ns: tuple[tuple[int, ...], ...]

    def at(self, inputs: int, outputs: int) -> int:
        """Time at some widths, linear between the timed ones and constant outside of them."""
        low, high, share = _place(self.inputs, inputs)
        first, last = (self._row(row, outputs) for row in (low, high))
        return round(first + (last - first) * share)

    def _row(self, row: int, outputs: int) -> float:
        times = self.ns[row]
        if not self.outputs:
            return times[0]
        low, high, share = _place(self.outputs, outputs)
        return times[low] + (times[high] - times[low]) * share

    @property
    def original_ns(self) -> int:
        """Time of the original layer."""
        return self.ns[-1][-1]


@dataclass(frozen=True)
class ChannelLatencyTable(StoredTimes):
    """Times by width of all layers whose channels can go, and of the rest; a file can hold it.

    Attributes:
        layers: The layers by name.
        fixed_ns: Time of everything else in a pass, as far as it does not shrink with the layers' outputs.
        batch_size: Examples in the pass that was timed.
        input_shapes: Shapes of the network's inputs for one example.
        multiple: The timed widths are multiples of it, the smallest and the original one excepted.
        threads: Threads that torch ran on.
        device: Name of the device.
        torch_version: Version of torch.
    """

    layers: Mapping[str, LayerWidths]

    by: ClassVar[str] = "widths"

    @property
    def original_ns(self) -> int:
        """Time of a pass of the original network."""
        return self.fixed_ns + sum(layer.original_ns for layer in self.layers.values())

    def of(self, network: nn.Module) -> int:
        """Time of a pass of a network with the widths that it has now."""
        widths = {name: _sizes(network.get_submodule(name)) for name in self.layers}
        return self.fixed_ns + sum(layer.at(*widths[name]) for name, layer in self.layers.items())

    def check(self, network: nn.Module, layers: Collection[str]) -> None:
        """Refuse a network other than the one that was measured.

        Args:
            network: The network; it may have lost channels since.
            layers: Names of its layers of which channels can go, on either side.

        Raises:
            ValueError: If there are layers that were not timed, or timed ones that it does not have at this size.
        """
        modules = dict(network.named_modules(remove_duplicate=False))
        odd = next((name for name in sorted(layers) if name not in self.layers), None)
        odd = odd or next((name for name in self.layers if name not in modules), None)
        if odd is not None:
            owner = "network" if odd in modules else "table"
            raise ValueError(f"the latency table is of another network: only the {owner} has {odd!r}. {self._advice()}")
        for name, layer in self.layers.items():
            if problem := _difference(modules[name], layer):
                raise ValueError(f"the latency table is of another network: layer {name!r} {problem}. {self._advice()}")

    def _advice(self) -> str:
        return f"Measure it on this network ({self.how()})."

    @classmethod
    def layer_values(cls, layer: Any) -> dict[str, Any]:
        """Plain values of one layer."""
        return listed(asdict(layer)) | {"ns": [list(row) for row in layer.ns]}

    @classmethod
    def layer_from_values(cls, name: object, entry: Any, source: object) -> LayerWidths:
        """The layer of `layer_values`."""
        problem = "is no table" if not isinstance(entry, Mapping) else _problem(entry)
        if problem:
            raise ValueError(f"{source}: the entry of layer {shown(name)} {problem}: {shown(entry)}.")
        return LayerWidths(tuple(entry["inputs"]), tuple(entry["outputs"]), tuple(map(tuple, entry["ns"])))


def _place(grid: tuple[int, ...], value: int) -> tuple[int, int, float]:
    """Positions in a grid on both sides of a value, and how far it is from the first to the second."""
    i = bisect_left(grid, value)
    if i == 0 or i == len(grid):
        i = min(i, len(grid) - 1)
        return i, i, 0.0
    return i - 1, i, (value - grid[i - 1]) / (grid[i] - grid[i - 1])


def _sizes(layer: nn.Module) -> tuple[int, int]:
    return layer_inputs(layer), layer_outputs(layer)


def _difference(module: nn.Module, layer: LayerWidths) -> str:
    """Why a table cannot be that of a module, in words; "" if it can.

    Tables are of the original sizes, or of the present ones if a network had lost channels before it was timed.
    """
    there = (layer.inputs[-1], layer.outputs[-1] if layer.outputs else layer.inputs[-1])
    if not isinstance(module, SUPPORTED_TYPES):
        return f"is a {type(module).__name__} in the network and has inputs and outputs of {there} in the table"
    here = _original_sizes(module)
    if there not in (here, _sizes(module)):
        return f"has inputs and outputs of {here} in the network and {there} in the table"
    if not layer.outputs and layer_groups(module) != layer_inputs(module):
        return "is a depthwise convolution in the table and none in the network"
    return ""


def _original_sizes(layer: nn.Module) -> tuple[int, int]:
    mark = original_widths(layer)
    sizes = {} if mark is None else mark["attributes"]
    inputs, outputs = _sizes(layer)
    names = ("in_features", "out_features") if hasattr(layer, "in_features") else ("in_channels", "out_channels")
    return sizes.get(names[0], inputs), sizes.get(names[1], outputs)


def _problem(entry: Mapping[str, Any]) -> str:
    """What is wrong with the entry of a layer; "" if nothing is."""
    inputs, outputs, rows = (entry.get(key) for key in ("inputs", "outputs", "ns"))
    if not _is_grid(inputs) or not _is_grid(outputs) or not inputs or outputs is None:
        return "needs lists `inputs` and `outputs` of ascending whole numbers from 1 on"
    if not isinstance(rows, (list, tuple)) or len(rows) != len(inputs):
        return "needs as many rows `ns` as it has `inputs`"
    if not all(_is_whole(row) and len(row) == max(1, len(outputs)) and min(row) >= 0 for row in rows):
        return "needs, in each row of `ns`, as many whole numbers from 0 on as it has `outputs`"
    across = all(list(row) == sorted(row) for row in rows)
    if not across or any(list(column) != sorted(column) for column in zip(*rows, strict=True)):
        return "has times that fall as the width rises"
    return ""


def _is_whole(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) is int for value in values)


def _is_grid(values: Any) -> bool:
    return _is_whole(values) and list(values) == sorted(set(values)) and (not values or values[0] >= 1)
