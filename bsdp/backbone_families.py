"""The families of backbones: how each builds a network, and what it knows of the pretraining."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError
from typing import Any

from torch import nn

from bsdp.cifar_nets import CifarResNet, densenet_bc100
from bsdp.heads import find_head, head_outputs
from bsdp.reading import reason_of, without_unpickling

Normalization = dict[str, list[float]]

_IMAGENET: Normalization = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CIFAR: Normalization = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}
_DENSENET: Normalization = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]}
OWN: dict[str, tuple[Callable[[], nn.Module], Normalization]] = {
    "resnet20": (partial(CifarResNet, 3), _CIFAR),
    "resnet56": (partial(CifarResNet, 9), _CIFAR),
    "resnet20_pad": (partial(CifarResNet, 3, shortcut="pad"), _IMAGENET),
    "resnet56_pad": (partial(CifarResNet, 9, shortcut="pad"), _IMAGENET),
    "densenet_bc100": (densenet_bc100, _DENSENET),
}


@dataclass(frozen=True)
class Backbone:
    """A network with its head in place, and what its pretraining says about the images it wants.

    Args:
        spec: ``family:name``.
        network: The network, in training mode as torch builds it.
        head: Dotted name of the layer that gives the class scores.
        num_classes: Outputs of the head.
        normalization: ``mean`` and ``std`` of the images in [0, 1], a number per channel.
        image_size: Side of the images of the pretraining.
        weights: The file or published name that was loaded; None for random weights.
        class_names: Names of the classes where the weight file tells them and the head is kept.
    """

    spec: str
    network: nn.Module
    head: str
    num_classes: int
    normalization: Normalization
    image_size: int
    weights: str | None
    class_names: tuple[str, ...] | None


def build_own(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
    """Build a network of this package, with random weights; the options are those of `build_torchvision`."""
    factory, normalization = OWN[name]
    network = factory()
    head = find_head(network, num_classes=10, spec=spec)
    return Backbone(spec, network, head, 10, normalization, 32, None, None)


def build_torchvision(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
    """Build a classification model of torchvision.

    Args:
        spec: ``torchvision:name``, for errors.
        name: Name of the model.
        published: Name of the published weights to download; None for random weights.
        pretrained: Weights follow, published ones or a file.
    """
    from torchvision import models

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Published weights of these two were made for inputs that the network shifts by itself; published files have
        # auxiliary heads, which only help to train from scratch.
        options = {"aux_logits": False, "transform_input": pretrained, "init_weights": not pretrained}
        if published is not None:
            options = {"aux_logits": False}
    choices = models.get_model_weights(name)
    entry: Any = next(iter(choices)) if len(choices) else None
    if published is not None:
        names = {"default": choices.DEFAULT} | {member.name.lower(): member for member in choices}
        if published.lower() not in names:
            raise ValueError(
                f"`weights`: {spec!r} has no published weights named {published!r}; allowed are default, "
                f"{', '.join(member.name for member in choices)}, the path of a file, or none."
            )
        entry = names[published.lower()]
    try:
        with without_unpickling():
            network = models.get_model(name, weights=entry if published is not None else None, **options)
    except (OSError, UnpicklingError) as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"`weights`: the published weights of {spec!r} could not be downloaded ({reason_of(error)}). Without a "
            "network, give the path of a weight file, or `none` for random weights."
        ) from error
    count = len(entry.meta["categories"]) if published is not None else 1000
    transforms = entry.transforms() if entry is not None else None
    normalization = {"mean": list(transforms.mean), "std": list(transforms.std)} if transforms else _IMAGENET
    size = transforms.crop_size[0] if transforms else 224
    head = find_head(network, num_classes=count, spec=spec)
    return Backbone(spec, network, head, count, normalization, size, None, None)


def build_timm(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
    """Build a model of timm; the options are those of `build_torchvision`."""
    timm = import_timm()
    full = name if published in (None, "default") else f"{name.split('.')[0]}.{published}"
    try:
        with without_unpickling():
            network = timm.create_model(full, pretrained=published is not None)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"`weights`: timm could not give {full!r} ({reason_of(error)}). Give the path of a weight file, "
            "or `none` for random weights."
        ) from error
    config = timm.data.resolve_data_config({}, model=network)
    head = network.default_cfg.get("classifier") or ""
    layer = network.get_submodule(head) if isinstance(head, str) and head else None
    count = head_outputs(layer) if layer is not None else None
    if count is None:
        raise ValueError(f"`backbone`: {spec!r} has no single linear layer or convolution as its head; choose another.")
    normalization = {"mean": list(config["mean"]), "std": list(config["std"])}
    return Backbone(spec, network, str(head), count, normalization, config["input_size"][-1], None, None)


def import_timm() -> Any:
    """Import timm, or say which extra brings it."""
    try:
        import timm
    except ImportError as error:
        raise ImportError('`backbone`: the family "timm" needs the package timm: pip install "bsdp[timm]".') from error
    return timm
