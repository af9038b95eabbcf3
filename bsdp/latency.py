"""Saved times of the layers of a network, by rank: what a budget of latency counts with.

The times are measured once (see `bsdp.measure_latency_table`) and kept in a file, so that what is cut does not depend
on the machine of the day. All times are whole nanoseconds of one forward pass at the batch size of the table.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from bsdp.reading import shown
from bsdp.stored_times import StoredTimes, listed

_GEOMETRY = ("fan_in", "out_channels", "groups")


class Geometry(Protocol):
    """What a table compares of a layer; a `LayerCost` has it."""

    @property
    def fan_in(self) -> int:
        """Inputs of one filter."""

    @property
    def out_channels(self) -> int:
        """Output channels or features."""

    @property
    def groups(self) -> int:
        """Groups of the convolution."""


@dataclass(frozen=True)
class LayerLatency:
    """Times of one layer, summed over its calls in one pass of the network.

    Attributes:
        fan_in: Inputs of one filter, ``in_channels / groups * kernel positions``.
        out_channels: Output channels or features.
        groups: Groups of the convolution.
        fused_ns: Time as one layer; 0 for a layer that is never called or must stay whole.
        ranks: Ranks at which the pair was timed, ascending; empty where a pair can never pay.
        pair_ns: Time as a pair at these ranks, never falling.
    """

    fan_in: int
    out_channels: int
    groups: int
    fused_ns: int
    ranks: tuple[int, ...] = ()
    pair_ns: tuple[int, ...] = ()

    def pair(self, rank: int) -> int:
        """Time as a pair, linear between the measured ranks and constant outside of them."""
        if not self.ranks:
            raise ValueError("no pair was timed for this layer.")
        i = bisect_left(self.ranks, rank)
        if i == 0 or i == len(self.ranks):
            return self.pair_ns[min(i, len(self.ranks) - 1)]
        (low, high), (first, last) = self.ranks[i - 1 : i + 1], self.pair_ns[i - 1 : i + 1]
        return first + (last - first) * (rank - low) // (high - low)

    @property
    def pair_limit(self) -> int:
        """The largest rank up to the last timed one at which the pair is faster than one layer; 0 if there is none."""
        top = self.ranks[-1] if self.ranks else 0
        return max((rank for rank in range(1, top + 1) if self.pair(rank) < self.fused_ns), default=0)


@dataclass(frozen=True)
class LatencyTable(StoredTimes):
    """Times of all decomposed layers of a network and of the rest; a file can hold it.

    Attributes:
        layers: The decomposed layers by name.
        fixed_ns: Time of everything else in a pass.
        batch_size: Examples in the pass that was timed.
        input_shapes: Shapes of the network's inputs for one example.
        multiple: The timed ranks are multiples of it, the smallest and the largest useful one excepted.
        threads: Threads that torch ran on.
        device: Name of the device.
        torch_version: Version of torch.

    Example:
        >>> layer = bsdp.LayerLatency(9, 8, 1, fused_ns=100, ranks=(1, 3), pair_ns=(40, 120))
        >>> layer.pair(2), layer.pair_limit
        (80, 2)
    """

    layers: Mapping[str, LayerLatency]

    by: ClassVar[str] = "ranks"

    @property
    def original_ns(self) -> int:
        """Time of a pass of the original network."""
        return self.fixed_ns + sum(layer.fused_ns for layer in self.layers.values())

    def check(self, layers: Mapping[str, Geometry]) -> None:
        """Refuse a network other than the one that was measured.

        Args:
            layers: Its decomposed layers, for example those of a `ModelCost`.

        Raises:
            ValueError: If names or sizes differ.
        """
        odd = sorted(layers.keys() ^ self.layers.keys())
        if odd:
            owner = "the network" if odd[0] in layers else "the table"
            raise ValueError(
                f"the latency table is of another network, or of other decomposed layers: only {owner} has {odd[0]!r}. "
                f"Measure it on this network ({self.how()})."
            )
        for name, layer in layers.items():
            here, there = (tuple(getattr(one, key) for key in _GEOMETRY) for one in (layer, self.layers[name]))
            if here != there:
                raise ValueError(
                    f"the latency table is of another network: layer {name!r} has {', '.join(_GEOMETRY)} of {here} in "
                    f"the network and {there} in the table. Measure it on this network ({self.how()})."
                )

    @classmethod
    def layer_values(cls, layer: Any) -> dict[str, Any]:
        """Plain values of one layer."""
        return listed(asdict(layer))

    @classmethod
    def layer_from_values(cls, name: object, entry: Any, source: object) -> LayerLatency:
        """The layer of `layer_values`."""
        return _checked_layer(name, entry, source)


def _checked_layer(name: object, entry: Any, source: object) -> LayerLatency:
    problem = "is no table"
    if isinstance(entry, Mapping):
        ranks, times = entry.get("ranks"), entry.get("pair_ns")
        numbers = [entry.get(key) for key in (*_GEOMETRY, "fused_ns")]
        problem = _problem(numbers, ranks, times)
        if not problem:
            assert isinstance(ranks, (list, tuple)) and isinstance(times, (list, tuple))
            geometry = {key: int(entry[key]) for key in (*_GEOMETRY, "fused_ns")}
            return LayerLatency(**geometry, ranks=tuple(ranks), pair_ns=tuple(times))
    raise ValueError(f"{source}: the entry of layer {shown(name)} {problem}: {shown(entry)}.")


def _problem(numbers: list[Any], ranks: Any, times: Any) -> str:
    """What is wrong with the entry of a layer; "" if nothing is."""
    if not all(type(number) is int and number >= 0 for number in numbers):
        return "lacks a whole number that is not negative"
    if not all(isinstance(part, (list, tuple)) and all(type(n) is int for n in part) for part in (ranks, times)):
        return "needs lists `ranks` and `pair_ns` of whole numbers"
    if len(ranks) != len(times) or list(ranks) != sorted(set(ranks)) or (ranks and ranks[0] < 1):
        return "needs ascending ranks from 1 on and as many times"
    if list(times) != sorted(times) or (times and times[0] < 0):
        return "has times that fall as the rank rises, or negative ones"
    return ""
