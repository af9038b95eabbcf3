"""Measuring the network inside a LightningModule."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from bsdp.compiling import has_compiled, inside_compiled, uncompiled
from bsdp.cost import ModelCost
from bsdp.probing import as_inputs, evaluating, first_tensor
from bsdp.stats import measure_cost

_T = TypeVar("_T")


class NotReplayableError(ValueError):
    """A network was called in a way that its cost cannot be measured by; the message is half a sentence."""


def only_network(pl_module: LightningModule) -> str:
    """Name of the one child that has parameters; "" when the parameters are spread over the module.

    Of a child made by ``torch.compile`` it is the network inside.
    """
    own = list(pl_module.parameters(recurse=False))
    children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
    if len(children) != 1 or own:
        return ""
    inside = inside_compiled(pl_module.get_submodule(children[0]))
    return f"{children[0]}.{inside}" if inside else children[0]


def callable_part(pl_module: LightningModule) -> nn.Module:
    """What can be called: the module; its one network, where it has no ``forward`` of its own."""
    name = "" if is_overridden("forward", pl_module, LightningModule) else only_network(pl_module)
    return pl_module.get_submodule(name) if name else pl_module


def call_network(pl_module: LightningModule, *arguments: Any, **named: Any) -> Any:
    """The output of `callable_part`."""
    return callable_part(pl_module)(*arguments, **named)


def measure_module_cost(
    pl_module: LightningModule, network: str, example: Any, *, new_bias: bool
) -> tuple[ModelCost, list[list[int]]]:
    """Measure the cost of a module's network on one example of the module's own input.

    Args:
        pl_module: The module; its ``forward`` is run once to see what reaches the network.
        network: From `only_network`.
        example: Input of ``forward``: a tensor, a tuple of arguments or a dict of keyword arguments.
        new_bias: See `measure_cost`.

    Returns:
        The cost, and the shapes of the network's inputs.
    """
    part: nn.Module = pl_module.get_submodule(network) if network else pl_module
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append((arguments, named))

    handle = part.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with evaluating(pl_module), uncompiled():
            if isinstance(example, dict):
                call_network(pl_module, **{k: as_parameters(v, part) for k, v in example.items()})
            else:
                call_network(pl_module, *(as_parameters(value, part) for value in as_inputs(example)))
    finally:
        handle.remove()
    if not seen:
        raise NotReplayableError(f"`forward` of {type(pl_module).__name__} did not call `{network}`")
    tensors, left_out = _tensors_of(part, *seen[0])
    inputs = tuple(torch.zeros_like(value[:1]) for value in tensors)
    try:
        cost = measure_cost(part, inputs, new_bias=new_bias)
    except Exception as error:  # whatever the user's network may raise without them
        if not left_out:
            raise
        names = ", ".join(f"`{name}`" for name in left_out)
        raise NotReplayableError(f"{type(part).__name__} fails without {names} ({error})") from error
    return cost, [list(value.shape) for value in inputs]


def _tensors_of(
    network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Tensor, ...], list[str]]:
    """What a network was called with as tensors in the order of its arguments.

    Returns:
        The tensors that come first; names of further arguments that have defaults, and were given other values.

    Raises:
        NotReplayableError: If there is no tensor, or something else has to be given.
    """
    try:
        signature = inspect.signature(network.forward)
        given = signature.bind(*arguments, **named).arguments
        known = list(signature.parameters.values())
    except (TypeError, ValueError):  # a function without a signature
        given, known = {}, []
    tensors: list[Tensor] = [] if known else [value for value in arguments if isinstance(value, Tensor)]
    left_out, needed = [], not known and (len(tensors) < len(arguments) or bool(named))
    in_order = True
    for parameter in known:
        value = given.get(parameter.name, parameter.default)
        several = parameter.kind is parameter.VAR_POSITIONAL and isinstance(value, tuple)
        values = value if several else (value,)
        by_name = parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        in_order = in_order and not by_name and all(isinstance(entry, Tensor) for entry in values)
        if in_order:
            tensors += values
        elif parameter.name in given and value is not parameter.default:
            left_out.append(parameter.name)
            needed = needed or (parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD)
    if needed or not tensors:
        kinds = [type(value).__name__ for value in arguments]
        kinds += [f"{key}={type(value).__name__}" for key, value in named.items()]
        raise NotReplayableError(
            f"{type(network).__name__} is called with ({', '.join(kinds)}), and only networks that take tensors in the "
            "order of their arguments can be measured"
        )
    return tuple(tensors), left_out


class FirstInputs:
    """The shapes that a network is called with next, whoever calls it.

    Args:
        network: The network; one with compiled parts inside is not watched, as graphs do not see hooks come and go.

    Attributes:
        shapes: For one example; None while there was no call with floating-point tensors.
    """

    def __init__(self, network: nn.Module) -> None:
        self.shapes: list[list[int]] | None = None
        self._handle = None if has_compiled(network) else network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if (
            isinstance(module, LightningModule)
            and getattr(module.forward, "__func__", None) is not type(module).forward
        ):
            return  # a strategy that wraps the module lets `training_step` pass as `forward`
        try:
            tensors, _ = _tensors_of(module, arguments, named)
        except NotReplayableError:
            return
        if all(tensor.is_floating_point() and tensor.dim() > 0 for tensor in tensors):
            self.shapes = [[1, *tensor.shape[1:]] for tensor in tensors]
            self.close()

    def close(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()


def measure_on_own_example(
    pl_module: LightningModule, network: str, *, new_bias: bool
) -> tuple[ModelCost, list[list[int]]]:
    """`measure_module_cost` on the module's ``example_input_array``.

    Raises:
        ValueError: If the module's ``forward`` does not take it.
        NotReplayableError: If it does, and the network in it takes more than tensors.
    """
    try:
        return measure_module_cost(pl_module, network, pl_module.example_input_array, new_bias=new_bias)
    except NotReplayableError:
        raise
    except Exception as error:  # whatever the user's forward may raise
        raise ValueError(
            f"`forward` of {type(pl_module).__name__} failed on its `example_input_array` "
            f"({type(error).__name__}: {error}): make it one example of what `forward` takes."
        ) from error


def measure_on_batch(
    pl_module: LightningModule, network: str, batch: Any, *, new_bias: bool
) -> tuple[ModelCost, list[list[int]]]:
    """`measure_module_cost` on the first example of the first tensor in a batch.

    Raises:
        ValueError: If there is none, or the module's ``forward`` does not take it; the message is half a sentence.
    """
    example = first_tensor(batch)
    if example is None:
        raise ValueError("the batch holds no floating-point tensor")
    try:
        return measure_module_cost(pl_module, network, example[:1], new_bias=new_bias)
    except NotReplayableError:
        raise
    except Exception as error:  # whatever the user's forward may raise on an input we guessed
        reason = f"`forward` failed on the first tensor of a batch ({type(error).__name__}: {error})"
        raise ValueError(reason) from error


def as_parameters(value: Any, module: nn.Module) -> Any:
    """Bring a tensor to the device, and a floating-point one to the dtype, of a module's parameters."""
    like = next(module.parameters(), None)
    if not isinstance(value, Tensor) or like is None:
        return value
    return value.to(device=like.device, dtype=like.dtype if value.is_floating_point() else value.dtype)


