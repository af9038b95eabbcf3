"""The layers in a file whose network cannot be built here, read off its tensors and its plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsdp.files import read_metadata
from bsdp.reading import open_safetensors, shown
from bsdp.structure import read_checkpoint

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredLayer:
    """One layer as a file holds it.

    Attributes:
        name: Dotted name.
        form: ``"pair"``, ``"fused"`` or ``"plain"`` in a safetensors file, ``"bases"`` in a checkpoint.
        rank: Basis vectors per group.
        full_rank: Largest rank per group; None where the file does not tell.
        break_even_rank: Rank at which pair and fused layer have as many weights; None where the file does not tell.
        weights: Weights in the file, without biases.
    """

    name: str
    form: str
    rank: int
    full_rank: int | None
    break_even_rank: float | None
    weights: int


def stored_layers(path: Path) -> list[StoredLayer]:
    """List the decomposed layers of a checkpoint, or all in the plan of a safetensors file.

    Raises:
        ValueError: If the file is damaged or holds no decomposed layer.
    """
    layers = _of_safetensors(path) if path.suffix == ".safetensors" else _of_checkpoint(path)
    if not layers:
        raise ValueError(f"{path} holds no decomposed layer, and its network cannot be built here.")
    return layers


def stored_layers_table(path: Path) -> str:
    """The list of `stored_layers` as a table."""
    from rich.console import Console
    from rich.table import Table

    layers = stored_layers(path)
    table = Table(title=f"Layers in {path.name}")
    table.add_column("layer", overflow="fold")
    for column in ("form", "rank", "full", "break-even", "weights"):
        table.add_column(column, justify="right")
    for layer in layers:
        even = "-" if layer.break_even_rank is None else f"{layer.break_even_rank:.1f}"
        full = "-" if layer.full_rank is None else str(layer.full_rank)
        table.add_row(layer.name, layer.form, str(layer.rank), full, even, f"{layer.weights:,}")
    console = Console(width=110, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return f"{capture.get().rstrip()}\n{sum(layer.weights for layer in layers):,} weights in these layers"


def _of_checkpoint(path: Path) -> list[StoredLayer]:
    state = read_checkpoint(path)["state_dict"]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    names = [key.removesuffix(".scaling.delta") for key in shapes if key.endswith(".scaling.delta")]
    return [_pair(name, shapes) for name in names]


def _pair(name: str, shapes: Shapes) -> StoredLayer:
    keys = ("basis.weight", "scaling.weight", "scaling.delta")
    basis, scaling, delta = (shapes.get(f"{name}.{key}", ()) for key in keys)
    if len(scaling) < 2 or not all(math.prod(shape) for shape in (basis, scaling, delta)):
        raise ValueError(f"the pair at {name!r} lacks a tensor or has an empty one; the file is damaged.")
    outputs, rank = scaling[:2]
    groups = max(1, delta[0] // rank)
    fan_in = math.prod(basis) // (groups * rank)
    even = outputs * fan_in / (groups * fan_in + outputs)
    weights = math.prod(basis) + math.prod(scaling)
    return StoredLayer(name, "bases", rank, min(fan_in, outputs // groups), even, weights)


def _of_safetensors(path: Path) -> list[StoredLayer]:
    plan: Any = read_metadata(path).get("layers")
    with open_safetensors(path) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return [_planned(name, entry, shapes) for name, entry in (plan.items() if isinstance(plan, dict) else ())]


def _planned(name: str, entry: Any, shapes: Shapes) -> StoredLayer:
    kind, rank = (entry.get(key) if isinstance(entry, dict) else None for key in ("kind", "rank"))
    keys = [f"{name}.0.weight", f"{name}.1.weight"] if kind == "pair" else [f"{name}.weight"]
    if kind not in ("pair", "fused", "plain") or type(rank) is not int or not all(key in shapes for key in keys):
        raise ValueError(f"the plan {shown(entry)} of layer {name!r} does not fit the tensors; the file is damaged.")
    weights = sum(math.prod(shapes[key]) for key in keys)
    return StoredLayer(name, kind, rank, rank if kind == "plain" else None, None, weights)
