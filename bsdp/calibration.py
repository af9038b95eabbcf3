"""Choosing bases by what the layers put out on target data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp._checks import check_choice
from bsdp.factorize import METRICS, refactorize, to_float64
from bsdp.layers import BasisPair
from bsdp.moments import LayerMoment, LayerMoments, as_columns
from bsdp.optimizer_state import forget
from bsdp.plain_layers import SUPPORTED_TYPES, matrix_of, to_matrix, weight_of
from bsdp.probing import as_inputs, probe
from bsdp.shrinkage import is_few, metric_moments, warn_of_few


class OutputMoments(LayerMoments):
    """Running moments of layer outputs before the bias, over examples and positions; layers are given by name."""

    def update(self, layer: nn.Module, output: Tensor) -> None:
        """Add one batch of a layer's outputs, ``[batch, channels, ...]`` (``[..., features]`` for a linear layer)."""
        columns = as_columns(layer, output)
        bias = layer.scaling.bias if isinstance(layer, BasisPair) else layer.bias  # a pair notes who reads its own
        if isinstance(bias, Tensor):
            columns = columns - bias.detach().to(columns)
        self.add(layer, columns)

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Record the forward passes made inside the ``with`` block; the model is in eval mode without gradients."""
        with probe(model, self.layers.values(), lambda layer, _inputs, output: self.update(layer, output)):
            yield


def moment_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every pair and every plain layer outside of pairs, by name."""
    inside = {child for pair in model.modules() if isinstance(pair, BasisPair) for child in pair.children()}
    kinds: tuple[type[nn.Module], ...] = (BasisPair, *SUPPORTED_TYPES)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in inside}


def collect_output_moments(
    model: nn.Module, batches: Iterable[Any], *, layers: Iterable[str] | None = None
) -> dict[str, LayerMoment]:
    """Moments of the outputs of every pair and plain layer of a model, for `decompose` and `rebase`.

    Args:
        model: The model, decomposed or not.
        batches: Inputs of the model: tensors, or tuples of arguments. No labels.
        layers: Names of the layers to look at; None for all.

    Returns:
        The moments by layer name; layers that were never called are left out.

    Raises:
        ValueError: If there is no batch.
    """
    wanted = moment_layers(model) if layers is None else {name: model.get_submodule(name) for name in layers}
    moments, batch = OutputMoments(wanted), None
    with moments.collecting(model):
        for batch in batches:
            model(*as_inputs(batch))
    if batch is None:
        raise ValueError("`batches` is empty: output moments need at least one batch of calibration data.")
    return moments.compute()


@torch.no_grad()
def rebase(
    pairs: Mapping[str, BasisPair],
    moments: Mapping[str, Tensor | LayerMoment] | None = None,
    *,
    metric: str = "activation",
    gradients: Mapping[str, Tensor | LayerMoment] | None = None,
    centred: bool = False,
    shrinkage: float | None = None,
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Give pairs, in place, new bases of the same rank and the same product; scaling factors become 1 again.

    Works at any rank, also after cuts and after weights have trained: the product ``V diag(s sigma) U^T`` is factorised
    anew. Bases are ordered by descending sigma. The bias stays. Layers of which fewer outputs were seen than they have
    bases are named in a warning.

    Args:
        pairs: Pairs by name.
        moments: Moments by the same names, see `collect_output_moments`; a pair without them is left alone. Not needed
            for ``metric="euclidean"``, which makes bases orthonormal again.
        metric: See `decompose`.
        gradients: For ``"kfac"``, see `collect_gradient_moments`; a pair without them is left alone.
        centred: Order bases by the variance of what they put out instead of its power: for cuts that move the mean
            output into the bias.
        shrinkage: How much of white inputs (and white gradients) is mixed into the moments, in [0, 1]; None: as much as
            the spread between examples suggests.
        optimizers: Optimizers whose state (momentum) of the changed parameters is dropped: it belongs to other bases.

    Raises:
        ValueError: If moments are missing or do not fit, or a weight is NaN or infinite.
    """
    check_metric(metric, shrinkage, {"moments": moments, "gradients": gradients})
    optimizers = list(optimizers)
    few = []
    for name, pair in pairs.items():
        moment, gradient = (moments or {}).get(name), (gradients or {}).get(name)
        if (metric != "euclidean" and moment is None) or (metric == "kfac" and gradient is None):
            continue
        try:
            _rebase_pair(pair, metric, moment, gradient, centred=centred, shrinkage=shrinkage)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        few += [name] if metric != "euclidean" and is_few(moment, pair.rank) else []
        changed = (pair.scaling.delta, pair.scaling.weight, weight_of(pair.basis))
        forget(optimizers, changed)
        for parameter in changed:
            parameter.grad = None
    warn_of_few(few)


def check_metric(metric: str, shrinkage: float | None, needed: Mapping[str, object]) -> None:
    """Check a metric, and that what it needs is there.

    Args:
        metric: One of `METRICS`.
        shrinkage: Share of the isotropic target, or None.
        needed: Output moments and gradient moments, in this order, by the names of the arguments.

    Raises:
        ValueError: If something is missing or not allowed.
    """
    check_choice("metric", metric, METRICS)
    check_shrinkage(shrinkage)
    sources = ("bsdp.collect_output_moments", "bsdp.collect_gradient_moments")
    for (name, value), source in list(zip(needed.items(), sources, strict=True))[: METRICS.index(metric)]:
        if value is None:
            raise ValueError(f"`metric={metric!r}` needs `{name}`: see `{source}`.")


def check_shrinkage(shrinkage: float | None) -> None:
    """Refuse a share outside of [0, 1]."""
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"`shrinkage` must be between 0 and 1, or None to estimate it, got {shrinkage}.")


def _rebase_pair(
    pair: BasisPair,
    metric: str,
    moment: Tensor | LayerMoment | None,
    gradient: Tensor | LayerMoment | None,
    *,
    centred: bool,
    shrinkage: float | None,
) -> None:
    # In float64 from the stored factors: their product in the pair's own precision would be rounded once more.
    columns = to_float64(to_matrix(pair.scaling.weight, pair.groups))
    columns = columns * (1.0 + to_float64(pair.scaling.delta).view(pair.groups, 1, pair.rank))
    basis = to_float64(matrix_of(pair.basis))
    ready = metric_moments(columns @ basis, metric, moment, gradient, centred=centred, shrinkage=shrinkage)
    factors = refactorize(columns, basis, metric=metric, moment=ready.moment, gradient=ready.gradient)
    pair.set_factors(factors.basis, factors.coefficients, factors.sigma)
