"""Turning a decomposed model into one of plain `torch.nn` layers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bsdp.cost import layer_cost
from bsdp.layers import BasisPair, named_pairs
from bsdp.surgery import replace_modules


def fold(model: nn.Module) -> nn.Module:
    """Copy a model with every pair replaced by the cheaper of two plain forms; the outputs are the same.

    Below its break-even rank a pair becomes ``nn.Sequential(basis, pointwise)`` with the scaling factors absorbed into
    the 1x1 weights; otherwise one re-fused layer of the original kind. The given model is left alone. A pair followed
    only by nothing that trains keeps no trace of ``bsdp``: the copy pickles, exports and runs without this package.

    Args:
        model: A decomposed model; a model without pairs is simply copied.

    Returns:
        The folded copy, in the same train or eval mode, all its parameters requiring gradients.
    """
    if isinstance(model, BasisPair):
        return fold_pair(model)
    folded = {pair: fold_pair(pair) for pair in named_pairs(model).values()}
    # deepcopy takes the folded layer wherever it meets the pair, so pairs are never copied and shared ones stay shared.
    memo = {id(pair): layer for pair, layer in folded.items()}
    return copy.deepcopy(model, memo)  # type: ignore[arg-type]


@torch.no_grad()
def fold_pair(pair: BasisPair) -> nn.Module:
    """The plain form of one pair, see `fold`. Products are taken in float64 and rounded once."""
    layer = empty_folded(pair, kind=layer_cost(pair).kind(pair.rank), rank=pair.rank, bias=pair.needs_bias)
    last = layer
    if isinstance(layer, nn.Sequential):
        layer[0].weight.copy_(pair.basis.weight)  # type: ignore[operator, union-attr, arg-type]
        last = layer[1]
        last.weight.copy_(_double(pair).scaling.scaled_weight)  # type: ignore[operator, union-attr]
    else:
        layer.weight.copy_(_double(pair).weight)  # type: ignore[operator, union-attr]
    if pair.needs_bias:
        last.bias.copy_(pair.scaling.bias)  # type: ignore[operator, union-attr]
    return layer


def empty_folded(layer: nn.Module, *, kind: str, rank: int, bias: bool) -> nn.Module:
    """The plain form of a layer or pair with undefined values.

    Args:
        layer: An original layer or a pair; only its geometry is read.
        kind: ``"pair"`` or ``"fused"``.
        rank: Basis vectors per group, for a pair.
        bias: Whether the (last) layer has a bias.
    """
    pair = layer if isinstance(layer, BasisPair) else BasisPair(layer, rank=1)
    weight = pair.scaling.weight
    factory = {"device": weight.device, "dtype": weight.dtype}
    kind_of_layer, groups = pair.original_type, pair.groups
    if pair.scaling.dims == 0:
        if kind == "fused":
            folded: nn.Module = nn.Linear(pair.fan_in, pair.out_per_group, bias=bias, **factory)  # type: ignore[arg-type]
        else:
            folded = nn.Sequential(
                nn.Linear(pair.fan_in, rank, bias=False, **factory),  # type: ignore[arg-type]
                nn.Linear(rank, pair.out_per_group, bias=bias, **factory),  # type: ignore[arg-type]
            )
    else:
        geometry = {name: getattr(pair, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        out = groups * (pair.out_per_group if kind == "fused" else rank)
        first = kind_of_layer(
            pair.in_channels, out, groups=groups, bias=bias and kind == "fused", **geometry, **factory
        )  # type: ignore[call-arg, arg-type]
        folded = first
        if kind == "pair":
            folded = nn.Sequential(
                first,
                kind_of_layer(groups * rank, groups * pair.out_per_group, 1, groups=groups, bias=bias, **factory),  # type: ignore[call-arg, arg-type]
            )
    return folded.train(layer.training)


def refuse_pairs(model: nn.Module) -> None:
    """Refuse a model that still has pairs where a plain one is needed."""
    names = list(named_pairs(model))
    if names:
        raise ValueError(f"the model is decomposed (layer {names[0]!r} is a pair); call `bsdp.fold(model)` first.")


def unfold_into(model: nn.Module, plan: dict[str, dict[str, object]]) -> None:
    """Give a plain original model the folded structure of a plan, in place, with undefined values.

    Args:
        model: The original architecture.
        plan: ``{layer name: {"kind": "pair" | "fused", "rank": int, "bias": bool}}``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    replacements = {
        modules[name]: empty_folded(modules[name], kind=str(e["kind"]), rank=int(e["rank"]), bias=bool(e["bias"]))  # type: ignore[call-overload]
        for name, e in plan.items()
    }
    replace_modules(model, replacements)


def _double(pair: BasisPair) -> BasisPair:
    return copy.deepcopy(pair).double()
