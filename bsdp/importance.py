"""How much each basis matters: Taylor scores of the scaling factors, and controls.

Removing basis k changes the loss to first order by ``-s_k dL/ds_k`` (Molchanov et al., arXiv 1611.06440 and CVPR 2019,
carried over to scaling factors), and to second order by ``-s_k dL/ds_k + s_k^2 / 2 d^2L/ds_k^2``. Signed terms of a
layer cancel, so every score takes the absolute value or the square per minibatch, or per example, before averaging.
Scores are non-negative; higher means keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bsdp._checks import check_choice
from bsdp.compiling import uncompiled
from bsdp.curvature import Closure, measure_curvature
from bsdp.example_terms import ExampleTerms
from bsdp.feature_statistics import FeatureStatistics
from bsdp.layers import BasisPair
from bsdp.plain_layers import matrix_of, weight_of

_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"mean_square": torch.square, "mean_abs": torch.abs}
DATA_FREE = ("magnitude", "sigma_energy")
Importance = Literal["mean_square", "mean_abs", "fisher", "second_order", "energy", "magnitude", "sigma_energy"]
IMPORTANCES = get_args(Importance)


def taylor_terms(scale: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when a basis is removed, with its sign reversed: ``s * dL/ds``."""
    return scale * gradient


def second_order(scale: Tensor, gradient: Tensor, diagonal: Tensor) -> Tensor:
    """Change of the loss when a basis is removed, to second order: ``abs(-s g + s^2 h / 2)``.

    Args:
        scale: Scaling factors, ``[bases]``.
        gradient: ``dL/ds`` of a minibatch, ``[bases]``.
        diagonal: ``d^2L/ds^2`` of the same minibatch, ``[bases]``.
    """
    return (scale * (0.5 * scale * diagonal - gradient)).abs()


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


class NoScoresError(ValueError):
    """There is nothing to rank by: no step gave finite scores."""


