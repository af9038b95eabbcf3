"""Copies of a model's values, whole whatever the model's own `state_dict` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.snapshots import copy_values, load_values, named_values
from tests.helpers.nets import NETS, make_net


class Partial(nn.Module):
    """Keeps a frozen part out of its files, as a plain dict, and changes what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.body = make_net("conv")
        self.register_buffer("lost", torch.zeros(2), persistent=False)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict(*args, **options).items() if "frozen" not in key}

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("not to be called")


@pytest.mark.parametrize("name", NETS)
def test_the_names_are_those_of_a_state_dict(name: str) -> None:
    net = make_net(name)
    bsdp.decompose(net)
    assert list(named_values(net)) == list(net.state_dict())


def test_what_a_state_dict_leaves_out_comes_back_too() -> None:
    model = Partial()
    values = copy_values(nn.ModuleDict({"inner": model}))
    kept = copy_values(model)
    assert values.keys() == {f"inner.{key}" for key in kept} and "frozen.weight" in kept and "lost" not in kept
    for value in named_values(model).values():
        value.add_(1)
    assert not torch.equal(model.frozen.weight, kept["frozen.weight"])
    load_values(model, kept)
    assert all(torch.equal(value, kept[key]) for key, value in named_values(model).items())


def test_pairs_follow_the_ranks_and_parameters_stay_the_same_objects() -> None:
    net = make_net("conv")
    bsdp.decompose(net)
    whole, parameters = copy_values(net), list(net.parameters())
    for pair in bsdp.named_pairs(net).values():
        pair.keep(torch.arange(2))
    load_values(net, whole)
    assert all(torch.equal(value, whole[key]) for key, value in named_values(net).items())
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))


def test_partial_values_leave_the_rest_and_what_does_not_fit_is_refused() -> None:
    net = nn.Linear(2, 2)
    weight = net.weight.detach().clone()
    load_values(net, {"bias": torch.ones(2), "_extra_state": torch.ones(1)})
    assert torch.equal(net.weight, weight) and torch.equal(net.bias, torch.ones(2))
    with pytest.raises(ValueError, match=r"'other' .* does not have it"):
        load_values(net, {"other": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'bias' of shape \[1\] .* has the shape \[2\]"):
        load_values(net, {"bias": torch.ones(1)})
