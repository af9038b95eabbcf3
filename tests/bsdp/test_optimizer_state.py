"""What optimizers and those that they wrap remember; what is cut of it stands in `test_pruning`."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bsdp.optimizer_state import cut_state, drop_stale_state, forget, with_inner
from bsdp.optimizers import adopt_parameters


class Wrapper(Optimizer):
    """Another optimizer does the steps."""

    def __init__(self, inner: Optimizer, *, shares: bool) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups if shares else [dict(group) for group in inner.param_groups]
        for group in self.param_groups:
            group["params"] = group["params"] if shares else list(group["params"])
        self.state: Any = inner.state if shares else defaultdict(dict)


def wrapped(parameter: nn.Parameter, *, shares: bool) -> tuple[Wrapper, Optimizer]:
    inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    outer = Wrapper(inner, shares=shares)
    for optimizer in (outer, inner):
        optimizer.state[parameter] = {"momentum_buffer": torch.arange(5.0)}
    return outer, inner


def test_inner_optimizers_are_found_once() -> None:
    outer, inner = wrapped(nn.Parameter(torch.zeros(5)), shares=False)
    outermost = Wrapper(outer, shares=True)
    outer.inner.outer = outermost  # type: ignore[attr-defined]
    assert with_inner([inner, outermost]) == [inner, outermost, outer]


def test_every_state_is_cut_once() -> None:
    for shares in (False, True):
        parameter = nn.Parameter(torch.zeros(2))
        outer, inner = wrapped(parameter, shares=shares)
        cut_state([outer], parameter, torch.Size([5]), lambda value: value[[1, 4]])
        for optimizer in (outer, inner):
            assert optimizer.state[parameter]["momentum_buffer"].tolist() == [1.0, 4.0]


def test_every_state_is_dropped() -> None:
    for shares in (False, True):
        parameter = nn.Parameter(torch.zeros(2))
        outer, inner = wrapped(parameter, shares=shares)
        drop_stale_state([outer])
        assert parameter not in outer.state and parameter not in inner.state
        outer, inner = wrapped(parameter, shares=shares)
        forget([outer], iter([parameter]))
        assert parameter not in outer.state and parameter not in inner.state


def test_groups_that_share_their_list_take_a_parameter_once() -> None:
    model = nn.Linear(2, 2, bias=False)
    old = model.weight
    outer, inner = wrapped(old, shares=True)
    outer.param_groups = [dict(group) for group in inner.param_groups]
    model.weight = nn.Parameter(torch.ones(2, 2))
    adopt_parameters([outer], [(old, model.weight)], model)
    for optimizer in (outer, inner):
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.weight)]


def test_parameters_change_owners_inside_too() -> None:
    for shares in (False, True):
        model = nn.Linear(2, 2, bias=False)
        old = model.weight
        outer, inner = wrapped(old, shares=shares)
        model.weight = nn.Parameter(torch.ones(2, 2))
        assert adopt_parameters([outer], [(old, model.weight)], model) == []
        for optimizer in (outer, inner):
            assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.weight)]
            assert old not in optimizer.state