class ScoreAccumulator:
    """Accumulates importance over minibatches or examples. A minibatch with a NaN or infinite term counts for nothing.

    ================= ==================================================== ===========================================
    importance        mean of                                              what has to be called
    ================= ==================================================== ===========================================
    ``mean_square``   ``(s dL/ds)^2`` over minibatches (the default)       `update` once per optimizer step
    ``mean_abs``      ``abs(s dL/ds)`` over minibatches                    `update` once per optimizer step
    ``fisher``        ``(s dL/ds)^2`` over single examples                 `collecting` open on some or all batches
    ``second_order``  ``abs(-s g + s^2 h / 2)`` over minibatches           `update_curvature`, shortly before `compute`
    ``energy``        ``(s sigma a)^2`` over examples and positions        `compute` with feature statistics
    ``magnitude``     nothing: ``abs(s sigma)``                            nothing
    ``sigma_energy``  nothing: see `sigma_energy`                          nothing
    ================= ==================================================== ===========================================

    ``fisher`` is the diagonal of the empirical Fisher matrix times ``s^2`` (Theis et al., arXiv 1801.05787); it takes
    as many terms from a few minibatches as these have examples. In ``second_order`` the diagonal of the Hessian is
    estimated per minibatch, see `bsdp.curvature`. The absolute value of each minibatch's own estimate ranked better
    than that of the means over all minibatches, on a network for digits where every basis was removed in turn.

    Args:
        pairs: The pairs to score, by name.
        importance: One of the above.
        model: For ``"fisher"``, the model whose forward is one pass, see `ExampleTerms`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = bsdp.decompose(model)
        >>> scores = bsdp.ScoreAccumulator(bsdp.named_pairs(model))
        >>> model(torch.ones(4, 8)).square().sum().backward()
        >>> scores.update()
        >>> scores.compute()["0"].shape
        torch.Size([8])
    """

    def __init__(
        self, pairs: Mapping[str, BasisPair], *, importance: str = "mean_square", model: nn.Module | None = None
    ) -> None:
        check_choice("importance", importance, IMPORTANCES)
        self.pairs = dict(pairs)
        self.importance = importance
        self._terms = ExampleTerms(self.pairs, model)
        self.reset()

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must be called with gradients in place."""
        return self.importance in _TERMS

    @property
    def needs_hooks(self) -> bool:
        """Whether `collecting` must be open on some batches."""
        return self.importance == "fisher"

    @property
    def needs_curvature(self) -> bool:
        """Whether `update_curvature` must be called on some minibatches before `compute`."""
        return self.importance == "second_order"

    @property
    def unit(self) -> str:
        """What `steps` counts."""
        return "examples" if self.needs_hooks else "minibatches"

    def reset(self) -> None:
        """Forget everything; call it after the ranks have changed."""
        self._sizes = [pair.scaling.delta.numel() for pair in self.pairs.values()]
        self._sum: Tensor | None = None
        self._steps: Tensor | float = 0.0
        self._terms.clear()

    @torch.no_grad()
    def update(self) -> None:
        """Add the terms of the gradients that stand in ``delta.grad`` now; nothing for the other scores.

        Call it after the backward pass and before clipping and stepping (unscaled under mixed precision).
        """
        if not self.needs_gradients:
            return
        deltas = self._deltas()
        if all(delta.grad is None for delta in deltas):
            return  # a step that did not concern these pairs, such as another optimizer's
        # One flat vector for all layers: the cost is a handful of kernels however deep the model is.
        gradient = torch.cat([torch.zeros_like(d) if d.grad is None else d.grad for d in deltas]).float()
        self._add(_TERMS[self.importance](taylor_terms(self._scale(), gradient)), 1)

    @contextmanager
    def collecting(self, scale: float = 1.0, parts: int = 1) -> Iterator[None]:
        """Watch one batch, forward and backward, inside the ``with`` block, for ``"fisher"``.

        Args:
            scale: What the loss is multiplied with, under mixed precision.
            parts: What the loss is divided by, where gradients of so many batches are accumulated.
        """
        handles = self._terms.attach(scale=scale, parts=parts) if self.needs_hooks else []
        try:
            with uncompiled():
                yield
        except BaseException:
            self._terms.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()
        for terms in self._terms.settle():
            self._add(terms.float().square().sum(0), len(terms))

    def update_curvature(self, closure: Closure, *, samples: int = 2, generator: torch.Generator | None = None) -> None:
        """Add the terms of one minibatch, for ``"second_order"``; gradients that stand in ``grad`` stay as they are.

        Args:
            closure: Gives the loss of the minibatch, the same one whenever it is called; without a backward pass.
            samples: Vectors of signs for Hutchinson's estimate.
            generator: Where the signs come from.
        """
        found = measure_curvature(closure, self._deltas(), samples=samples, generator=generator)
        self._add(second_order(self._scale(), found.gradient.float(), found.diagonal.float()), 1)

    @property
    def steps(self) -> int:
        """Minibatches (examples for ``"fisher"``) that counted so far."""
        return int(self._steps)

    def _deltas(self) -> list[nn.Parameter]:
        return [pair.scaling.delta for pair in self.pairs.values()]

    def _scale(self) -> Tensor:
        return 1.0 + torch.cat([delta.detach() for delta in self._deltas()]).float()

    def _add(self, value: Tensor, count: int) -> None:
        finite = value.isfinite().all()
        value = torch.where(finite, value, 0.0)
        self._sum = value if self._sum is None else self._sum + value
        self._steps = self._steps + finite.float() * count

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
            return {n: magnitude(p.scale, basis_norms(p)).float() for n, p in self.pairs.items()}
        if self.importance == "sigma_energy":
            pairs = self.pairs.items()
            return {n: sigma_energy(p.scale, basis_norms(p), groups=p.groups).float() for n, p in pairs}
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
            raise NoScoresError(_ADVICE.get(self.importance, _ADVICE["mean_square"]))
        return dict(zip(self.pairs, torch.split(self._sum / self._steps, self._sizes), strict=True))

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over processes, so that all of them take the same decision."""
        if self.importance in ("energy", *DATA_FREE) or not self.pairs:
            return
        device = next(iter(self.pairs.values())).scaling.delta.device
        # A process without any finite step joins with zeros: all must make the same calls.
        total = torch.zeros(sum(self._sizes), device=device) if self._sum is None else self._sum
        self._sum, self._steps = reduce(total), reduce(torch.as_tensor(self._steps, device=device))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"importance": self.importance, "sum": self._sum, "steps": float(self._steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the pairs must have the ranks they had then.

        Sums of another kind of importance are left out.
        """
        self.reset()
        if state.get("importance", self.importance) != self.importance:
            return
        if state["sum"] is not None:
            if state["sum"].numel() != sum(self._sizes):
                raise ValueError("the saved scores belong to a model of other ranks.")
            device = next(iter(self.pairs.values())).scaling.delta.device
            self._sum = state["sum"].to(device)
        self._steps = float(state["steps"])


_ADVICE = {
    "mean_square": "no finite gradient was accumulated: call `update` after each backward pass.",
    "fisher": "no finite gradient of any example was seen: keep `collecting` open during some batches.",
    "second_order": "no finite curvature was measured: call `update_curvature` on some minibatches.",
}


def column_norms(pair: BasisPair) -> Tensor:
    """Euclidean norms of the 1x1 weights per basis, ``[groups * rank]``: the singular values after an SVD."""
    grouped = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
    norms: Tensor = torch.linalg.vector_norm(grouped, dim=1)
    return norms.flatten()


def basis_norms(pair: BasisPair) -> Tensor:
    """Size of every basis without its factor, ``[groups * rank]``: the singular values after an SVD.

    While weights are frozen that is `column_norms`. Where they train, `bsdp.condition_factors` has moved lengths
    between the two layers, and the size is the norm of what the basis adds to the weight, whichever layer holds it.
    """
    filters = weight_of(pair.basis)
    if not (filters.requires_grad or pair.scaling.weight.requires_grad):
        return column_norms(pair)
    lengths: Tensor = torch.linalg.vector_norm(matrix_of(pair.basis).detach(), dim=2)
    return column_norms(pair) * lengths.flatten()
