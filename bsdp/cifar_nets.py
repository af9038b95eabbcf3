"""Networks for 32x32 images that torchvision has no class for: CIFAR ResNets and DenseNet-BC.

Parameter names follow torchvision's, so that weight files in that form load strictly.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["projection", "pad"]


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second row and column, new channels filled with zeros.

    The zeros go in equal numbers before and after the existing channels ("option A" of He et al. 2015).

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out, at least `in_channels`.
        stride: Step between the rows and columns that are kept.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, h, w]`` to ``[batch, out_channels, h / stride, w / stride]``."""
        x = x[..., :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Show stride and zeros in ``print(model)``."""
        return f"stride={self.stride}, zeros=({self.before}, {self.after})"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
        shortcut: What the shortcut is where the shape changes: a 1x1 convolution with batch norm, or none with
            parameters (`PadShortcut`).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.downsample = nn.Identity()
        elif shortcut == "pad":
            self.downsample = PadShortcut(in_channels, out_channels, stride=stride)
        else:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the two convolutions to the shortcut."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class CifarResNet(nn.Module):
    """The ResNet for 32x32 images of He et al. 2015, section 4.2: three stages of 16, 32 and 64 channels.

    Args:
        blocks_per_stage: 3 gives ResNet-20, 9 gives ResNet-56 (6 n + 2 layers).
        num_classes: Outputs of the last linear layer.
        shortcut: See `CifarBlock`.
    """

    def __init__(self, blocks_per_stage: int, *, num_classes: int = 10, shortcut: Shortcut = "projection") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1, shortcut=shortcut)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2, shortcut=shortcut)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2, shortcut=shortcut)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Give the class scores, ``[batch, num_classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def densenet_bc100(*, num_classes: int = 10) -> nn.Module:
    """Build DenseNet-BC of depth 100 and growth 12 for 32x32 images: torchvision's class with another stem."""
    from torchvision.models import DenseNet

    network: nn.Module = DenseNet(
        growth_rate=12, block_config=(16, 16, 16), num_init_features=24, num_classes=num_classes
    )
    stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)
    network.set_submodule("features.conv0", stem)
    network.set_submodule("features.pool0", nn.Identity())
    return network


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride=stride, shortcut=shortcut)
    rest = [CifarBlock(out_channels, out_channels, stride=1, shortcut=shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
