"""One file for a pruned model: safetensors weights with the rank plan in its metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bsdp.cost import layer_cost
from bsdp.fitting import check_names_and_shapes, check_values, expected_state, meta_layer
from bsdp.folding import empty_folded, fold, fold_pair, unfold_into
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import SUPPORTED_TYPES, plain_type
from bsdp.reading import open_safetensors, parse_json, shown, tensors_of
from bsdp.scale_hooks import scales_as_values
from bsdp.structure import reshaped
from bsdp.surgery import load_tensors, module_names
from bsdp.widths import widths_of

FORMAT_VERSION = 1
_KINDS = ("pair", "fused", "plain")


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the folded form of a model to one safetensors file.

    The file holds the tensors of ``bsdp.fold(model)`` and, as JSON in its metadata under ``"bsdp"``, the format
    version, the layers' plan ``{name: {"kind": "pair" | "fused" | "plain", "rank", "bias"}}`` and the caller's
    `metadata`. ``"plain"`` layers were never decomposed, so their rank is the full one. The widths
    of a model that lost channels stand under ``"widths"`` (see `bsdp.widths.widths_of`). The file is written beside the
    target first and then moved, so that an interrupted write leaves an older file whole.

    Args:
        model: A decomposed model. The module itself is left alone.
        path: Target, usually ending in ``.safetensors``; an existing file is replaced.
        metadata: Values that JSON can hold, for example the backbone's name and the class names.

    Returns:
        The path.

    Raises:
        ValueError: If the model is itself a pair, or `metadata` uses a name that the format needs.
        TypeError: If `metadata` holds values that JSON cannot.
    """
    reserved = sorted({"format_version", "layers", "widths"} & (metadata or {}).keys())
    if reserved:
        raise ValueError(f"`metadata` must not have the key {reserved[0]!r}, which the format uses itself.")
    if isinstance(model, BasisPair):
        raise ValueError("`model` is a single pair: wrap it, for example in `torch.nn.Sequential(pair)`.")
    widths = widths_of(model)
    if scales_as_values(model):
        model = fold(model)  # which is a copy, so its marks are gone
    folded: dict[nn.Module, nn.Module] = {pair: fold_pair(pair) for pair in named_pairs(model).values()}
    plan = _plan_of(model, folded)
    tensors = expected_state(model, folded)
    unique = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    broken = [key for key, value in unique.items() if value.is_floating_point() and value.isnan().any()]
    if broken:
        warnings.warn(f"{broken[0]!r} holds NaN: `bsdp.load` will refuse {os.fspath(path)}.", stacklevel=2)
    header: dict[str, Any] = {"format_version": FORMAT_VERSION, "layers": plan, **(metadata or {})}
    if widths:
        header["widths"] = widths
    return write_tensors(path, unique, metadata={"bsdp": json.dumps(header), "format": "pt"})


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], *, metadata: dict[str, str]) -> Path:
    """Write a safetensors file, whole or not at all.

    Args:
        path: Target; an existing file is replaced.
        tensors: On the CPU, contiguous, none of them twice.
        metadata: The file's own.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o666 & ~_umask())  # the library makes files that nobody else can read
        with partial.open("rb+") as file:  # on the disk before it takes the older file's place
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _plan_of(model: nn.Module, folded: Mapping[nn.Module, nn.Module]) -> dict[str, dict[str, Any]]:
    inside = {child for pair in folded for child in pair.modules() if child is not pair}
    plan: dict[str, dict[str, Any]] = {}
    for module, names in module_names(model).items():
        if isinstance(module, BasisPair):
            kind = "pair" if isinstance(folded[module], nn.Sequential) else "fused"
            entry = {"kind": kind, "rank": module.rank, "bias": module.needs_bias}
        elif type(module) in SUPPORTED_TYPES and module not in inside and module is not model:
            entry = {"kind": "plain", "rank": layer_cost(module).full_rank, "bias": module.bias is not None}
        else:
            continue
        plan.update({name: entry for name in names})
    return plan


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON metadata that `save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of ours.
    """
    with open_safetensors(Path(path)) as file:
        return _header(file, Path(path))


