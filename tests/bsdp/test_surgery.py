"""Replacing modules wherever they are registered."""

import pytest
import torch
from torch import nn

from bsdp.surgery import has_forward_pre_hooks, module_names, move_hooks, replace_modules, set_module


def nested() -> nn.Module:
    """A module under two names, one of them nested, and containers of every kind."""
    shared = nn.Linear(2, 2)
    net = nn.Module()
    net.first = shared
    net.block = nn.Sequential(nn.ReLU(), shared)
    net.table = nn.ModuleDict({"a": nn.Linear(2, 2)})
    net.list = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
    return net


def test_module_names_gives_all_names() -> None:
    net = nested()
    names = module_names(net)
    assert names[net.first] == ["first", "block.1"]
    assert names[net] == [""]
    assert names[net.table["a"]] == ["table.a"]


def test_set_module_reaches_into_every_container_and_keeps_the_order() -> None:
    net = nested()
    order = [name for name, _ in net.named_modules(remove_duplicate=False)]
    for name in ("first", "block.1", "table.a", "list.0"):
        new = nn.Linear(2, 2)
        set_module(net, name, new)
        assert net.get_submodule(name) is new
    assert [name for name, _ in net.named_modules(remove_duplicate=False)] == order


def test_replace_modules_replaces_every_name_with_the_same_new_module() -> None:
    net = nested()
    old, other = net.first, net.list[0]
    new = nn.Identity()
    replaced = replace_modules(net, {old: new, other: nn.ReLU()})
    assert replaced == {"first": (old, new), "block.1": (old, new), "list.0": (other, net.list[0])}
    assert net.first is net.block[1] is new
    assert isinstance(net.list[0], nn.ReLU)


def test_replacing_nothing_or_a_stranger_changes_nothing() -> None:
    net = nested()
    before = list(net.modules())
    assert replace_modules(net, {}) == {}
    assert replace_modules(net, {nn.Linear(2, 2): nn.ReLU()}) == {}
    assert list(net.modules()) == before


def test_the_model_itself_cannot_be_replaced() -> None:
    net = nested()
    with pytest.raises(ValueError, match=r"the model is itself a layer to replace.*wrap it"):
        replace_modules(net, {net: nn.Identity(), net.first: nn.Identity()})
    assert isinstance(net.first, nn.Linear)


def test_move_hooks_moves_all_kinds_and_handles_still_remove() -> None:
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    calls: list[str] = []
    handles = [
        old.register_forward_hook(lambda m, i, o: calls.append("forward")),
        old.register_forward_hook(lambda m, i, o: calls.append("always"), always_call=True),
        old.register_forward_hook(lambda m, i, kw, o: calls.append("kwargs"), with_kwargs=True),
        old.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
        old.register_full_backward_pre_hook(lambda m, go: calls.append("backward_pre")),
    ]
    move_hooks(old, new)
    new(torch.randn(1, 2, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["always", "backward", "backward_pre", "forward", "kwargs"]
    calls.clear()
    old(torch.randn(1, 2, requires_grad=True)).sum().backward()
    assert calls == []
    for handle in handles:
        handle.remove()
    new(torch.randn(1, 2, requires_grad=True)).sum().backward()
    assert calls == []
    old.register_forward_hook(lambda m, i, o: calls.append("new"))
    new(torch.randn(1, 2))
    assert calls == []  # the two share no table


def test_a_hook_that_is_always_called_is_called_after_an_error_in_its_new_place_too() -> None:
    old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    calls: list[str] = []
    old.register_forward_hook(lambda m, i, o: calls.append("always"), always_call=True)
    old.register_forward_hook(lambda m, i, o: calls.append("on success"))
    move_hooks(old, new)
    with pytest.raises(RuntimeError):
        new(torch.randn(1, 3))
    assert calls == ["always"]


def test_has_forward_pre_hooks() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda m, i, o: None)
    assert not has_forward_pre_hooks(layer)
    handle = layer.register_forward_pre_hook(lambda m, i: None)
    assert has_forward_pre_hooks(layer)
    handle.remove()
    assert not has_forward_pre_hooks(layer)
