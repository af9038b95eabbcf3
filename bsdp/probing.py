"""Looking inside a model while it runs, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bsdp.compiling import uncompiled

Observer = Callable[[nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode without gradients; restore each module's own mode and the random state."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def probe(model: nn.Module, modules: Iterable[nn.Module], observe: Observer) -> Iterator[None]:
    """Call ``observe(module, inputs, output)`` after each forward of `modules` while the model is in `evaluating`.

    Compiled graphs are not used meanwhile.
    """
    handles = [module.register_forward_hook(lambda m, i, o: observe(m, i, o)) for module in modules]
    try:
        with evaluating(model), uncompiled():
            yield
    finally:
        for handle in handles:
            handle.remove()


def as_inputs(example_input: Tensor | tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    """Bring an example input to a tuple of positional arguments."""
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input)
    return (example_input,)


def first_tensor(batch: Any) -> Tensor | None:
    """The first floating-point tensor with a batch axis in a nested batch, or None."""
    leaves, _ = tree_flatten(batch)
    return next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1), None)
