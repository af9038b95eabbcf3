"""What a transfer trains at which rate: parameter groups and the named schedule, as pure functions."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from bsdp.layers import BasisScalingConv


def parameter_groups(
    network: nn.Module, *, head: nn.Module, head_lr: float | None = None, scale_lr: float | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters by learning rate and weight decay into named groups for an optimizer.

    Biases, normalisation layers and scaling factors get no weight decay.

    Args:
        network: Plain or decomposed.
        head: The layer of the network that gives the class scores.
        head_lr: Learning rate of the head; None for the optimizer's own.
        scale_lr: Learning rate of the scaling factors; None for the optimizer's own.

    Returns:
        Groups called ``backbone``, ``backbone_no_decay``, ``head``, ``head_no_decay`` and ``scales``; empty ones are
        left out.

    Raises:
        ValueError: If nothing is trainable.
    """
    scales = {module.delta for module in network.modules() if isinstance(module, BasisScalingConv)}
    in_head = set(head.parameters())
    groups: dict[str, list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            role = "head" if parameter in in_head else "backbone"
            name = "scales" if parameter in scales else role if parameter.ndim > 1 else f"{role}_no_decay"
            groups.setdefault(name, []).append(parameter)
    if not groups:
        raise ValueError("The network has no trainable parameter: unfreeze the head or the scaling factors.")
    rates = {"scales": scale_lr, "head": head_lr, "head_no_decay": head_lr}
    return [
        {"params": parameters, "name": name}
        | ({} if name in ("backbone", "head") else {"weight_decay": 0.0})
        | ({} if rates.get(name) is None else {"lr": rates[name]})
        for name, parameters in sorted(groups.items())
    ]


def cosine_factor(step: int, *, total: int, warmup: float = 0.05) -> float:
    """Learning-rate factor that rises linearly, then falls along half a cosine to 0.

    Args:
        step: Optimizer steps done.
        total: Steps of the whole training.
        warmup: Share of the steps in which it rises.

    Example:
        >>> [round(cosine_factor(step, total=4, warmup=0.5), 2) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = int(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))


def onecycle_factor(step: int, *, total: int, rise: float = 0.3) -> float:
    """Learning-rate factor of ``torch.optim.lr_scheduler.OneCycleLR`` with its own defaults, as a function of the step.

    It rises from 1/25 to 1 along half a cosine, then falls along another to 1/250000, and stays there: unlike the
    scheduler, it also goes on when a resumed training is longer than it was planned to be.

    Args:
        step: Optimizer steps done.
        total: Steps of the whole training.
        rise: Share of the steps in which it rises.

    Example:
        >>> [round(onecycle_factor(step, total=5, rise=0.6), 2) for step in range(7)]
        [0.04, 0.52, 1.0, 0.5, 0.0, 0.0, 0.0]
    """
    top = rise * total - 1.0
    start, end, share = (0.04, 1.0, step / top) if step < top else (1.0, 4e-6, (step - top) / (total - 1.0 - top))
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(1.0, share)))


def restarted_factor(step: int, *, factor: Callable[..., float], restart: int, total: int) -> float:
    """Learning-rate factor of a schedule that runs to its end twice: until a step, and over the rest.

    Args:
        step: Optimizer steps done.
        factor: `cosine_factor` or `onecycle_factor`.
        restart: Steps of the first time.
        total: Steps of the whole training.

    Example:
        >>> [round(restarted_factor(step, factor=cosine_factor, restart=2, total=6), 2) for step in range(6)]
        [1.0, 0.5, 1.0, 0.85, 0.5, 0.15]
    """
    if step < restart:
        return factor(step, total=restart)
    return factor(step - restart, total=max(1, total - restart))
