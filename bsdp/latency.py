"""Saved times of the layers of a network, by rank: what a budget of latency counts with.

The times are measured once (see `bsdp.measure_latency_table`) and kept in a file, so that what is cut does not depend
on the machine of the day. All times are whole nanoseconds of one forward pass at the batch size of the table.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from bsdp.reading import parse_json, shown

LATENCY_VERSION = 1
_FACTS = {"fixed_ns": int, "batch_size": int, "multiple": int, "threads": int, "device": str, "torch_version": str}
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
class LatencyTable:
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
    fixed_ns: int
    batch_size: int = 1
    input_shapes: Sequence[Sequence[int]] = ()
    multiple: int = 1
    threads: int = 1
    device: str = "cpu"
    torch_version: str = ""

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
                "Measure it on this network (`bsdp.measure_latency_table`, `bsdp latency`)."
            )
        for name, layer in layers.items():
            here, there = (tuple(getattr(one, key) for key in _GEOMETRY) for one in (layer, self.layers[name]))
            if here != there:
                raise ValueError(
                    f"the latency table is of another network: layer {name!r} has {', '.join(_GEOMETRY)} of {here} in "
                    f"the network and {there} in the table. Measure it on this network (`bsdp.measure_latency_table`, "
                    "`bsdp latency`)."
                )

    def other_inputs(self, shapes: Sequence[Sequence[int]]) -> str:
        """What to say of a network that gets other inputs than those that were timed; "" if it does not.

        Args:
            shapes: Shapes of its inputs, with an axis for the examples, which does not count.
        """
        timed, here = ([list(shape[1:]) for shape in each] for each in (self.input_shapes, shapes))
        if not timed or timed == here:
            return ""
        there, now = (", ".join(map(str, each)) for each in (timed, here))
        return (
            f"the latency table was measured on inputs of {there}, but the network gets {now}: its times are not those "
            "of this network. Measure it at this size (`bsdp latency`, `bsdp.measure_latency_table`)."
        )

    def to_values(self) -> dict[str, Any]:
        """Plain values that JSON and a checkpoint can hold."""
        layers = {name: _listed(asdict(layer)) for name, layer in self.layers.items()}
        facts = {key: getattr(self, key) for key in _FACTS}
        shapes = [list(shape) for shape in self.input_shapes]
        return {"version": LATENCY_VERSION, **facts, "input_shapes": shapes, "layers": layers}

    @classmethod
    def from_values(cls, values: Any, *, source: object = "the latency table") -> LatencyTable:
        """The table of `to_values`.

        Args:
            values: What was read.
            source: Where from, for errors.

        Raises:
            ValueError: If they are of another version or make no sense.
        """
        version = values.get("version") if isinstance(values, Mapping) else None
        if version != LATENCY_VERSION:
            raise ValueError(f"{source} is a latency table of version {shown(version)}, not {LATENCY_VERSION}.")
        for key, kind in _FACTS.items():
            if type(values.get(key)) is not kind:
                raise ValueError(f"{source}: `{key}` must be of type {kind.__name__}, got {shown(values.get(key))}.")
        if values["fixed_ns"] < 0 or not isinstance(values.get("layers"), Mapping):
            raise ValueError(f"{source} has no table `layers`, or a negative `fixed_ns`.")
        layers = {str(name): _checked_layer(name, entry, source) for name, entry in values["layers"].items()}
        facts = {key: values[key] for key in _FACTS}
        shapes = tuple(tuple(shape) for shape in values.get("input_shapes") or ())
        return cls(layers=layers, input_shapes=shapes, **facts)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the table as JSON, all of it or nothing.

        Args:
            path: The file.
            force: Replace an existing file.

        Raises:
            FileExistsError: If it exists.
        """
        path = Path(path).expanduser()
        if path.exists() and not force:
            raise FileExistsError(
                f"`output`: {str(path)!r} exists: choose another name, or replace it with `--force` (`force=True` in "
                "Python)."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(self.to_values(), indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table; whether it is of a given network, `check` tells.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no latency table.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`latency_table`: no such file: {path}. Make one with `bsdp latency`.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no latency table: it is not text.") from error
        return cls.from_values(parse_json(text, path), source=path)


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


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
