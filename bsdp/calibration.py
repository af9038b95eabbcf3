"""Choosing bases by what the layers put out on target data: the activation metric."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp._checks import check_choice
from bsdp.factorize import METRICS, refactorize, to_float64
from bsdp.layers import SUPPORTED_TYPES, BasisPair, matrix_of, spatial_dims, to_matrix, weight_of
from bsdp.probing import as_inputs, probe


class OutputMoments:
    """Running second moments ``E[y y^T]`` of layer outputs before the bias, over examples and positions.

    Args:
        layers: Pairs or plain convolution and linear layers, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._names = {layer: name for name, layer in layers.items()}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, layer: nn.Module, output: Tensor) -> None:
        """Add one batch of a layer's outputs, ``[batch, channels, ...]`` (``[..., features]`` for a linear layer)."""
        dims = layer.scaling.dims if isinstance(layer, BasisPair) else spatial_dims(layer)
        if dims == 0:
            columns = output.reshape(-1, output.shape[-1])
        else:
            batched = output if output.dim() == dims + 2 else output.unsqueeze(0)
            columns = batched.transpose(0, 1).flatten(1).T
        columns = columns.detach().float()
        bias = layer.scaling.bias if isinstance(layer, BasisPair) else layer.bias  # a pair notes who reads its own
        if isinstance(bias, Tensor):
            columns = columns - bias.detach().float()
        name = self._names[layer]
        moment = columns.T @ columns
        self._sums[name] = self._sums[name] + moment.double() if name in self._sums else moment.double()
        self._counts[name] = self._counts.get(name, 0) + columns.shape[0]

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Record the forward passes made inside the ``with`` block; the model is in eval mode without gradients."""
        with probe(model, self.layers.values(), lambda layer, _inputs, output: self.update(layer, output)):
            yield

    def compute(self) -> dict[str, Tensor]:
        """``{name: [channels, channels]}`` in float64; layers that were never called are left out."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}


def collect_output_moments(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Second moments of the outputs of every pair and plain layer of a model, for `decompose` and `rebase`.

    Args:
        model: The model, decomposed or not.
        batches: Inputs of the model: tensors, or tuples of arguments. No labels.
    """
    inside = {child for pair in model.modules() if isinstance(pair, BasisPair) for child in pair.children()}
    kinds: tuple[type[nn.Module], ...] = (BasisPair, *SUPPORTED_TYPES)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m not in inside}
    moments = OutputMoments(layers)
    with moments.collecting(model):
        for batch in batches:
            model(*as_inputs(batch))
    return moments.compute()


@torch.no_grad()
def rebase(
    pairs: Mapping[str, BasisPair],
    moments: Mapping[str, Tensor] | None = None,
    *,
    metric: str = "activation",
    optimizers: Iterable[Optimizer] = (),
) -> None:
    """Give pairs, in place, new bases of the same rank and the same product; scaling factors become 1 again.

    Works at any rank, also after cuts and after weights have trained: the product ``V diag(s sigma) U^T`` is factorised
    anew. Bases are ordered by descending sigma. The bias stays.

    Args:
        pairs: Pairs by name.
        moments: Second moments by the same names, see `collect_output_moments`; a pair without one is left alone.
            Not needed for ``metric="euclidean"``, which makes bases orthonormal again.
        metric: See `decompose`.
        optimizers: Optimizers whose state (momentum) of the changed parameters is dropped: it belongs to other bases.

    Raises:
        ValueError: If the moments are missing or no match, or a weight is NaN or infinite.
    """
    check_choice("metric", metric, METRICS)
    if metric != "euclidean" and moments is None:
        raise ValueError(f"`metric={metric!r}` needs `moments`: see `bsdp.collect_output_moments`.")
    optimizers = list(optimizers)
    for name, pair in pairs.items():
        moment = None if moments is None else moments.get(name)
        if moment is None and metric != "euclidean":
            continue
        try:
            _rebase_pair(pair, metric, moment)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        for parameter in (pair.scaling.delta, pair.scaling.weight, weight_of(pair.basis)):
            parameter.grad = None
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


def _rebase_pair(pair: BasisPair, metric: str, moment: Tensor | None) -> None:
    # In float64 from the stored factors: their product in the pair's own precision would be rounded once more.
    columns = to_float64(to_matrix(pair.scaling.weight, pair.groups))
    scale = 1.0 + to_float64(pair.scaling.delta).view(pair.groups, 1, pair.rank)
    factors = refactorize(columns * scale, to_float64(matrix_of(pair.basis)), metric=metric, moment=moment)
    pair.set_factors(factors.basis, factors.coefficients, factors.sigma)
