"""Turning a decomposed model into one of plain `torch.nn` layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.cost import layer_cost
from bsdp.diff_pruning import detach_deltas
from bsdp.factorize import to_float64
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import GEOMETRY, from_matrix, matrix_of, new_layer, new_pointwise, to_matrix, weight_of
from bsdp.scale_hooks import fold_scales
from bsdp.surgery import copy_hooks, move_hooks, replace_modules
from bsdp.widths import forget_widths


def fold(model: nn.Module) -> nn.Module:
    """Copy a model with every pair replaced by the cheaper of two plain forms; the outputs are the same.

    Below its break-even rank a pair becomes ``nn.Sequential(basis, pointwise)`` with the scaling factors absorbed into
    the 1x1 weights; otherwise one re-fused layer of the original kind. The given model is left alone. The copy has no
    trace of ``bsdp``: it pickles, exports and runs without this package. Hooks are copied, those of a pair to what
    stands in its place; only hooks inside of a pair (on ``basis`` or ``scaling``) stay behind.

    Code of the model that reads the weight or bias of a layer finds none on two layers in a row. Pairs that were seen
    to be read so stay one layer: give `decompose` or `measure_cost` an example input before bases are removed.

    Args:
        model: A decomposed model; a model without pairs is simply copied.

    Returns:
        The folded copy, in the same train or eval mode, all its parameters requiring gradients.
    """
    # deepcopy takes the folded layer wherever it meets the pair, so pairs are never copied and shared ones stay shared.
    pairs = {pair: fold_pair(pair) for pair in named_pairs(model).values()}
    memo: dict[int, Any] = {id(pair): layer for pair, layer in pairs.items()}
    folded = copy.deepcopy(model, memo)
    for pair, layer in pairs.items():
        copy_hooks(pair, layer, memo)
    fold_scales(folded)
    detach_deltas(folded, merge=True)
    forget_widths(folded)
    for parameter in folded.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return folded


@torch.no_grad()
def fold_pair(pair: BasisPair) -> nn.Module:
    """The plain form of one pair, see `fold`. Products are taken in float64 and rounded once."""
    layer = empty_folded(pair, kind=layer_cost(pair).kind(pair.rank), rank=pair.rank, bias=pair.needs_bias)
    basis, scaling = weight_of(pair.basis), pair.scaling
    scale = 1.0 + to_float64(scaling.delta).view(pair.groups, 1, -1)
    coefficients = to_matrix(to_float64(scaling.weight), pair.groups) * scale
    last = layer
    if isinstance(layer, nn.Sequential):
        weight_of(layer[0]).copy_(basis)
        last = layer[1]
        weight_of(last).copy_(coefficients.reshape(weight_of(last).shape))
    else:
        product = coefficients @ to_float64(matrix_of(pair.basis))
        weight_of(layer).copy_(from_matrix(product, basis.shape[2:], transposed=pair.transposed))
    if isinstance(last.bias, Tensor):
        last.bias.copy_(scaling.bias)
    return layer.train(pair.training)


def empty_folded(layer: nn.Module, *, kind: str, rank: int, bias: bool) -> nn.Module:
    """The plain form of a layer or pair with undefined values.

    Args:
        layer: An original layer or a pair; only its geometry is read.
        kind: ``"pair"`` or ``"fused"``.
        rank: Basis vectors per group, for a pair.
        bias: Whether the (last) layer has a bias.
    """
    pair = layer if isinstance(layer, BasisPair) else BasisPair(layer, rank=1)
    weight, groups = pair.scaling.weight, pair.groups
    factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    outputs, features = weight.shape[0], groups * rank
    folded = new_layer(pair, outputs, bias=bias, **factory)
    if kind == "pair":
        pointwise = new_pointwise(pair, features, outputs, bias=bias, **factory)
        folded = nn.Sequential(new_layer(pair, features, bias=False, **factory), pointwise)
        for name in GEOMETRY:  # models read sizes and strides of their layers
            if hasattr(pair, name):
                setattr(folded, name, getattr(pair, name))
    return folded.train(layer.training)


def refuse_pairs(model: nn.Module) -> None:
    """Refuse a model that still has pairs where a plain one is needed."""
    names = list(named_pairs(model))
    if names:
        raise ValueError(f"the model is decomposed (layer {names[0]!r} is a pair); call `bsdp.fold(model)` first.")


def unfold_into(model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a plain original model the folded structure of a plan, in place, with undefined values.

    Args:
        model: The original architecture.
        plan: ``{layer name: {"kind": "pair" | "fused", "rank": int, "bias": bool}}``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    replacements = {
        modules[name]: empty_folded(modules[name], kind=entry["kind"], rank=entry["rank"], bias=entry["bias"])
        for name, entry in plan.items()
    }
    replace_modules(model, replacements)
    for old, new in replacements.items():
        move_hooks(old, new)
