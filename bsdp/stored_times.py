"""What tables of measured times have in common: the facts of a measurement, and files."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bsdp.reading import parse_json, shown

TIMES_VERSION = 1
TABLE_FILE = "latency_table.json"  # where a run writes what it measured
_FACTS = {"fixed_ns": int, "batch_size": int, "multiple": int, "threads": int, "device": str, "torch_version": str}
_GOES_WITH = {"ranks": "`IterativeBasisPruning` and `compress`", "widths": "`ChannelPruning`"}
Times = TypeVar("Times", bound="StoredTimes")


@dataclass(frozen=True)
class StoredTimes(ABC):
    """Times of the layers of a network and of the rest, in whole nanoseconds of one pass; see the classes below it."""

    layers: Mapping[str, Any]
    fixed_ns: int
    batch_size: int = 1
    input_shapes: Sequence[Sequence[int]] = ()
    multiple: int = 1
    threads: int = 1
    device: str = "cpu"
    torch_version: str = ""

    by: ClassVar[str]  # what layers were timed by: "ranks" or "widths"

    @property
    @abstractmethod
    def original_ns(self) -> int:
        """Time of a pass of the original network."""

    @classmethod
    @abstractmethod
    def layer_values(cls, layer: Any) -> dict[str, Any]:
        """Plain values of one layer."""

    @classmethod
    @abstractmethod
    def layer_from_values(cls, name: object, entry: Any, source: object) -> Any:
        """The layer of `layer_values`."""

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
            f"of this network. Measure it at this size ({self.how()})."
        )

    def check_batch_size(self, asked: int) -> None:
        """Refuse `latency_batch_size`, the size to measure at, beside a table that was measured at another one."""
        if asked not in (1, self.batch_size):  # 1 is the default of whoever asks
            raise ValueError(
                f"`latency_batch_size={asked}` is for a table that is measured now, and `latency_table` was measured "
                f"with a batch size of {self.batch_size}: leave one of them out, or measure it anew ({self.how()})."
            )

    @classmethod
    def how(cls) -> str:
        """How to measure such a table, in words."""
        if cls.by == "ranks":
            return "`bsdp latency`, `bsdp.measure_latency_table`"
        return (
            "`bsdp latency --by widths`, of a backbone with the `--num-classes` of the task; "
            "`bsdp.measure_channel_latency_table`"
        )

    def to_values(self) -> dict[str, Any]:
        """Plain values that JSON and a checkpoint can hold."""
        facts = {key: getattr(self, key) for key in _FACTS}
        shapes = [list(shape) for shape in self.input_shapes]
        layers = {name: self.layer_values(layer) for name, layer in self.layers.items()}
        return {"version": TIMES_VERSION, "by": self.by, **facts, "input_shapes": shapes, "layers": layers}

    @classmethod
    def from_values(cls: type[Times], values: Any, *, source: object = "the latency table") -> Times:
        """The table of `to_values`.

        Args:
            values: What was read.
            source: Where from, for errors.

        Raises:
            ValueError: If they are of another version or kind, or make no sense.
        """
        version = values.get("version") if isinstance(values, Mapping) else None
        if version != TIMES_VERSION:
            raise ValueError(f"{source} is a latency table of version {shown(version)}, not {TIMES_VERSION}.")
        by = values.get("by", "ranks")  # older files do not say it
        if by != cls.by:
            goes_with = _GOES_WITH.get(by, "nothing here") if isinstance(by, str) else "nothing here"
            raise ValueError(
                f"{source} has times by {shown(by)}, which goes with {goes_with}; {_GOES_WITH[cls.by]} needs times by "
                f"{cls.by}: measure them ({cls.how()})."
            )
        for key, kind in _FACTS.items():
            if type(values.get(key)) is not kind:
                raise ValueError(f"{source}: `{key}` must be of type {kind.__name__}, got {shown(values.get(key))}.")
        if values["fixed_ns"] < 0 or not isinstance(values.get("layers"), Mapping):
            raise ValueError(f"{source} has no table `layers`, or a negative `fixed_ns`.")
        layers = {str(name): cls.layer_from_values(name, entry, source) for name, entry in values["layers"].items()}
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
    def load(cls: type[Times], path: str | os.PathLike[str]) -> Times:
        """Read a table; whether it is of a given network, `check` tells.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no latency table of this kind.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"`latency_table`: no such file: {path}. Make one with `bsdp latency`.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no latency table: it is not text.") from error
        return cls.from_values(parse_json(text, path), source=path)


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with lists in place of tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
