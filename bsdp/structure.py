"""The structure of a decomposed model as plain values, and rebuilding it before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bsdp.cost import layer_cost
from bsdp.layers import SUPPORTED_TYPES, BasisPair
from bsdp.surgery import move_hooks, replace_modules

STRUCTURE_VERSION = 1


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Describe which layers are pairs and at which rank, as values that JSON and ``weights_only=True`` can hold.

    Returns:
        ``{"version": 1, "pairs": {name: {"rank": int}}}`` with every name of a pair that has several.
    """
    pairs = {
        name: {"rank": module.rank}
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BasisPair)
    }
    return {"version": STRUCTURE_VERSION, "pairs": pairs}


def rebuild(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Give a model the structure that `structure_of` described, in place, without any SVD.

    Layers become pairs of the saved rank with undefined values; pairs that exist are resized. Load the weights next.

    Args:
        model: The original architecture, or a decomposed model of any ranks.
        structure: From `structure_of`.

    Raises:
        ValueError: If the structure is of another version or does not fit the model.
    """
    pairs = _checked_pairs(structure)
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    extra = sorted(name for name, module in modules.items() if isinstance(module, BasisPair) and name not in pairs)
    if extra:
        raise ValueError(
            f"the model has a pair at {extra[0]!r}, but the saved structure has none there: "
            "build the model anew, without decomposing it."
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for name, rank in pairs.items():
        module = modules.get(name)
        if module is None or type(module) not in (BasisPair, *SUPPORTED_TYPES):
            found = "no such layer" if module is None else f"a {type(module).__name__} there"
            raise ValueError(
                f"the saved structure has a pair at {name!r}, but the model has {found}: "
                "build the same architecture that was pruned."
            )
        full = layer_cost(module).full_rank
        if rank > full:
            raise ValueError(f"the saved structure gives {name!r} the rank {rank}, but its full rank is {full}.")
        if module not in replacements and not isinstance(module, BasisPair):
            replacements[module] = BasisPair(module, rank=rank).train(module.training)
    for name, rank in pairs.items():
        module = modules[name]
        if isinstance(module, BasisPair) and module.rank != rank:
            module.resize(rank)
    replace_modules(model, replacements)
    for old, new in replacements.items():
        move_hooks(old, new)


def _checked_pairs(structure: Mapping[str, Any]) -> dict[str, int]:
    if not isinstance(structure, Mapping) or structure.get("version") != STRUCTURE_VERSION:
        version = structure.get("version") if isinstance(structure, Mapping) else structure
        raise ValueError(
            f"the saved structure has version {version!r}; this release reads version {STRUCTURE_VERSION}."
        )
    pairs = structure.get("pairs")
    if not isinstance(pairs, Mapping):
        raise ValueError("the saved structure has no table `pairs`.")
    ranks: dict[str, int] = {}
    for name, entry in pairs.items():
        rank = entry.get("rank") if isinstance(entry, Mapping) else None
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(
                f"the saved structure gives layer {name!r} the rank {rank!r}; a rank is an integer of at least 1."
            )
        ranks[str(name)] = rank
    return ranks


def load_checkpoint(model: nn.Module, path: str, *, strict: bool = True) -> dict[str, Any]:
    """Load a Lightning checkpoint of a pruned module into a freshly built one, without any callback.

    Args:
        model: The module as its class builds it (not decomposed), or decomposed at any ranks.
        path: A checkpoint written while `IterativeBasisPruning` or `BasisDecomposition` was in the trainer.
        strict: As in ``load_state_dict``.

    Returns:
        The checkpoint, read with ``weights_only=True``.

    Raises:
        ValueError: If the file is not a Lightning checkpoint or its structure does not fit the model.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no `state_dict`.")
    if "bsdp" in checkpoint:
        rebuild(model, checkpoint["bsdp"])
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return checkpoint
