"""The head of a classifier: find it, replace it, simplify it."""

import math

import torch
from torch import nn

Head = nn.Linear | nn.Conv2d


def find_head(network: nn.Module, *, num_classes: int, spec: str) -> str:
    """Find the layer that gives the class scores: the last linear layer or 1x1 convolution with that many outputs.

    Args:
        network: A classifier.
        num_classes: Number of its outputs.
        spec: Name of the network, for the error.

    Returns:
        The dotted name of the layer.

    Raises:
        ValueError: If no layer has that many outputs.
    """
    heads = [name for name, module in network.named_modules() if head_outputs(module) == num_classes]
    if not heads:
        raise ValueError(f"`backbone`: {spec!r} has no linear layer or 1x1 convolution with {num_classes} outputs.")
    return str(heads[-1])


def head_outputs(layer: nn.Module) -> int | None:
    """Number of outputs of a layer that can be a head, None for any other module."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.out_channels
    return None


def replace_head(network: nn.Module, name: str, *, num_classes: int) -> None:
    """Put a new layer with random weights in the place of the head; the rest of the network stays.

    Args:
        network: Changed in place.
        name: Dotted name of the head.
        num_classes: Outputs of the new head.
    """
    old = network.get_submodule(name)
    new: Head
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, 1, bias=old.bias is not None)
        nn.init.normal_(new.weight, std=0.01)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        nn.init.uniform_(new.weight, -1 / math.sqrt(old.in_features), 1 / math.sqrt(old.in_features))
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    network.set_submodule(name, new.to(old.weight))
    if isinstance(getattr(network, "num_classes", None), int):
        setattr(network, "num_classes", num_classes)  # noqa: B010 (torch types all attributes of a module as modules)


def pool_linear_head(network: nn.Module, *, num_classes: int, spec: str) -> str:
    """Replace the large head of VGG or AlexNet by global average pooling and one linear layer.

    Args:
        network: A torchvision VGG or AlexNet, changed in place.
        num_classes: Outputs of the new head.
        spec: Name of the network, for the error.

    Returns:
        The dotted name of the new head.

    Raises:
        ValueError: For any other network.
    """
    from torchvision.models import VGG, AlexNet

    if not isinstance(network, VGG | AlexNet):
        raise ValueError(
            f"`head='pool_linear'` is for the VGG and AlexNet families, got {spec!r}; use `head='original'`, which "
            "replaces the last layer only."
        )
    channels = [module.out_channels for module in network.features.modules() if isinstance(module, nn.Conv2d)][-1]
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(nn.Linear(channels, num_classes))
    with torch.no_grad():
        nn.init.normal_(network.classifier[0].weight, std=0.01)
        nn.init.zeros_(network.classifier[0].bias)
    return "classifier.0"
