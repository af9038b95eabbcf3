"""Means and second moments of the features between the two layers of each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.compiling import uncompiled
from bsdp.layers import BasisPair


class FeatureStatistics:
    """Running mean and second moment of the features between the two layers of each pair.

    They give the ``"energy"`` score and the means that `prune` moves into biases. Hooks are on the basis layers while
    `collecting` is open; nothing is recorded outside of it.

    Args:
        pairs: The pairs to watch, by name.
    """

    def __init__(self, pairs: Mapping[str, BasisPair]) -> None:
        self.pairs = dict(pairs)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.counts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def update(self, name: str, features: Tensor) -> None:
        """Add one batch of basis-layer outputs, ``[batch, bases, ...]`` (``[..., bases]`` for a linear layer).

        A batch with NaN or infinity counts for nothing.
        """
        dims = self.pairs[name].scaling.dims
        if features.dim() == dims + 1:  # no batch axis
            features = features[None]
        over = [axis for axis in range(features.dim()) if axis != features.dim() - 1 - dims]
        # Sums grow with the data, so float32 at least; in half precision they would overflow. As they lie in memory.
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        sums, squares = features.sum(over), features.square().sum(over)
        finite = sums.isfinite().all() & squares.isfinite().all()
        count = features.numel() // len(sums)
        self._add(name, finite * count, torch.where(finite, sums, 0), torch.where(finite, squares, 0))

    def _add(self, name: str, count: Tensor, sums: Tensor, squares: Tensor) -> None:
        # Out of place: a state dict taken earlier must not change.
        for total, value in ((self.counts, count), (self.sums, sums), (self.squares, squares)):
            total[name] = total[name] + value if name in total else value

    def means(self) -> dict[str, Tensor]:
        """``E[a]`` per layer, ``[groups * rank]``; layers without any batch are left out."""
        return {name: value / self.counts[name] for name, value in self.sums.items() if self.counts[name] > 0}

    def second_moments(self) -> dict[str, Tensor]:
        """``E[a^2]`` per layer, ``[groups * rank]``; layers without any batch are left out."""
        return {name: value / self.counts[name] for name, value in self.squares.items() if self.counts[name] > 0}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Record every forward pass made inside the ``with`` block."""
        handles = self.attach()
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self) -> list[Any]:
        """Add the hooks and return their handles, for callers whose start and end are different events.

        Compiled graphs do not call hooks that were added later: run such a model in `bsdp.compiling.uncompiled`.
        """

        def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _inputs, output: self.update(name, output)

        return [pair.basis.register_forward_hook(hook(name)) for name, pair in self.pairs.items()]

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums and counts by their mean over processes."""
        for name, pair in self.pairs.items():
            # A process that saw no batch of a layer joins with zeros: all must make the same calls.
            zeros = torch.zeros_like(pair.scaling.delta, dtype=torch.float32)
            self._add(name, zeros.sum(), zeros, zeros)
            for total in (self.counts, self.sums, self.squares):
                total[name] = reduce(total[name].to(torch.promote_types(total[name].dtype, torch.float32)))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"counts": dict(self.counts), "sums": dict(self.sums), "squares": dict(self.squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the pairs must have the ranks they had then."""
        self.reset()
        for name, pair in self.pairs.items():
            if name in state["sums"]:
                if len(state["sums"][name]) != pair.scaling.delta.numel():
                    raise ValueError(f"the saved feature statistics belong to another rank of layer {name!r}.")
                device = pair.scaling.delta.device
                self._add(name, *(state[key][name].to(device) for key in ("counts", "sums", "squares")))
