"""The structure of a decomposed model as plain values, and rebuilding it before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bsdp.cost import layer_cost
from bsdp.delta_structure import deltas_like, deltas_of
from bsdp.fitting import check_names, check_values, expected_state, meta_layer
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import plain_type
from bsdp.reading import read_pickled, shown
from bsdp.scale_hooks import scales_as_values, set_scales
from bsdp.snapshots import load_values, named_values
from bsdp.surgery import module_names, move_hooks, replace_modules
from bsdp.widths import move_mark, set_widths, widths_of

STRUCTURE_VERSION = 1


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Describe which layers are pairs and at which rank, as values that JSON and ``weights_only=True`` can hold.

    Returns:
        ``{"version": 1, "pairs": {name: {"rank": int}}}`` with every name of a pair that has several; ``"whole": True``
        stands beside the rank of pairs that must stay one layer, ``"pair_limit"`` where times were measured. A model
        that lost channels has ``"widths"``, too (see `widths_of`), and one with channel scales ``"scales"`` (see
        `scales_as_values`), one with sparse deltas ``"deltas"`` (see `deltas_of`).
    """
    pairs = {
        name: {"rank": module.rank} | _marks_of(module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BasisPair)
    }
    deltas = deltas_of(model)
    return {"version": STRUCTURE_VERSION, "pairs": pairs, **shape_of(model)} | ({"deltas": deltas} if deltas else {})


def _marks_of(pair: BasisPair) -> dict[str, Any]:
    """What is known of a pair's deployment besides its rank."""
    marks: dict[str, Any] = {"whole": True} if pair.whole else {}
    return marks if pair.pair_limit is None else marks | {"pair_limit": pair.pair_limit}


def shape_of(model: nn.Module) -> dict[str, Any]:
    """The part of a structure that channel pruning changes: ``"widths"`` and ``"scales"``, as far as there are any."""
    parts = {"widths": widths_of(model), "scales": scales_as_values(model)}
    return {key: value for key, value in parts.items() if value}


def set_shape(model: nn.Module, shape: Mapping[str, Any]) -> None:
    """Give a model widths and channel scales that `shape_of` told, in place; load weights next.

    Raises:
        ValueError: If they do not fit the model.
    """
    if shape or shape_of(model):
        set_widths(model, shape.get("widths", {}))
        set_scales(model, shape.get("scales", {}))


def rebuild(
    model: nn.Module,
    structure: Mapping[str, Any],
    *,
    state_dict: Mapping[str, Any] | None = None,
    strict: bool = True,
    source: object = "the checkpoint",
) -> None:
    """Give a model the structure that `structure_of` described, in place, without any SVD.

    Layers become pairs of the saved rank with undefined values; pairs that exist are resized. Load the weights next.

    Args:
        model: The original architecture, or a decomposed model of any ranks.
        structure: From `structure_of`.
        state_dict: The weights that will be loaded next; when given, they are checked here, too.
        strict: Whether `state_dict` must have the very names of the model, as in ``load_state_dict``.
        source: Where `state_dict` comes from, for errors.

    Raises:
        ValueError: If the structure is of another version or does not fit the model, or the weights do not fit the
            structure. The model is then as it was.
    """
    pairs = _checked_pairs(structure)
    with (
        deltas_like(model, structure.get("deltas")),
        reshaped(model, {key: structure[key] for key in ("widths", "scales") if structure.get(key)}),
    ):
        ranks = _checked_ranks(model, pairs)
        if state_dict is not None:
            check_state(model, state_dict, ranks=ranks, strict=strict, source=source)
    replacements: dict[nn.Module, nn.Module] = {
        layer: BasisPair(layer, rank=rank).train(layer.training)
        for layer, rank in ranks.items()
        if not isinstance(layer, BasisPair)
    }
    replace_modules(model, replacements)
    for old, new in replacements.items():
        move_hooks(old, new)
        move_mark(old, new)
    for pair, rank in ranks.items():
        if isinstance(pair, BasisPair) and pair.rank != rank:
            pair.resize(rank)
    for name, pair in named_pairs(model).items():
        entry = structure["pairs"].get(name, {})
        pair.whole, pair.pair_limit = entry.get("whole") is True, entry.get("pair_limit")


@contextmanager
def reshaped(model: nn.Module, shape: Mapping[str, Any]) -> Iterator[None]:
    """`set_shape` for good, but undone, with all values, if something in the ``with`` block does not fit."""
    before = shape_of(model)
    values = named_values(model) if before or shape else {}
    try:
        set_shape(model, shape)
        yield
    except ValueError:
        if values:
            set_shape(model, before)
            load_values(model, values)
        raise


def _can_be_pair(module: nn.Module) -> bool:
    return isinstance(module, BasisPair) or plain_type(type(module)) is not None


def check_state(
    model: nn.Module, state_dict: Mapping[str, Any], *, ranks: Mapping[nn.Module, int], strict: bool, source: object
) -> None:
    """Refuse weights that a model could not load once its layers are pairs of the given ranks.

    Args:
        model: The model; it is not changed.
        state_dict: Names and tensors.
        ranks: Rank per group of every layer that is, or will be, a pair.
        strict: Whether the names must be the same.
        source: Where the weights come from, for errors.

    Raises:
        ValueError: If names, shapes, types or values do not fit.
    """
    _check_is_state_dict(state_dict, source)
    expected = expected_state(model, {layer: BasisPair(meta_layer(layer), rank=rank) for layer, rank in ranks.items()})
    check_names(expected, state_dict, path=source, strict=strict)
    check_values(expected, state_dict, path=source)


