"""Keeping optimizers in step with a model whose layers were replaced after they were built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer


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
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    wanted: dict[int, nn.Parameter] = {}
    for old, new in successors:
        if id(new) in held or not new.requires_grad:
            continue
        group = next((g for o in optimizers for g in o.param_groups if any(p is old for p in g["params"])), None)
        wanted[id(new)] = new
        if group is not None:
            group["params"].append(new)
            held.add(id(new))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for orphan in [p for p in group["params"] if id(p) not in alive]:
                optimizer.state.pop(orphan, None)
            group["params"] = [p for p in group["params"] if id(p) in alive]
    return [new for new in wanted.values() if id(new) not in held]
