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
from bsdp.compiling import uncompiled
from bsdp.layers import BasisPair

_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"mean_square": torch.square, "mean_abs": torch.abs}
DATA_FREE = ("magnitude", "sigma_energy")
IMPORTANCES = ("mean_square", "mean_abs", "energy", *DATA_FREE)


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


def sigma_energy(scale: Tensor, sigma: Tensor, *, groups: int = 1) -> Tensor:
    """Share of its layer's energy that a basis and all weaker ones of the layer hold; data-free.

    Removing the lowest of all layers together down to ``1 - t`` leaves every layer the smallest rank whose cumulative
    ``(s sigma)^2`` reaches the share `t`, the same `t` for all layers (Tayyab et al., arXiv 2105.10436).

    Args:
        scale: Scaling factors, ``[groups * rank]``.
        sigma: Norms of the 1x1 weights per basis, ``[groups * rank]``.
        groups: Groups of the layer, each of which is ranked on its own.

    Example:
        >>> sigma_energy(torch.ones(3), torch.tensor([3.0, 1.0, 0.0]))
        tensor([1.0000, 0.1000, 0.0000])
    """
    energies = (scale * sigma).square().view(groups, -1)
    ordered = energies.sort(dim=1, stable=True)
    total = energies.sum(1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)
    shares = ordered.values.cumsum(1) / total
    return torch.empty_like(shares).scatter_(1, ordered.indices, shares).flatten()


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
        features = features.detach().movedim(features.dim() - 1 - dims, 0).flatten(1)  # [bases, positions]
        # Sums grow with the data, so float32 at least; in half precision they would overflow.
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        sums, squares = features.sum(1), features.square().sum(1)
        finite = sums.isfinite().all() & squares.isfinite().all()
        self._add(name, finite * features.shape[1], torch.where(finite, sums, 0), torch.where(finite, squares, 0))

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


class NoScoresError(ValueError):
    """There is nothing to rank by: no step gave finite scores."""


class ScoreAccumulator:
    """Accumulates importance over minibatches.

    Call `update` once per optimizer step, after the backward pass and before clipping and stepping (unscaled under
    mixed precision). A step with a NaN or infinite term counts for nothing.

    Args:
        pairs: The pairs to score, by name.
        importance: ``"mean_square"`` (mean over minibatches of ``(s dL/ds)^2``, the default), ``"mean_abs"``,
            ``"energy"``, ``"magnitude"`` or ``"sigma_energy"``. The last three need no gradient; energy needs
            `statistics` in `compute`.

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
        if not self.needs_gradients:
            return
        deltas = [pair.scaling.delta for pair in self.pairs.values()]
        if all(delta.grad is None for delta in deltas):
            return  # a step that did not concern these pairs, such as another optimizer's
        # One flat vector for all layers: the cost is a handful of kernels however deep the model is.
        gradient = torch.cat([torch.zeros_like(d) if d.grad is None else d.grad for d in deltas]).float()
        value = _TERMS[self.importance](taylor_terms(1.0 + torch.cat(list(deltas)).float(), gradient))
        finite = value.isfinite().all()
        value = torch.where(finite, value, 0.0)
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
            NoScoresError: If no finite gradient was accumulated, `statistics` lacks a layer that ``"energy"`` needs, or
                a score is NaN or infinite.
        """
        scores = self._compute(statistics)
        broken = next((name for name, score in scores.items() if not score.isfinite().all()), None)
        if broken is not None:
            raise NoScoresError(f"scores are NaN or infinite (first in layer {broken!r}): the loss is exploding.")
        return scores

    def _compute(self, statistics: FeatureStatistics | None) -> dict[str, Tensor]:
        if self.importance == "magnitude":
            return {n: magnitude(p.scale, column_norms(p)).float() for n, p in self.pairs.items()}
        if self.importance == "sigma_energy":
            pairs = self.pairs.items()
            return {n: sigma_energy(p.scale, column_norms(p), groups=p.groups).float() for n, p in pairs}
        if self.importance == "energy":
            moments = {} if statistics is None else statistics.second_moments()
            missing = [name for name in self.pairs if name not in moments]
            if missing:
                raise NoScoresError(
                    f"`importance='energy'` needs feature statistics of layer {missing[0]!r}: collect some "
                    "batches with `FeatureStatistics` and pass it to `compute`."
                )
            return {n: energy(p.scale, column_norms(p), moments[n]).float() for n, p in self.pairs.items()}
        if self._sum is None or float(self._steps) == 0:  # a mean over processes may lie between 0 and 1
            raise NoScoresError("no finite gradient was accumulated: call `update` after each backward pass.")
        return dict(zip(self.pairs, torch.split(self._sum / self._steps, self._sizes), strict=True))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes, so that all of them take the same decision."""
        if not self.needs_gradients or not self.pairs:
            return
        device = next(iter(self.pairs.values())).scaling.delta.device
        # A process without any finite step joins with zeros: all must make the same calls.
        total = torch.zeros(sum(self._sizes), device=device) if self._sum is None else self._sum
        self._sum, self._steps = reduce(total), reduce(torch.as_tensor(self._steps, device=device))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"sum": self._sum, "steps": float(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the pairs must have the ranks they had then."""
        self.reset()
        if state["sum"] is not None:
            if state["sum"].numel() != sum(self._sizes):
                raise ValueError("the saved scores belong to a model of other ranks.")
            device = next(iter(self.pairs.values())).scaling.delta.device
            self._sum = state["sum"].to(device)
        self._steps = float(state["steps"])


def column_norms(pair: BasisPair) -> Tensor:
    """Euclidean norms of the frozen 1x1 weights per basis, ``[groups * rank]``: the singular values after an SVD."""
    grouped = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
    norms: Tensor = torch.linalg.vector_norm(grouped, dim=1)
    return norms.flatten()
