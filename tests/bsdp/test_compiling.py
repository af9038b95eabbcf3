"""Compiled modules: their names, and running them without their graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bsdp.compiling import forget_graphs, inside_compiled, plain_name, uncompiled


def eager(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def test_names_with_and_without_the_wrapper() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert inside_compiled(net) == ""
    compiled = eager(net)
    assert compiled.get_submodule(inside_compiled(compiled)) is net
    (name,) = (name for name, module in compiled.named_modules() if isinstance(module, nn.Linear))
    assert (name, plain_name(name)) == ("_orig_mod.0", "0")
    assert plain_name("a._orig_mod.b") == plain_name("a.b") == "a.b"


def wrapped(model: nn.Module) -> nn.Module:
    return eager(model)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("form", [wrapped, in_place])
def test_hooks_that_come_after_compiling_are_seen_inside(form: Callable[[nn.Module], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compiled, inputs, ran = form(net), torch.ones(1, 2), []
    expected = compiled(inputs)
    with uncompiled():
        handle = net[0].register_forward_hook(lambda *_: ran.append(torch.compiler.is_compiling()))
        assert torch.equal(compiled(inputs), expected)
        handle.remove()
    assert ran == [False]
    assert torch.equal(compiled(inputs), expected)


def test_a_model_gets_its_plain_methods_back_for_as_long() -> None:
    net = in_place(nn.Linear(2, 2))
    compiled = net._compiled_call_impl
    assert compiled is not None
    with pytest.raises(KeyError), uncompiled(net):
        assert net._compiled_call_impl is None
        raise KeyError
    assert net._compiled_call_impl is compiled


def test_graphs_are_made_anew_after_they_were_forgotten() -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Linear(2, 2), backend=backend)
    for _ in range(2):
        compiled(torch.ones(1, 2))
    assert len(graphs) == 1
    forget_graphs()
    compiled(torch.ones(1, 2))
    assert len(graphs) == 2