def _check_is_state_dict(state_dict: object, source: object) -> None:
    ok = isinstance(state_dict, Mapping) and all(isinstance(key, str) for key in state_dict)
    # What modules learn of the versions that wrote their weights; loading would stumble over it half-way.
    versions = getattr(state_dict, "_metadata", None) or {}
    if not ok or not isinstance(versions, Mapping) or not all(map(_is_version, versions.values())):
        raise ValueError(f"{source} has no state dict of names and tensors; take a file that `Trainer` wrote.")


def _is_version(entry: object) -> bool:
    return isinstance(entry, Mapping) and type(entry.get("version")) in (int, type(None))


def _checked_ranks(model: nn.Module, pairs: Mapping[str, int]) -> dict[nn.Module, int]:
    """Bring the ranks from names to modules, and refuse what the model does not have."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    existing = module_names(model)
    inside = {child for pair in named_pairs(model).values() for child in pair.modules() if child is not pair}
    extra = [
        names for module, names in existing.items() if isinstance(module, BasisPair) and not pairs.keys() & {*names}
    ]
    if extra:
        raise ValueError(
            f"the model has a pair at {extra[0][0]!r}, but the saved structure has none there: "
            "build the model anew, without decomposing it."
        )
    ranks: dict[nn.Module, int] = {}
    for name, rank in pairs.items():
        module = modules.get(name)
        if module is None or not _can_be_pair(module) or module in inside:
            found = "no such layer" if module is None or module in inside else f"a {type(module).__name__} there"
            raise ValueError(
                f"the saved structure has a pair at {shown(name)}, but the model has {found}: "
                "build the same architecture that was pruned."
            )
        full = layer_cost(module).full_rank
        if rank > full:
            raise ValueError(f"the saved structure gives {name!r} the rank {shown(rank)}, but its full rank is {full}.")
        if ranks.setdefault(module, rank) != rank:
            raise ValueError(f"the saved structure gives one layer, {existing[module]}, different ranks.")
    return ranks


def _checked_pairs(structure: Mapping[str, Any]) -> dict[str, int]:
    version = structure.get("version") if isinstance(structure, Mapping) else structure
    if type(version) is not int or version != STRUCTURE_VERSION:
        raise ValueError(
            f"the saved structure has version {shown(version)}; this release reads version {STRUCTURE_VERSION}."
        )
    pairs = structure.get("pairs")
    if not isinstance(pairs, Mapping) or not all(isinstance(name, str) for name in pairs):
        raise ValueError("the saved structure has no table `pairs` of layer names.")
    ranks: dict[str, int] = {}
    for name, entry in pairs.items():
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        if type(rank) is not int or rank < 1:
            raise ValueError(
                f"the saved structure gives layer {shown(name)} the rank {shown(rank)}; a rank is an integer of at "
                "least 1."
            )
        limit = entry.get("pair_limit")
        if limit is not None and (type(limit) is not int or limit < 0):
            raise ValueError(f"the saved structure gives layer {shown(name)} the `pair_limit` {shown(limit)}.")
        ranks[name] = rank
    return ranks


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Lightning checkpoint, without running any code from it, and check that its parts are what they should be.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or no Lightning checkpoint.
    """
    checkpoint = read_pickled(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no `state_dict`.")
    _check_is_state_dict(checkpoint["state_dict"], path)
    for key in ("hyper_parameters", "callbacks", "loops"):
        if not isinstance(checkpoint.get(key, {}), Mapping):
            raise ValueError(f"{path} is not a Lightning checkpoint: its `{key}` is no table.")
    for key in ("epoch", "global_step"):
        if type(checkpoint.get(key, 0)) is not int or checkpoint.get(key, 0) < 0:
            raise ValueError(f"{path} is not a Lightning checkpoint: its `{key}` is {shown(checkpoint[key])}.")
    return checkpoint


def rebuild_for(
    model: nn.Module, checkpoint: Mapping[str, Any], *, strict: bool = True, source: object = "the checkpoint"
) -> None:
    """Give a model the structure of a checkpoint, once structure and weights are known to fit: `rebuild` with checks.

    Args:
        model: As in `rebuild`.
        checkpoint: With ``state_dict`` and, if the model was decomposed, ``bsdp``.
        strict: As in ``load_state_dict``.
        source: Where the checkpoint comes from, for errors.
    """
    state = checkpoint.get("state_dict")
    _check_is_state_dict(state, source)
    assert isinstance(state, Mapping)
    structure = checkpoint["bsdp"] if "bsdp" in checkpoint else _structure_in(model, state)
    rebuild(model, structure, state_dict=state, strict=strict, source=source)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> dict[str, Any]:
    """Load a Lightning checkpoint of a pruned module into a freshly built one, without any callback.

    Everything is checked before the model changes. Weights of another floating-point precision are converted.

    Args:
        model: The module as its class builds it (not decomposed), or decomposed at any ranks.
        path: A checkpoint written while `IterativeBasisPruning` or `BasisDecomposition` was in the trainer.
        strict: As in ``load_state_dict``.

    Returns:
        The checkpoint, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or no Lightning checkpoint, or does not fit the model; the model is then as
            it was.
    """
    checkpoint = read_checkpoint(path)
    rebuild_for(model, checkpoint, strict=strict, source=path)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return checkpoint


def _structure_in(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The structure of a decomposed model at the ranks of a state dict, which pairs can follow by themselves."""
    structure = structure_of(model)
    for name, entry in structure["pairs"].items():
        weight = state_dict.get(f"{name}.scaling.weight")
        if isinstance(weight, Tensor) and weight.dim() > 1 and weight.shape[1]:
            entry["rank"] = int(weight.shape[1])
    return structure
