"""Whether gradients reach the layers whose scores are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from bsdp.layers import BasisPair


class GradientReach:
    """Sees which pairs run in training, and which of them get a gradient.

    A layer that runs under ``torch.no_grad()`` scores zero like one that does not matter, and would be the first to go.

    Args:
        pairs: The pairs, by name.
        importance: What is made of the gradients, for errors.
    """

    def __init__(self, pairs: Mapping[str, BasisPair], importance: str) -> None:
        self.pairs, self.importance = pairs, importance
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget what was seen: scores are those of one epoch."""
        self.called: set[str] = set()
        self.reached: set[str] = set()
        self.steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the pairs that run inside the ``with`` block."""
        modules: Mapping[str, nn.Module] = self.pairs
        handles = [module.register_forward_hook(self._noting(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, name: str) -> Any:
        return lambda _module, _inputs, _output: self.called.add(name)

    def note_gradients(self) -> None:
        """Note the pairs whose factors have a gradient now, before a step of an optimizer."""
        self.steps += 1
        if self.called and self.called <= self.reached:
            return  # nothing to find out any more: this runs in every step
        self.reached |= {name for name, pair in self.pairs.items() if pair.scaling.delta.grad is not None}

    def problem(self) -> str:
        """What is wrong with the pairs that ran in this epoch and got no gradient in any step; "" without any."""
        names = self.called - self.reached if self.steps else set()
        if not names:
            return ""
        first = next(name for name in self.pairs if name in names)
        return (
            f"`importance: {self.importance}` is made of gradients, but in this epoch none reached {len(names)} "
            f"decomposed layers that ran (first: {first!r}): they run under `torch.no_grad()`, or are detached from "
            "the loss. Their bases would be the first to go. Let gradients through, name these layers in `exclude` of "
            "`BasisDecomposition` (or what is to be pruned in `backbone`), or score bases by `importance: energy`."
        )
