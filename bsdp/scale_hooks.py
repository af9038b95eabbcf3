"""One trainable factor per channel, multiplied onto what the next layers read, and folding it into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.input_watching import replace_first
from bsdp.plain_layers import (
    SUPPORTED_TYPES,
    is_transposed,
    layer_groups,
    layer_inputs,
    set_data,
    spatial_dims,
    weight_of,
)

_MOST_UNITS = 10_000_000
CHILD = "channel_scales"  # under this name a network holds them


class ChannelScales(nn.Module):
    """One factor per unit of all channel groups, in one parameter `weight`, applied to the inputs of the readers.

    It becomes the child ``channel_scales`` of the network and works through forward pre-hooks on the readers.

    Args:
        network: The plain network; it gets the child and the hooks.
        readers: For every reader the factor of each of its input channels, 0 for none, else 1 + the position in
            `weight`; see `bsdp.channel_scales.scale_layout`.
        units: Number of factors.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> scales = bsdp.scale_hooks.ChannelScales(net, {"2": [1, 2, 3, 4]}, units=4)
        >>> [name for name, _ in net.named_parameters() if "scales" in name]
        ['channel_scales.weight']
    """

    def __init__(self, network: nn.Module, readers: Mapping[str, Sequence[int]], *, units: int) -> None:
        super().__init__()
        like = next(network.parameters())
        self.weight = nn.Parameter(torch.ones(units, device=like.device, dtype=like.dtype))
        self._factors: list[_Factor] = []
        self.bind(network, readers)
        network.add_module(CHILD, self)

    def bind(self, network: nn.Module, readers: Mapping[str, Sequence[int]]) -> None:
        """Put the factors before other readers, or before other channels of theirs."""
        modules = list(network.modules())
        for module in modules:
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _Factor):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        self.readers = {name: list(index) for name, index in readers.items()}
        for name, index in readers.items():
            reader = network.get_submodule(name)
            reader.register_forward_pre_hook(_Factor(self, torch.tensor(index, dtype=torch.long)), with_kwargs=True)

    def factors(self, index: Tensor) -> Tensor:
        """Factors of a reader's input channels, ``[in_channels]``."""
        return torch.cat([self.weight.new_ones(1), self.weight])[index.to(self.weight.device)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Hand on the input: in an `nn.Sequential`, which calls all of its children, this is the last one."""
        return inputs

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        return f"units={len(self.weight)}, readers={len(self.readers)}"


class _Factor:
    """Multiplies the input of one reader; an object, so that copies of a network refer to their own factors."""

    def __init__(self, scales: ChannelScales, index: Tensor) -> None:
        self.scales, self.index = scales, index

    def __call__(self, reader: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        factors = self.scales.factors(self.index).view(-1, *(1,) * spatial_dims(reader))
        return replace_first(arguments, named, lambda inputs: inputs * factors)


def scales_of(network: nn.Module) -> ChannelScales | None:
    """The factors of a network, if it has some."""
    child = network._modules.get(CHILD)
    return child if isinstance(child, ChannelScales) else None


def drop_scales(network: nn.Module) -> None:
    """Take the factors out without folding them."""
    for owner in list(network.modules()):
        scales = scales_of(owner)
        if scales is not None:
            scales.bind(owner, {})
            del owner._modules[CHILD]


@torch.no_grad()
def fold_scales(network: nn.Module) -> None:
    """Multiply the factors into the input channels of their readers, in place, and take them out: exact."""
    for owner in list(network.modules()):
        scales = scales_of(owner)
        if scales is None:
            continue
        for name, index in scales.readers.items():
            layer = owner.get_submodule(name)
            weight, factors = weight_of(layer), scales.factors(torch.tensor(index))
            groups, tail = layer_groups(layer), (1,) * spatial_dims(layer)
            if is_transposed(layer):
                weight.mul_(factors.view(-1, 1, *tail))
            else:  # every output channel reads the inputs of its own group
                rows = factors.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
                weight.mul_(rows.reshape(weight.shape[0], -1, *tail))
    drop_scales(network)


def scales_as_values(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Where factors stand, as values for JSON: ``{network name: {"units": int, "readers": {layer: [int]}}}``."""
    found = {name: scales_of(module) for name, module in model.named_modules()}
    return {name: {"units": len(s.weight), "readers": s.readers} for name, s in found.items() if s is not None}


def set_scales(model: nn.Module, values: object) -> None:
    """Give a model the factors that `scales_as_values` told of another one, in place; they are 1 until weights load.

    Raises:
        ValueError: If they do not fit the model, which is then as it was.
    """
    modules = dict(model.named_modules())
    if not isinstance(values, Mapping) or not all(_fit(modules.get(name), entry) for name, entry in values.items()):
        raise ValueError(
            "the saved structure has channel scales that do not fit the model: build the same architecture that was "
            "pruned."
        )
    for name, module in modules.items():
        scales = scales_of(module)
        if name not in values:
            if scales is not None:
                scales.bind(module, {})
                del module._modules[CHILD]
            continue
        entry = values[name]
        if scales is None:
            ChannelScales(module, entry["readers"], units=entry["units"])
            continue
        set_data(scales.weight, scales.weight.detach().new_ones(entry["units"]))
        scales.bind(module, entry["readers"])


def _fit(network: nn.Module | None, entry: object) -> bool:
    if network is None or not isinstance(entry, Mapping) or not isinstance(entry.get("readers"), Mapping):
        return False
    units, layers = entry.get("units"), dict(network.named_modules())
    if type(units) is not int or not 1 <= units <= _MOST_UNITS:
        return False
    return all(
        isinstance(layers.get(name), SUPPORTED_TYPES)
        and isinstance(index, list)
        and len(index) == layer_inputs(layers[name])
        and all(type(position) is int and 0 <= position <= units for position in index)
        for name, index in entry["readers"].items()
    )
