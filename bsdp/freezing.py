"""What trains and what stays fixed in a decomposed model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bsdp._checks import check_choice, check_patterns, matches
from bsdp.layers import BasisPair, BasisScalingConv
from bsdp.surgery import module_names

BATCH_NORM_MODES = ("frozen", "stats", "affine", "all")


def freeze(
    model: nn.Module,
    *,
    trainable: Iterable[str] = (),
    batch_norm: str = "frozen",
    train_bias: bool = False,
    train_weights: bool = False,
) -> None:
    """Freeze a decomposed model but for its scaling factors.

    Args:
        model: The decomposed model, or the part of it that is the backbone.
        trainable: Patterns of modules (for example the head) and of single parameters that keep training as they are;
            matched like the layer patterns of `decompose`.
        batch_norm: ``"frozen"`` fixes statistics and affine terms; ``"stats"`` updates the running statistics only,
            ``"affine"`` trains weight and bias only, ``"all"`` does both.
        train_bias: Whether the biases of the pairs train.
        train_weights: Whether everything trains but the batch norms, for which `batch_norm` speaks: the basis filters
            (which do not stay orthonormal then), the 1x1 weights, the biases that the original has, and the layers
            that were not decomposed.
    """
    check_choice("batch_norm", batch_norm, BATCH_NORM_MODES)
    modules, named = _unmatched(model, trainable)
    for module in modules:
        train = batch_norm in ("affine", "all") if isinstance(module, _BatchNorm) else train_weights
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in named:
                parameter.requires_grad_(train)
    for module in modules:
        if isinstance(module, BasisScalingConv):
            module.delta.requires_grad_(True)
            if id(module.bias) not in named:
                module.bias.requires_grad_(train_bias)
    for pair in modules:
        if isinstance(pair, BasisPair) and pair.had_bias and train_weights:
            pair.scaling.bias.requires_grad_(True)


def fixed_batch_norms(
    model: nn.Module, *, trainable: Iterable[str] = (), batch_norm: str = "frozen"
) -> list[nn.Module]:
    """Batch norms whose running statistics must not move: keep them in eval mode after each ``model.train()``.

    Args:
        model: The model that was given to `freeze`.
        trainable: As in `freeze`.
        batch_norm: As in `freeze`.
    """
    check_choice("batch_norm", batch_norm, BATCH_NORM_MODES)
    modules, _ = _unmatched(model, trainable)
    if batch_norm in ("stats", "all"):
        return []
    return [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]


def _unmatched(model: nn.Module, trainable: Iterable[str]) -> tuple[list[nn.Module], set[int]]:
    """The modules that no pattern names, and the ids of the parameters that one does.

    What has two names counts as named when one of them is.
    """
    names = module_names(model)
    parameters = list(model.named_parameters(remove_duplicate=False))
    known = [name for group in names.values() for name in group if name] + [name for name, _ in parameters]
    patterns = check_patterns("trainable", trainable, known)
    left = [module for module, group in names.items() if not any(name and matches(name, patterns) for name in group)]
    return left, {id(parameter) for name, parameter in parameters if matches(name, patterns)}
