"""Removing channels from the real model; parameters keep their identity, so optimizers that hold them go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.channel_group import ModuleChange
from bsdp.factorize import factorize, to_float64
from bsdp.layers import BasisPair, column_matrix
from bsdp.optimizer_state import cut_state, forget
from bsdp.plain_layers import SUPPORTED_TYPES, from_matrix, set_data, to_matrix, weight_of
from bsdp.widths import mark_widths


@torch.no_grad()
def remove_channels(
    model: nn.Module, changes: Mapping[str, ModuleChange], *, optimizers: Iterable[Optimizer] = ()
) -> None:
    """Carry out what `plan_removal` found, in place.

    Plain layers lose the same elements in their weights and in what the optimizers hold for them. A pair is multiplied
    out, cut and decomposed again at the highest rank it can still have, without loss; its scaling factors are then 1
    and their momentum starts anew.

    Args:
        model: The model the changes were planned for.
        changes: From `plan_removal`.
        optimizers: Optimizers to keep in step.
    """
    optimizers = list(optimizers)
    done: set[nn.Parameter] = set()  # layers may share one
    for name, change in changes.items():
        module = model.get_submodule(name) if name else model
        mark_widths(module)
        if isinstance(module, BasisPair):
            _cut_pair(module, change, optimizers)
            continue
        for key, index in change.tensors.items():
            tensor = getattr(module, key)
            if tensor not in done:
                _gather(module, key, index, optimizers)
            if isinstance(tensor, nn.Parameter):
                done.add(tensor)
        for key, value in change.attributes.items():
            setattr(module, key, value)
    for name in {name.rpartition(".")[0] for name in changes}:
        _follow_layers(model.get_submodule(name))


def _follow_layers(sequence: nn.Module) -> None:
    """Let the two layers that `fold` puts in the place of one say the sizes of their ends, as that one did.

    Others that say sizes, such as torchvision's convolution with norm and activation, are of classes of their own.
    """
    if type(sequence) is not nn.Sequential or not all(isinstance(layer, SUPPORTED_TYPES) for layer in sequence):
        return
    ends = {"in_channels": 0, "in_features": 0, "out_channels": -1, "out_features": -1}
    for key in ends.keys() & vars(sequence).keys():
        mark_widths(sequence)
        setattr(sequence, key, getattr(sequence[ends[key]], key))


def _gather(module: nn.Module, key: str, index: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Keep the elements of a parameter or buffer that `index` names, and the same of its optimizer state."""
    old = getattr(module, key)
    shape = old.shape
    kept = _elements(old.detach(), index)
    if not isinstance(old, nn.Parameter):
        module._buffers[key] = kept
        return
    set_data(old, kept)
    cut_state(optimizers, old, shape, partial(_elements, index=index))


def _elements(value: Tensor, index: Tensor) -> Tensor:
    return value.flatten()[index.to(value.device).flatten()].view(index.shape)


def _cut_pair(pair: BasisPair, change: ModuleChange, optimizers: Iterable[Optimizer]) -> None:
    index, kernel = change.tensors["weight"], weight_of(pair.basis).shape[2:]
    product = to_float64(pair.product)
    weight = from_matrix(product, kernel, transposed=pair.transposed)
    matrix = to_matrix(_elements(weight, index), pair.groups, transposed=pair.transposed)
    outputs = change.tensors.get("bias")
    bias = pair.scaling.bias.detach()
    keep = torch.arange(len(bias)) if outputs is None else outputs
    bias = bias[keep.to(bias.device)]
    rank = min(pair.rank, *matrix.shape[1:])
    if _is_orthonormal(pair):
        factors = factorize(matrix)
    else:  # the activation metric: V diag(sigma^2) V^T is the second moment of the outputs
        columns = to_float64(column_matrix(pair))
        moments = torch.block_diag(*(columns @ columns.mT))  # type: ignore[no-untyped-call]
        factors = factorize(matrix, metric="activation", moment=moments[keep][:, keep])
    pair.set_widths(_inputs(index, pair), len(bias), rank)
    pair.set_factors(factors.basis[:, :rank], factors.coefficients[:, :, :rank], factors.sigma[:, :rank])
    set_data(pair.scaling.bias, bias.contiguous())
    changed = [pair.scaling.delta, pair.scaling.weight, weight_of(pair.basis)]
    forget(optimizers, changed if outputs is None else [*changed, pair.scaling.bias])


def _inputs(index: Tensor, pair: BasisPair) -> int:
    return index.shape[0] if pair.transposed else index.shape[1] * pair.groups


def _is_orthonormal(pair: BasisPair) -> bool:
    basis = to_float64(to_matrix(weight_of(pair.basis), pair.groups, transposed=pair.transposed))
    eye = torch.eye(pair.rank, dtype=basis.dtype, device=basis.device)
    return bool((basis @ basis.mT - eye).abs().max() < 1e-3)
