"""Whether gradients reach the layers whose scores are made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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
        self.called: set[str] = set()
        self.traced: set[str] = set()  # in a pass that remembers where its outputs come from
        self.reached: set[str] = set()
        self.steps = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the pairs that run inside the ``with`` block."""

        def note(name: str, output: Any) -> None:
            self.called.add(name)
            if isinstance(output, Tensor) and output.requires_grad:
                self.traced.add(name)

        def hook(name: str) -> Any:
            return lambda _module, _inputs, output: note(name, output)

        modules: Mapping[str, nn.Module] = self.pairs
        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note_gradients(self) -> None:
        """Note the pairs whose factors have a gradient now, before a step of an optimizer."""
        self.steps += 1
        self.reached |= {name for name, pair in self.pairs.items() if pair.scaling.delta.grad is not None}

    def check_passes(self) -> None:
        """Refuse pairs that ran without gradients only; call it after the first batch."""
        self._refuse(self.called - self.traced, "they run under `torch.no_grad()` in `training_step`")

    def check_gradients(self) -> None:
        """Refuse pairs that ran and got no gradient in any step; call it after an epoch."""
        if self.steps:
            self._refuse(self.traced - self.reached, "what they put out is detached from the loss")

    def _refuse(self, names: set[str], reason: str) -> None:
        if names:
            first = next(name for name in self.pairs if name in names)
            raise ValueError(
                f"`importance: {self.importance}` is made of gradients, but none reaches {len(names)} decomposed "
                f"layers (first: {first!r}): {reason}, so their bases would be the first to go. Let gradients through, "
                "name these layers in `exclude` of `BasisDecomposition`, or score bases by `importance: energy`."
            )
