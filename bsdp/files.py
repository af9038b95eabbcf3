"""One file for a pruned model: safetensors weights with the rank plan in its metadata. Nothing is ever unpickled."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.cost import layer_cost
from bsdp.folding import fold_pair, unfold_into
from bsdp.layers import SUPPORTED_TYPES, BasisPair
from bsdp.surgery import module_names

FORMAT_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the folded form of a model to one safetensors file.

    The file holds the tensors of ``bsdp.fold(model)`` and, as JSON in its metadata under ``"bsdp"``, the format
    version, the layers' plan ``{name: {"kind": "pair" | "fused", "rank", "bias"}}`` and the caller's `metadata`. It is
    written beside the target first and then moved, so that an interrupted write leaves an older file whole.

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
    from safetensors.torch import save_file

    reserved = sorted({"format_version", "layers"} & (metadata or {}).keys())
    if reserved:
        raise ValueError(f"`metadata` must not have the key {reserved[0]!r}, which the format uses itself.")
    tensors: dict[str, Tensor] = {}
    plan: dict[str, dict[str, Any]] = {}
    for module, names in module_names(model).items():
        if isinstance(module, BasisPair):
            if module is model:
                raise ValueError("`model` is a single pair: wrap it, for example in `torch.nn.Sequential(pair)`.")
            layer = fold_pair(module)
            kind = "pair" if isinstance(layer, nn.Sequential) else "fused"
            entry = {"kind": kind, "rank": module.rank, "bias": module.needs_bias}
            plan.update({name: entry for name in names})
            for name in names:
                tensors.update({f"{name}.{key}": value for key, value in layer.state_dict().items()})
    prefixes = tuple(f"{name}." for name in plan)
    tensors.update({k: v for k, v in model.state_dict().items() if not k.startswith(prefixes or ("\0",))})
    unique = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    header = {"format_version": FORMAT_VERSION, "layers": plan, **(metadata or {})}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(unique, partial, metadata={"bsdp": json.dumps(header), "format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON metadata that `save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("bsdp")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} was not written by `bsdp.save`: its metadata has no entry `bsdp`.")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version") if isinstance(header, dict) else None
        raise ValueError(f"{path} has format version {version!r}; this release reads version {FORMAT_VERSION}.")
    return header


def load(model: nn.Module | Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Load a file written by `save`.

    Args:
        model: The original architecture (with the same head), or a function without arguments that builds it. A module
            given here is changed in place, once everything in the file has been checked.
        path: The file.

    Returns:
        The folded model, of plain layers only, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not ours, or does not fit the model; the model is then as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_metadata(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(model, nn.Module):
        model = model()
    plan = header.get("layers")
    _check_plan(model, plan, tensors, path)
    assert isinstance(plan, dict)
    unfold_into(model, plan)
    model.load_state_dict(tensors)
    return model.eval()


def _check_plan(model: nn.Module, plan: object, tensors: Mapping[str, Tensor], path: object) -> None:
    """Check all names, ranks and shapes before anything changes."""
    if not isinstance(plan, dict):
        raise ValueError(f"{path} has no table `layers` in its metadata.")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, entry in plan.items():
        module = modules.get(name) if name else None
        if module is None or type(module) not in SUPPORTED_TYPES:
            found = "no such layer" if module is None else f"a {type(module).__name__} there"
            raise ValueError(
                f"{path} prunes layer {name!r}, but the model has {found}: pass the original architecture."
            )
        full = layer_cost(module).full_rank
        ok = isinstance(entry, dict) and entry.get("kind") in ("pair", "fused") and isinstance(entry.get("bias"), bool)
        rank = entry.get("rank") if ok else None
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= full:
            raise ValueError(
                f"{path} has the plan {entry!r} for layer {name!r}; it needs a kind, a bias and a rank in 1..{full}."
            )
    # Shapes are checked against a meta copy, so that a misfit leaves the model untouched.
    trial = _meta_copy(model)
    unfold_into(trial, plan)
    expected = trial.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit the model: it lacks {missing[:3]} and has unknown {extra[:3]}; "
            "pass the original architecture."
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{path} does not fit the model: {key!r} has shape {tuple(value.shape)}, the model needs "
                f"{tuple(expected[key].shape)}; pass the original architecture with the same number of classes."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinity in {key!r}.")


def _meta_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)
