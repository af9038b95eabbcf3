"""Tiny networks with one coupling of channels each, and their groups."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp.channel_graph import channel_groups
from bsdp.channel_group import ChannelGroup, ChannelMember
from bsdp.cifar_nets import CifarResNet
from tests.helpers.nets import GroupedNet


class FlattenNet(nn.Module):
    """A linear layer that reads four positions of each channel. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(24, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.adaptive_avg_pool2d(F.relu(self.norm(self.conv(images))), 2)
        return self.head(F.relu(self.hidden(features.flatten(1))))


class ConcatNet(nn.Module):
    """Each layer reads the outputs of all before it, as in DenseNet. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(7 + 3, 3)

    def forward(self, images: Tensor) -> Tensor:
        first = self.stem(images)
        second = torch.cat([first, self.conv1(F.relu(self.norm1(first)))], 1)
        third = self.conv2(F.relu(self.norm2(second)))
        return self.head(torch.cat([second.mean((2, 3)), third.mean((2, 3))], 1))


class DepthwiseNet(nn.Module):
    """An inverted residual block as in MobileNetV2. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand, self.norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.stem(images))
        hidden = F.relu6(self.depthwise(F.relu6(self.norm(self.expand(features)))))
        return self.head((features + self.project(hidden)).mean((2, 3)))


class TransposedNet(nn.Module):
    """A plain and a grouped transposed convolution. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.up1 = nn.ConvTranspose2d(4, 6, 3, stride=2)
        self.up2 = nn.ConvTranspose2d(6, 8, 2, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.up2(F.relu(self.up1(F.relu(self.conv(images)))))).mean((2, 3)))


def _resnet() -> nn.Module:
    return CifarResNet(1, num_classes=3)


CHANNEL_NETS = {
    "residual": (_resnet, (3, 8, 8)),
    "concat": (ConcatNet, (3, 8, 8)),
    "flatten": (FlattenNet, (3, 8, 8)),
    "depthwise": (DepthwiseNet, (3, 8, 8)),
    "grouped": (GroupedNet, (3, 8, 8)),
    "transposed": (TransposedNet, (3, 8, 8)),
}


def channel_net(name: str) -> nn.Module:
    """A network of the table in eval mode, in float64."""
    return CHANNEL_NETS[name][0]().double().eval()


def channel_batch(name: str, *, batch: int = 4) -> Tensor:
    """A batch for it."""
    return torch.randn(batch, *CHANNEL_NETS[name][1], dtype=torch.float64)


@functools.cache
def groups_of(name: str) -> dict[str, ChannelGroup]:
    """The groups of a network of the table, traced once: they hold names and positions only."""
    if name == "transposed":  # torch-pruning does not follow grouped transposed convolutions
        return {"conv": _chain("conv", "up1", 4), "up1": _chain("up1", "up2", 6), "up2": _chain("up2", "head", 8)}
    return channel_groups(channel_net(name), channel_batch(name, batch=1))


def _chain(maker: str, reader: str, size: int) -> ChannelGroup:
    index = torch.arange(size)[:, None]
    return ChannelGroup(maker, index, (ChannelMember(maker, "out", index), ChannelMember(reader, "in", index)))
