"""Getting along with ``torch.compile``, whose graphs may not notice that hooks come and go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def inside_compiled(model: nn.Module) -> str:
    """Name of the module that a ``torch.compile(module)`` wraps, relative to it; "" for any other module."""
    return "_orig_mod" if _dynamo_is_loaded() and isinstance(model, torch._dynamo.OptimizedModule) else ""


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run everything without compiled graphs: hooks are seen, and tracers do not stumble."""
    if not _dynamo_is_loaded():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_graphs() -> None:
    """Let compiled graphs go after a change of shapes: they fit no more, and only eight per function are allowed."""
    if _dynamo_is_loaded():
        torch.compiler.reset()


def _dynamo_is_loaded() -> bool:
    # Nothing can be compiled before it is, and importing it takes a second.
    return "torch._dynamo" in sys.modules
