"""Getting along with ``torch.compile``, whose graphs may not notice that hooks come and go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def inside_compiled(model: nn.Module) -> str:
    """Name of the module that a ``torch.compile(module)`` wraps, relative to it; "" for any other module."""
    return "_orig_mod" if _is_wrapper(model) else ""


def has_compiled(model: nn.Module) -> bool:
    """Whether a model, or a part of it, runs by compiled graphs of its own."""
    return any(_is_wrapper(m) or any(_is_compiled(value) for value in vars(m).values()) for m in model.modules())


def plain_name(name: str) -> str:
    """A dotted name without what ``torch.compile`` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@contextmanager
def uncompiled(model: nn.Module | None = None) -> Iterator[None]:
    """Run everything without compiled graphs: hooks are seen, and tracers do not stumble.

    Args:
        model: Give this model, which may be copied meanwhile, its plain methods back for as long.
    """
    if not _dynamo_is_loaded():
        yield
        return
    modules = [] if model is None else [module for module in model.modules() if not _is_wrapper(module)]
    keys = ("forward", "_compiled_call_impl")
    taken = [(m, k, m.__dict__.pop(k)) for m in modules for k in keys if _is_compiled(m.__dict__.get(k))]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, key, value in taken:
            module.__dict__[key] = value


def forget_graphs() -> None:
    """Let compiled graphs go after a change of shapes: they fit no more, and only eight per function are allowed."""
    if _dynamo_is_loaded():
        torch.compiler.reset()


def _dynamo_is_loaded() -> bool:
    # Nothing can be compiled before it is, and importing it takes a second.
    return "torch._dynamo" in sys.modules


def _is_wrapper(module: nn.Module) -> bool:
    return _dynamo_is_loaded() and isinstance(module, torch._dynamo.OptimizedModule)


def _is_compiled(function: object) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")
