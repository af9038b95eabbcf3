"""How much each basis matters: Taylor scores of the scaling factors, and controls.

Removing basis k changes the loss to first order by ``-s_k dL/ds_k`` (Molchanov et al., arXiv 1611.06440 and CVPR 2019,
carried over to scaling factors). Signed terms of a layer cancel, so every score takes the absolute value or the square
per minibatch, before averaging. Scores are non-negative; higher means keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_choice
from bsdp.layers import BasisPair

_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"mean_square": torch.square, "mean_abs": torch.abs}
IMPORTANCES = ("mean_square", "mean_abs", "energy", "magnitude")


def taylor_terms(scale: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when a basis is removed, with its sign reversed: ``s * dL/ds``."""
    return scale * gradient


def energy(scale: Tensor, sigma: Tensor, second_moment: Tensor) -> Tensor:
    """Squared output error of dropping a basis, ``(s sigma)^2 E[a^2]``; exact and additive when V is orthonormal.

    Args:
        scale: Scaling factors, ``[bases]``.
        sigma: Norms of the 1x1 weights per basis, ``[bases]``.
        second_moment: ``E[a^2]`` of the basis layer's outputs over examples and positions, ``[bases]``.
    """
    return (scale * sigma).square() * second_moment


def magnitude(scale: Tensor, sigma: Tensor) -> Tensor:
    """Data-free control: ``abs(s * sigma)``."""
    return (scale * sigma).abs()


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
        self.counts = {name: 0.0 for name in self.pairs}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def update(self, name: str, features: Tensor) -> None:
        """Add one batch of basis-layer outputs, ``[batch, bases, ...]`` (``[..., bases]`` for a linear layer)."""
        features = features.detach()
        axis = features.dim() - 1 if self.pairs[name].scaling.dims == 0 else features.dim() - 1 - self.pairs[name].scaling.dims
        others = [d for d in range(features.dim()) if d != axis]
        mean = features.mean(others, dtype=torch.float32)
        square = features.float().square().mean(others) if features.dtype != torch.float64 else features.square().mean(others)
        if name not in self.sums:
            self.sums[name], self.squares[name] = torch.zeros_like(mean), torch.zeros_like(square)
        # Sums of batch means: batches are of equal size but the last, and no running count overflows in half precision.
        weight = float(features.shape[0]) if features.dim() > 1 else 1.0
        self.sums[name] += weight * mean
        self.squares[name] += weight * square
        self.counts[name] += weight

    def means(self) -> dict[str, Tensor]:
        """``E[a]`` per layer, ``[groups * rank]``; layers without any batch are left out."""
        return {name: value / self.counts[name] for name, value in self.sums.items()}

    def second_moments(self) -> dict[str, Tensor]:
        """``E[a^2]`` per layer, ``[groups * rank]``; layers without any batch are left out."""
        return {name: value / self.counts[name] for name, value in self.squares.items()}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Record every forward pass made inside the ``with`` block."""
        handles = self.attach()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attach(self) -> list[Any]:
        """Add the hooks and return their handles, for callers whose start and end are different events."""

        def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _inputs, output: self.update(name, output)

        return [pair.basis.register_forward_hook(hook(name)) for name, pair in self.pairs.items()]

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes."""
        for name in self.sums:
            self.sums[name], self.squares[name] = reduce(self.sums[name]), reduce(self.squares[name])

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"counts": dict(self.counts), "sums": dict(self.sums), "squares": dict(self.squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.counts = {name: float(state["counts"].get(name, 0.0)) for name in self.pairs}
        device = {name: pair.scaling.delta.device for name, pair in self.pairs.items()}
        self.sums = {n: v.to(device[n]) for n, v in state["sums"].items() if n in self.pairs}
        self.squares = {n: v.to(device[n]) for n, v in state["squares"].items() if n in self.pairs}


class ScoreAccumulator:
    """Accumulates importance over minibatches.

    Call `update` once per optimizer step, after the backward pass and before clipping and stepping (unscaled under
    mixed precision). A step with a NaN or infinite term counts for nothing.

    Args:
        pairs: The pairs to score, by name.
        importance: ``"mean_square"`` (mean over minibatches of ``(s dL/ds)^2``, the default), ``"mean_abs"``,
            ``"energy"`` or ``"magnitude"``. The last two need no gradient; energy needs `statistics` in `compute`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = bsdp.decompose(model)
        >>> scores = bsdp.ScoreAccumulator(bsdp.named_pairs(model))
        >>> model(torch.ones(4, 8)).square().sum().backward()
        >>> scores.update()
        >>> scores.compute()["0"].shape
        torch.Size([8])
    """

    def __init__(self, pairs: Mapping[str, BasisPair], *, importance: str = "mean_square") -> None:
        check_choice("importance", importance, IMPORTANCES)
        self.pairs = dict(pairs)
        self.importance = importance
        self.reset()

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must be called with gradients in place."""
        return self.importance in _TERMS

    def reset(self) -> None:
        """Forget everything; call it after the ranks have changed."""
        self._sizes = [pair.scaling.delta.numel() for pair in self.pairs.values()]
        self._sum: Tensor | None = None
        self._steps: Tensor | float = 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Add the terms of the gradients that stand in ``delta.grad`` now."""
        if not self.needs_gradients or not self.pairs:
            return
        deltas = [pair.scaling.delta for pair in self.pairs.values()]
        # One flat vector for all layers: the cost is a handful of kernels however deep the model is.
        gradient = torch.cat([torch.zeros_like(d) if d.grad is None else d.grad for d in deltas]).float()
        term = taylor_terms(1.0 + torch.cat(list(deltas)).float(), gradient)
        finite = term.isfinite().all()
        value = torch.where(finite, _TERMS[self.importance](term), 0.0)
        self._sum = value if self._sum is None else self._sum + value
        self._steps = self._steps + finite.float()

    @property
    def steps(self) -> int:
        """Minibatches that counted so far."""
        return int(self._steps)

    @torch.no_grad()
    def compute(self, statistics: FeatureStatistics | None = None) -> dict[str, Tensor]:
        """Importance of every basis.

        Args:
            statistics: Feature statistics of the same pairs, for ``"energy"``.

        Returns:
            ``{layer name: [groups * rank]}``, float32.

        Raises:
            ValueError: If nothing was accumulated.
        """
        if self.importance == "magnitude":
            return {n: magnitude(p.scale, column_norms(p)).float() for n, p in self.pairs.items()}
        if self.importance == "energy":
            moments = {} if statistics is None else statistics.second_moments()
            missing = [name for name in self.pairs if name not in moments]
            if missing:
                raise ValueError(
                    f"`importance='energy'` needs feature statistics of layer {missing[0]!r}: collect some batches with "
                    "`FeatureStatistics` and pass it to `compute`."
                )
            return {n: energy(p.scale, column_norms(p), moments[n]).float() for n, p in self.pairs.items()}
        if self._sum is None or self.steps == 0:
            raise ValueError("no finite gradient was accumulated: call `update` after each backward pass.")
        return dict(zip(self.pairs, (self._sum / self._steps).split(self._sizes), strict=True))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes, so that all of them take the same decision."""
        if self._sum is not None:
            self._sum, self._steps = reduce(self._sum), reduce(torch.as_tensor(self._steps, device=self._sum.device))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"sum": self._sum, "steps": float(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the pairs must have the ranks they had then."""
        self.reset()
        if state["sum"] is not None:
            if len(state["sum"]) != sum(self._sizes):
                raise ValueError("the saved scores belong to a model of other ranks.")
            device = next(iter(self.pairs.values())).scaling.delta.device
            self._sum = state["sum"].to(device)
        self._steps = float(state["steps"])


def column_norms(pair: BasisPair) -> Tensor:
    """Euclidean norms of the frozen 1x1 weights per basis, ``[groups * rank]``: the singular values after an SVD."""
    grouped = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
    return grouped.norm(dim=1).flatten()
