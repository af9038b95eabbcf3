"""Parameters that change owners."""

from __future__ import annotations

import torch
from torch import nn

import bsdp
from bsdp.optimizers import adopt_parameters
from tests.helpers.nets import ConvNet


def test_successor_joins_the_group_of_what_it_replaced() -> None:
    model = ConvNet()
    second = [model.conv2.weight, model.head.weight]
    optimizer = torch.optim.SGD([{"params": [model.conv1.weight]}, {"params": second}], lr=0.1)
    replaced = bsdp.decompose(model).replaced
    pairs = [(old.weight, pair.scaling.delta) for old, pair in replaced.values()]
    assert adopt_parameters([optimizer], pairs, model) == []
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[id(model.conv1.scaling.delta)], [id(model.head.weight), id(model.conv2.scaling.delta)]]


def test_orphans_leave_with_their_state() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    old = model.conv1.weight
    replaced = bsdp.decompose(model).replaced
    adopt_parameters([optimizer], [(o.weight, p.scaling.delta) for o, p in replaced.values()], model)
    assert old not in optimizer.state
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} <= {id(p) for p in model.parameters()}


def test_held_already_stays_where_it_is() -> None:
    model = ConvNet()
    replaced = bsdp.decompose(model).replaced
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    adopt_parameters([optimizer], [(o.weight, p.scaling.delta) for o, p in replaced.values()], model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before


def test_homeless_parameters_are_returned() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    replaced = bsdp.decompose(model).replaced
    homeless = adopt_parameters([optimizer], [(o.weight, p.scaling.delta) for o, p in replaced.values()], model)
    assert [id(p) for p in homeless] == [id(model.conv1.scaling.delta), id(model.conv2.scaling.delta)]


def test_frozen_successors_are_not_adopted() -> None:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replaced = bsdp.decompose(model).replaced
    pairs: list[tuple[torch.Tensor, nn.Parameter]] = [(o.weight, p.scaling.bias) for o, p in replaced.values()]
    adopt_parameters([optimizer], pairs, model)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not held & {id(new) for _, new in pairs}


def test_a_parameter_that_replaced_several_goes_where_one_of_them_was() -> None:
    model, gone, old = nn.Linear(2, 2), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    new = model.weight
    optimizer = torch.optim.SGD([old], lr=0.1)
    assert adopt_parameters([optimizer], [(gone, new), (old, new)], model) == []
    assert optimizer.param_groups[0]["params"] == [new]
