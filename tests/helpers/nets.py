"""Tiny networks, each with one difficulty."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Two convolutions with batch norm and a linear head: the plain case. Input ``[batch, 3, 8, 8]``."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.bn1(self.conv1(images)))
        features = F.relu(self.bn2(self.conv2(features)))
        return self.head(features.mean((2, 3)))


class ResidualNet(nn.Module):
    """A residual sum, which must survive ranks that differ. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.stem(images))
        features = features + F.relu(self.right(self.left(features)))
        return self.head(features.mean((2, 3)))


class GroupedNet(nn.Module):
    """A grouped and a depthwise convolution. Input ``[batch, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.grouped(F.relu(self.stem(images))))
        return self.head(self.depthwise(features).mean((2, 3)))


class SharedNet(nn.Module):
    """One convolution that is called twice, at two sizes, and stands under two names. Input ``[batch, 6, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.second = self.first
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.first(images)), 2)
        return self.head(self.second(features).mean((2, 3)))


class TokenNet(nn.Module):
    """Linear layers on ``[batch, tokens, features]``, as in a transformer. Input ``[batch, 5, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 16)
        self.down = nn.Linear(16, 10, bias=False)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        return self.head(tokens.mean(1))


class SignalNet(nn.Module):
    """Convolutions over one dimension. Input ``[batch, 2, 16]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 9, 5, padding="same")
        self.conv2 = nn.Conv1d(9, 6, 3, stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(6, 3)

    def forward(self, signal: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(signal)))).mean(2))


class VolumeNet(nn.Module):
    """Convolutions over three dimensions. Input ``[batch, 2, 5, 5, 5]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv3d(6, 6, 3, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, volume: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(volume)))).mean((2, 3, 4)))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv": (ConvNet, (3, 8, 8)),
    "residual": (ResidualNet, (3, 8, 8)),
    "grouped": (GroupedNet, (3, 8, 8)),
    "shared": (SharedNet, (6, 8, 8)),
    "tokens": (TokenNet, (5, 10)),
    "signal": (SignalNet, (2, 16)),
    "volume": (VolumeNet, (2, 5, 5, 5)),
}


def make_net(name: str, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network of the table in eval mode, with batch norms that do something."""
    net = NETS[name][0]().to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def make_input(name: str, *, batch: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch for a network of the table."""
    return torch.randn(batch, *NETS[name][1], dtype=dtype)
