"""What trains and what stays fixed in a decomposed model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bsdp._checks import check_choice, check_patterns, matches
from bsdp.layers import BasisPair

BATCH_NORM_MODES = ("frozen", "stats", "affine", "all")


def freeze(
    model: nn.Module,
    *,
    trainable: Iterable[str] = (),
    batch_norm: str = "frozen",
    train_bias: bool = False,
) -> None:
    """Freeze a decomposed model but for its scaling factors.

    Args:
        model: The decomposed model, or the part of it that is the backbone.
        trainable: Patterns of modules that keep training as they are (for example the head); matched like the layer
            patterns of `decompose`.
        batch_norm: ``"frozen"`` fixes statistics and affine terms; ``"stats"`` updates the running statistics only,
            ``"affine"`` trains weight and bias only, ``"all"`` does both.
        train_bias: Whether the biases of the pairs train.
    """
    check_choice("batch_norm", batch_norm, BATCH_NORM_MODES)
    trainable = list(trainable) if not isinstance(trainable, str) else trainable
    check_patterns("trainable", trainable, [name for name, _ in model.named_modules() if name])
    for name, module in model.named_modules():
        if name and matches(name, trainable):
            continue
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm):
            for parameter in own:
                parameter.requires_grad_(batch_norm in ("affine", "all"))
        elif not _inside_pair(name, model):
            for parameter in own:
                parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, BasisPair) and not (name and matches(name, trainable)):
            module.scaling.delta.requires_grad_(True)
            module.scaling.bias.requires_grad_(train_bias)


def fixed_batch_norms(model: nn.Module, *, trainable: Iterable[str] = (), batch_norm: str = "frozen") -> list[nn.Module]:
    """Batch norms whose running statistics must not move: keep them in eval mode after each ``model.train()``."""
    if batch_norm in ("stats", "all"):
        return []
    patterns = list(trainable)
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not matches(name, patterns)
    ]


def _inside_pair(name: str, model: nn.Module) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent) if parent else model, BasisPair)