def own_iterator(loaders: Any) -> Iterator[Any]:
    """Read a loader (of several, the first) from its start without disturbing the iterator the trainer has of it."""
    return iter(_copy_of_first(loaders))


def _copy_of_first(loaders: Any) -> Any:
    loader = next(iter(tree_leaves(loaders)), None)
    if isinstance(loader, DataLoader):
        loader = copy.copy(loader)
        loader._iterator = None  # persistent workers would hand out the trainer's own iterator
    return loader if loader is not None else ()


def spread_batches(loaders: Any, count: int) -> Iterator[Any]:
    """Batches from all over a loader (of several, the first), which often has one class after the other.

    Args:
        loaders: What a trainer has for validation.
        count: Batches to give.

    Returns:
        `count` batches of examples at equal distances; of a loader that makes its batches in a way of its own, whole
        batches at equal distances; of one without indices (a stream, or no `DataLoader`) the first batches.
    """
    loader = _copy_of_first(loaders)
    if (
        not isinstance(loader, DataLoader)
        or loader.batch_sampler is None
        or isinstance(loader.dataset, IterableDataset)
    ):
        return islice(iter(loader), count)
    batches = [list(batch) for batch in loader.batch_sampler]
    if type(loader.batch_sampler) is BatchSampler and batches:
        size = len(batches[0])
        chosen = _at_equal_distances(list(chain.from_iterable(batches)), count * size)
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    else:
        batches = _at_equal_distances(batches, count)
    vars(loader)["batch_sampler"] = batches  # all else as it is: workers, what they begin with, how they collate
    return iter(loader)


def _at_equal_distances(values: list[_T], count: int) -> list[_T]:
    """`count` of the values; all, where there are no more."""
    return values if len(values) <= count else [values[i * len(values) // count] for i in range(count)]


def first_example(trainer: Trainer) -> Any:
    """The first training batch, on the trainer's device."""
    return next(iter(trainer.strategy.batch_to_device(b) for b in own_iterator(trainer.train_dataloader)), None)


def example_of(shapes: list[list[int]], network: nn.Module) -> tuple[Tensor, ...]:
    """Zeros of the given shapes, on the device and in the dtype of a network's parameters."""
    like = next(network.parameters())
    return tuple(torch.zeros(shape, device=like.device, dtype=like.dtype) for shape in shapes)
