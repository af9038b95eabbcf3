"""What passes through layers: hooks that show a layer's inputs, alone or with the gradients they get from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Sink = Callable[[Tensor, Tensor], None]


class _Watch(torch.autograd.Function):
    """Hands on its input, and shows it with its gradient to `sink`; only what passes through here counts."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.sink = sink
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (inputs,) = ctx.saved_tensors
        ctx.sink(inputs.detach(), gradients[0].detach())
        return gradients[0], None


def watch_gradients(layer: nn.Module, sink: Callable[[], Sink]) -> Any:
    """Show every input of a layer with the gradient it gets from this layer alone; returns the hook's handle.

    Args:
        layer: Any layer or pair.
        sink: Called in each forward pass; what it returns gets the input and the gradient in the backward pass.
    """

    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None

        def watched(inputs: Tensor) -> Tensor:
            # Below only frozen layers nothing would ask for this gradient.
            inputs = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
            result: Tensor = _Watch.apply(inputs, sink())
            return result

        return replace_first(arguments, named, watched)

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def watch_inputs(layer: nn.Module, sink: Callable[[Tensor], None]) -> Any:
    """Show every input of a layer; returns the hook's handle."""

    def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        sink(arguments[0] if arguments else next(iter(named.values())))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def replace_first(arguments: tuple[Any, ...], named: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a layer with another input, whether that came by position or by keyword."""
    if arguments:
        return (change(arguments[0]), *arguments[1:]), named
    key = next(iter(named))
    return arguments, {**named, key: change(named[key])}
