"""Keeping optimizers in step with a model whose layers were replaced after they were built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.optimizer_state import forget, with_inner


def held_by(optimizer: Optimizer) -> set[int]:
    """Identities of the parameters that an optimizer holds."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def held_parts(parameters: Iterable[Tensor], optimizer: Optimizer | None) -> list[Tensor]:
    """The parameters that an optimizer holds; all without one."""
    held = None if optimizer is None else held_by(optimizer)
    return [parameter for parameter in parameters if held is None or id(parameter) in held]


class Turns:
    """Which of several optimizers each part of a model is scored with: one of those that hold something of it.

    It is the first of them to step, when the gradients of all are still there.
    """

    def __init__(self) -> None:
        self._takers: dict[str, Optimizer] = {}

    def reset(self) -> None:
        """Choose anew."""
        self._takers.clear()

    def of(
        self, optimizer: Optimizer, parts: Mapping[str, Iterable[Tensor]], optimizers: Sequence[Optimizer]
    ) -> list[bool]:
        """Whether it is the turn of each part as an optimizer is about to step.

        Args:
            optimizer: One of `optimizers`.
            parts: Parameters by part. Those that no optimizer holds go with the first one.
            optimizers: All that hold something of the model.
        """
        held = [(other, held_by(other)) for other in optimizers]
        turns = []
        for name, parameters in parts.items():
            own = {id(parameter) for parameter in parameters}
            holders = [other for other, theirs in held if not own.isdisjoint(theirs)] or optimizers[:1]
            concerned = any(other is optimizer for other in holders)
            turns.append(concerned and self._takers.setdefault(name, optimizer) is optimizer)
        return turns


def adopt_parameters(
    optimizers: Sequence[Optimizer],
    successors: Iterable[tuple[Tensor, nn.Parameter]],
    model: nn.Module,
) -> list[nn.Parameter]:
    """Put new parameters into the groups of those they replaced, and take orphans out.

    Groups are changed in place: ``add_param_group`` would break schedulers that hold one entry per group.

    Args:
        optimizers: The optimizers of the model.
        successors: Pairs of (replaced parameter, new trainable parameter). A new parameter that some optimizer holds
            already is left where it is; one that replaced several goes to the first of them that is held.
        model: The model as it is now; parameters that are not in it any more leave the optimizers.

    Returns:
        The new parameters that no optimizer could take, because none held what they replaced.
    """
    alive = {id(p) for p in model.parameters()}
    held = {identity for optimizer in optimizers for identity in held_by(optimizer)}
    wanted: dict[int, nn.Parameter] = {}
    for old, new in successors:
        if id(new) in held or not new.requires_grad:
            continue
        holder = next((o for o in optimizers if id(old) in held_by(o)), None)
        wanted[id(new)] = new
        if holder is not None:
            for group in _groups([holder]):
                if any(p is old for p in group["params"]) and not any(p is new for p in group["params"]):
                    group["params"].append(new)
            held.add(id(new))
    for group in _groups(optimizers):
        forget(optimizers, [p for p in group["params"] if id(p) not in alive])
        group["params"] = [p for p in group["params"] if id(p) in alive]
    return [new for new in wanted.values() if id(new) not in held]


def _groups(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The groups of optimizers and of those that they wrap, which often share them; each once."""
    groups = [group for optimizer in with_inner(optimizers) for group in optimizer.param_groups]
    return list({id(group): group for group in groups}.values())
