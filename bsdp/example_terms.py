"""First-order terms of the scaling factors for every single example of a batch, from one ordinary backward pass.

Identity A of the method: ``s_k dL/ds_k`` of an example is the sum over its positions of ``a_k dL/da_k``, with
features ``a`` between the two layers of a pair. Hooks on these give all examples at once, where the gradient of ``s``
has only their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bsdp.input_watching import watch_gradients
from bsdp.layers import BasisPair


class ExampleTerms:
    """Collects terms per example while its hooks are attached.

    The loss of a batch is taken to be the mean over its examples, which stand on the first axis (several rows in a row
    may belong to one example, as the windows of a Swin transformer do). Calls of one layer in one pass add up.

    Args:
        pairs: The pairs to watch, by name.
        model: The model whose forward is one pass: examples of two passes are not the same. None: all that is seen
            before `settle` belongs to one pass.
    """

    def __init__(self, pairs: Mapping[str, BasisPair], model: nn.Module | None = None) -> None:
        self.pairs, self.model = dict(pairs), model
        self.clear()

    def clear(self) -> None:
        """Forget what was seen since `settle`."""
        self._passes: list[tuple[int | None, dict[str, list[Tensor]]]] = [(None, {})]

    def attach(self, *, scale: float = 1.0, parts: int = 1) -> list[Any]:
        """Add the hooks and return their handles.

        Compiled graphs do not call hooks that were added later: run such a model in `bsdp.compiling.uncompiled`.

        Args:
            scale: What the loss is multiplied with, under mixed precision.
            parts: What the loss is divided by, where gradients of so many batches are accumulated.
        """
        handles = [watch_gradients(pair.scaling, self._sink(name, parts / scale)) for name, pair in self.pairs.items()]
        if self.model is not None:
            handles.append(self.model.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
        return handles

    def _begin_pass(self, _model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = (leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor) and leaf.dim() > 0)
        first = next(tensors, None)
        self._passes.append((None if first is None else len(first), {}))

    def _sink(self, name: str, factor: float) -> Callable[[], Callable[[Tensor, Tensor], None]]:
        dims = self.pairs[name].scaling.dims

        def start() -> Callable[[Tensor, Tensor], None]:
            _, seen = self._passes[-1]  # a backward that comes too late writes to what is gone

            def add(features: Tensor, gradient: Tensor) -> None:
                dtype = torch.promote_types(features.dtype, torch.float32)
                terms = _sum_positions(features.to(dtype) * gradient.to(dtype), dims)
                seen.setdefault(name, []).append(terms * factor)

            return add

        return start

    def settle(self) -> list[Tensor]:
        """Give the terms of every pass with a backward, ``[examples, bases of all pairs]`` each; forget them.

        Pairs without a term in a pass have zeros in it.

        Raises:
            ValueError: If a layer does not have the batch on its first axis.
        """
        passes = [(examples, seen) for examples, seen in self._passes if seen]
        self.clear()
        return [self._terms(examples, seen) for examples, seen in passes]

    def _terms(self, examples: int | None, seen: Mapping[str, Sequence[Tensor]]) -> Tensor:
        rows = {name: [len(value) for value in values] for name, values in seen.items()}
        if examples is None or any(n % examples for counts in rows.values() for n in counts):
            examples = min(n for counts in rows.values() for n in counts)
        odd = next((name for name, counts in rows.items() if any(n % examples for n in counts)), None)
        if odd is not None:
            raise ValueError(
                f"`importance='fisher'` needs the batch on the first axis of every layer's input, but layer {odd!r} "
                f"has {max(rows[odd])} rows there and another one {examples}: choose 'mean_square'."
            )
        like = next(iter(seen.values()))[0]
        parts = []
        for name, pair in self.pairs.items():
            value = like.new_zeros(examples, pair.scaling.delta.numel())
            for term in seen.get(name, ()):
                value = value + term.view(examples, -1, term.shape[-1]).sum(1)
            parts.append(value)
        # The gradients hold the factor 1 / examples of the mean.
        return examples * torch.cat(parts, 1)


def _sum_positions(products: Tensor, dims: int) -> Tensor:
    """Sum over positions, ``[batch, bases, ...]`` (``[batch, ..., bases]`` for linear layers) to ``[batch, bases]``."""
    if products.dim() == dims + 1:  # no batch axis
        products = products[None]
    if dims:
        return products.flatten(2).sum(2)
    return products.reshape(len(products), -1, products.shape[-1]).sum(1)
