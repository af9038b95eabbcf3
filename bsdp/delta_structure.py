"""Which parameters of a model have sparse deltas, as plain values, and attaching the same before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bsdp.diff_pruning import SparseDelta, delta_parameters, detach_deltas, named_deltas, put_deltas
from bsdp.hard_concrete import check_stretch
from bsdp.layers import named_pairs
from bsdp.reading import shown


def deltas_of(model: nn.Module) -> dict[str, Any]:
    """Describe the deltas of a model as values that JSON can hold; empty without deltas.

    Returns:
        ``{"parameters": [name, ...], "structured", "low", "high", "fixed"}``.
    """
    deltas = named_deltas(model)
    if not deltas:
        return {}
    options = {key: getattr(next(iter(deltas.values())), key) for key in ("structured", "low", "high", "fixed")}
    return {"parameters": list(deltas), **options}


@contextmanager
def deltas_like(model: nn.Module, saved: object) -> Iterator[None]:
    """Give a model the deltas that `deltas_of` described; it is as before if anything in the ``with`` block fails.

    Args:
        model: Without deltas, or with deltas of the same parameters, gated or fixed.
        saved: From `deltas_of`.

    Raises:
        ValueError: If they do not fit the model.
    """
    present = named_deltas(model)
    if not saved:
        if present:
            raise ValueError("the model has deltas, but the checkpoint is of a run without: start a new run.")
        yield
        return
    names, options, fixed = _checked(saved)
    known: dict[str, Any] = {**present} or ({} if named_pairs(model) else delta_parameters(model))
    unknown = [name for name in names if name not in known]
    if unknown or (present and len(present) != len(names)):
        raise ValueError(
            f"the saved structure has deltas of {len(names)} parameters that the model has not or not like that "
            f"(first: {shown((unknown or names)[0])}): build the same architecture."
        )
    trained = {name: parameter.requires_grad for name, parameter in known.items()} if not present else {}
    before = {delta: (dict(delta._parameters), dict(delta._buffers), delta.noise) for delta in present.values()}
    for delta in (present or put_deltas(model, names, **options)).values():
        _form(delta, fixed)
    try:
        yield
    except ValueError:
        for delta, (parameters, buffers, noise) in before.items():
            delta._parameters.update(parameters)
            delta._buffers.update(buffers)
            delta.noise = noise
        if not present:
            detach_deltas(model)
            for name, required in trained.items():
                model.get_parameter(name).requires_grad_(required)
        raise


def _form(delta: SparseDelta, fixed: bool) -> None:
    if fixed and not delta.fixed:
        delta.close_gates(torch.zeros_like(delta.value, dtype=torch.bool))
    elif delta.fixed and not fixed:
        delta.open_gates()


def _checked(saved: object) -> tuple[list[str], dict[str, Any], bool]:
    entry = saved if isinstance(saved, Mapping) else {}
    names, structured, fixed = entry.get("parameters"), entry.get("structured"), entry.get("fixed")
    low, high = entry.get("low"), entry.get("high")
    named = isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
    numbers = all(type(number) in (int, float) for number in (low, high))
    if not named or not numbers or type(structured) is not bool or type(fixed) is not bool or _twice(names):
        raise ValueError(f"the saved structure describes deltas as {shown(saved)}; it is damaged.")
    assert isinstance(names, list) and isinstance(low, (int, float)) and isinstance(high, (int, float))
    check_stretch(low, high)
    return names, {"structured": structured, "low": float(low), "high": float(high)}, fixed


def _twice(names: Any) -> bool:
    return len(set(names)) < len(names)
