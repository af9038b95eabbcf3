"""Removing channels, and the slow obvious way of doing without them: readers that see zeros in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_group import ChannelGroup
from bsdp.channel_surgery import remove_channels
from tests.helpers.channel_nets import CHANNEL_NETS, channel_batch, channel_net
from tests.helpers.nets import make_input, make_net

TRACEABLE = (*(name for name in CHANNEL_NETS if name != "transposed"), "upwards", "signal", "volume")


class UpwardsNet(nn.Module):
    """A transposed convolution between two others. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.up = nn.ConvTranspose2d(6, 5, 3, stride=2)
        self.last = nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.last(torch.relu(self.up(torch.relu(self.conv(images))))))
        return self.head(features.mean((2, 3)))


def traceable_net(name: str) -> nn.Module:
    """A network of `TRACEABLE` in eval mode, in float64, with batch norms that do something."""
    if name == "upwards":
        return UpwardsNet().double().eval()
    net = channel_net(name) if name in CHANNEL_NETS else make_net(name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def traceable_batch(name: str, *, batch: int = 4) -> Tensor:
    """A batch for it."""
    if name == "upwards":
        return torch.randn(batch, 3, 8, 8, dtype=torch.float64)
    return channel_batch(name, batch=batch) if name in CHANNEL_NETS else make_input(name, batch=batch)


def random_units(groups: Mapping[str, ChannelGroup], *, seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    """A share of the units of every group, at least one of them, never all."""
    generator = torch.Generator().manual_seed(seed)
    counts = {name: min(group.size - 1, max(1, int(group.size * share))) for name, group in groups.items()}
    return {
        name: torch.randperm(group.size, generator=generator)[: counts[name]].sort().values
        for name, group in groups.items()
    }


def ignoring(model: nn.Module, groups: Mapping[str, ChannelGroup], remove: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the same shape whose readers see zeros instead of the channels of some units."""
    masked = copy.deepcopy(model)
    for name, units in remove.items():
        for member in groups[name].sides("in"):
            index = member.index[units].flatten()
            masked.get_submodule(member.layer).register_forward_pre_hook(_zeros_at(index))
    return masked


def _zeros_at(index: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        axis = -1 if isinstance(module, nn.Linear) or getattr(module, "original_type", None) is nn.Linear else 1
        return (inputs[0].index_fill(axis, index, 0.0),)

    return hook


def cut(model: nn.Module, example: Tensor, remove: Mapping[str, Tensor], **options: Any) -> nn.Module:
    """Remove units in place."""
    groups = channel_groups(model, example)
    remove_channels(model, plan_removal(model, example, groups, remove), **options)
    return model


def halved(model: nn.Module, example: Tensor, *, seed: int = 0) -> nn.Module:
    """Remove half of the units of every group, in place."""
    return cut(model, example, random_units(channel_groups(model, example), seed=seed))


class CircularPadNet(nn.Module):
    """Pads by itself, so that slices of the signal stand in a circle. Input ``[batch, 2, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, signal: Tensor) -> Tensor:
        features = nn.functional.pad(torch.relu(self.conv1(signal)), (2, 2), mode="circular")
        return self.head(self.conv2(features).mean(2))


class AttentionNet(nn.Module):
    """One block of a transformer. Input ``[batch, 5, 6]``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.embed(tokens)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.down(nn.functional.gelu(self.up(self.norm(tokens))))
        return self.head(tokens.mean(1))


class RecurrentNet(nn.Module):
    """An LSTM between linear layers. Input ``[batch, 5, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.lstm(torch.relu(self.up(tokens)))[0][:, -1])))
