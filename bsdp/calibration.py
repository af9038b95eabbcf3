"""Choosing bases by what the layers put out on target data: the activation metric."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.factorize import factorize
from bsdp.layers import SUPPORTED_TYPES, BasisPair, spatial_dims
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
def rebase(pairs: Mapping[str, BasisPair], moments: Mapping[str, Tensor]) -> None:
    """Give pairs at full rank, in place, the bases of the activation metric; their function does not change.

    Scaling factors become 1 again. Pairs without a moment are left alone.

    Args:
        pairs: Pairs by name, all at full rank.
        moments: Second moments by the same names, see `collect_output_moments`.

    Raises:
        ValueError: If a pair was pruned already.
    """
    for name, pair in pairs.items():
        if name not in moments:
            continue
        if pair.rank != pair.full_rank:
            raise ValueError(f"layer {name!r} has rank {pair.rank} of {pair.full_rank}: rebase before pruning.")
        factors = factorize(pair.product, metric="activation", moment=moments[name])
        pair.set_factors(factors.basis, factors.coefficients, factors.sigma)