def _header(file: Any, path: Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get("bsdp")
    if text is None:
        raise ValueError(f"{path} was not written by `bsdp.save`: its metadata has no entry `bsdp`.")
    header = parse_json(text, path)
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {shown(version)}; this release reads version {FORMAT_VERSION}.")
    assert isinstance(header, dict)
    return header


def load(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Load a file written by `save`.

    Names, shapes and the plan are checked before any tensor is read, the values before the model is changed. Weights of
    another floating-point precision are converted to the model's; values that it cannot hold are refused.

    Args:
        model: The original architecture (with the same head), or a function without arguments that builds it. A module
            given here is changed in place, once everything in the file has been checked.
        path: The file. Files without ``"plain"`` entries, as they were written at first, are read, too.

    Returns:
        The folded model, of plain layers only, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not ours, or does not fit the model; the model is then as it was.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        header = _header(file, path)
        if not isinstance(model, nn.Module):
            model = model()
        with _told(path), reshaped(model, {key: header[key] for key in ("widths",) if key in header}):
            plan = _checked_plan(model, header.get("layers"), path)
            expected = expected_state(model, _meta_layers(model, plan))
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
            check_names_and_shapes(expected, shapes, path=path)
            tensors = tensors_of(file, path)
            check_values(expected, tensors, path=path)
    unfold_into(model, plan)
    load_tensors(model, tensors, strict=False)  # the names are those that its `state_dict` has
    return model.eval()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Let errors name the file."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _checked_plan(model: nn.Module, plan: object, path: Path) -> dict[str, dict[str, Any]]:
    """Check all names and ranks; return the entries of layers that change."""
    if not isinstance(plan, dict):
        raise ValueError(f"{path} has no table `layers` in its metadata.")
    modules = dict(model.named_modules(remove_duplicate=False))
    entries: dict[nn.Module, Any] = {}
    for name, entry in plan.items():
        module = modules.get(name) if name else None
        if module is None or plain_type(type(module)) is None:
            found = "no such layer" if module is None else f"a {type(module).__name__} there"
            inner = next((n.removesuffix(f".{name}") for n in modules if n.endswith(f".{name}")), None)
            advice = "pass the original architecture" if inner is None else f"pass the network in it, `model.{inner}`"
            raise ValueError(f"{path} has a plan for {shown(name)}, but the model has {found}: {advice}.")
        _check_entry(name, entry, module, path)
        if entries.setdefault(module, entry) != entry:
            raise ValueError(f"{path} has two plans for one layer, {shown(name)} being its second name.")
    pairs = list(named_pairs(model))
    if pairs:
        raise ValueError(f"{path}: the model has a BasisPair at {pairs[0]!r}: pass the original architecture.")
    return {n: {key: e[key] for key in ("kind", "rank", "bias")} for n, e in plan.items() if e["kind"] != "plain"}


def _check_entry(name: str, entry: object, layer: nn.Module, path: Path) -> None:
    full = layer_cost(layer).full_rank
    kind, rank, bias = (entry.get(key) if isinstance(entry, dict) else None for key in ("kind", "rank", "bias"))
    if kind not in _KINDS or type(bias) is not bool or type(rank) is not int or not 1 <= rank <= full:
        raise ValueError(
            f"{path} has the plan {shown(entry)} for layer {name!r}; it needs a kind, a bias and a rank in 1..{full}."
        )
    has_bias = layer.bias is not None
    if kind == "plain" and (rank != full or bias != has_bias):
        raise ValueError(
            f"{path} has layer {name!r} at the full rank {rank} with {'a' if bias else 'no'} bias, but the model's has "
            f"the full rank {full} and {'a' if has_bias else 'no'} bias: pass the original architecture."
        )


def _meta_layers(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> dict[nn.Module, nn.Module]:
    """The layers that the plan asks for, without values, so that a misfit is found before the model changes."""
    layers: dict[nn.Module, nn.Module] = {}
    for name, entry in plan.items():
        layer = model.get_submodule(name)
        if layer not in layers:
            layers[layer] = empty_folded(meta_layer(layer), **entry)
    return layers
