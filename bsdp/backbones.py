"""Backbones by name, with pretrained weights and a new head.

A backbone is named ``family:name``:

- ``bsdp:resnet20`` comes with its weights in this package; ``bsdp:resnet56`` is its deeper sister. Their ``_pad`` forms
  (``bsdp:resnet20_pad``, ``bsdp:resnet56_pad``) have shortcuts without parameters, as most published CIFAR ResNets do,
  and ``bsdp:densenet_bc100`` is DenseNet-BC of depth 100 and growth 12. All are for 32x32 images.
- ``torchvision:NAME`` is any classification model of torchvision.
- ``timm:NAME`` is any model of timm (``pip install "bsdp[timm]"``).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bsdp.cifar_nets import CifarResNet, densenet_bc100
from bsdp.heads import find_head, head_outputs, pool_linear_head, replace_head
from bsdp.weight_files import (
    WeightFile,
    find_weight_file,
    load_state,
    looks_like_file,
    read_weight_file,
    weight_files_are_read,
)

HeadKind = Literal["original", "pool_linear", "pretrained"]
Normalization = dict[str, list[float]]

_IMAGENET: Normalization = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CIFAR: Normalization = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}
_DENSENET: Normalization = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.201]}
_OWN: dict[str, tuple[Callable[[], nn.Module], Normalization]] = {
    "resnet20": (partial(CifarResNet, 3), _CIFAR),
    "resnet56": (partial(CifarResNet, 9), _CIFAR),
    "resnet20_pad": (partial(CifarResNet, 3, shortcut="pad"), _IMAGENET),
    "resnet56_pad": (partial(CifarResNet, 9, shortcut="pad"), _IMAGENET),
    "densenet_bc100": (densenet_bc100, _DENSENET),
}
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
_FAMILIES = ("bsdp", "torchvision", "timm")


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


def build_backbone(
    spec: str, *, num_classes: int | None = None, weights: str | None = "default", head: HeadKind = "original"
) -> Backbone:
    """Build a backbone, load its pretrained weights, and give it a new head.

    Args:
        spec: ``family:name``, see `list_backbones`.
        num_classes: Outputs of the new head; None keeps the head that comes with the weights.
        weights: ``default`` for the bundled or published weights, the name of other published weights
            (``IMAGENET1K_V1``), a file (``.safetensors``, or a state dict in ``.pth``; relative paths are also looked
            up below ``BSDP_DATA``), or ``none`` for random weights.
        head: ``original`` replaces the last layer, ``pool_linear`` replaces the whole head of VGG and AlexNet by
            global average pooling and a linear layer, ``pretrained`` keeps the head and its weights.

    Returns:
        The network and what is known of it.

    Raises:
        ValueError: If an argument is not as above, or the weight file is of another architecture.
        FileNotFoundError: If there is no such weight file.

    Example:
        >>> build_backbone("bsdp:resnet20", num_classes=5, weights="none").network.fc
        Linear(in_features=64, out_features=5, bias=True)
    """
    _check(spec, num_classes, head)
    family, _, name = spec.partition(":")
    weights = None if weights is None or weights.lower() == "none" else weights
    file = _open(spec, weights)
    published = weights is not None and file is None and weight_files_are_read() and family != "bsdp"
    build = {"bsdp": _build_own, "torchvision": _build_torchvision, "timm": _build_timm}[family]
    backbone = build(spec, name, weights if published else None, weights is not None)
    keep_head = head == "pretrained" or num_classes is None
    if file is not None:
        backbone = _load(backbone, file, keep_head=keep_head)
    if head == "pretrained" and num_classes not in (None, backbone.num_classes):
        raise ValueError(
            f"`num_classes` is {num_classes}, but the pretrained head of {spec!r} has {backbone.num_classes} outputs; "
            "use `head: original` for a new one."
        )
    if head == "pool_linear":
        num_classes = num_classes or backbone.num_classes
        new_head = pool_linear_head(backbone.network, num_classes=num_classes, spec=spec)
        return replace(backbone, head=new_head, num_classes=num_classes, class_names=None, weights=weights)
    if not keep_head:
        assert num_classes is not None
        replace_head(backbone.network, backbone.head, num_classes=num_classes)
        backbone = replace(backbone, num_classes=num_classes, class_names=None)
    return replace(backbone, weights=weights)


def list_backbones(family: str | None = None) -> list[str]:
    """List the names that `build_backbone` takes.

    Args:
        family: ``bsdp``, ``torchvision`` or ``timm``; None for the first two (timm has more than a thousand).

    Example:
        >>> list_backbones("bsdp")[:2]
        ['bsdp:densenet_bc100', 'bsdp:resnet20']
    """
    if family is None:
        return list_backbones("bsdp") + list_backbones("torchvision")
    if family == "bsdp":
        return [f"bsdp:{name}" for name in sorted(_OWN)]
    if family == "timm":
        return [f"timm:{name}" for name in _timm().list_models()]
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)]


def bundled_weights(name: str) -> Path:
    """Path of the weight file of this package for a ``bsdp:`` backbone; the file need not exist."""
    return Path(__file__).parent / "weights" / f"{name}_cifar10.safetensors"


def _check(spec: str, num_classes: int | None, head: str) -> None:
    family, _, name = spec.partition(":")
    listing = "`python -c 'import bsdp.backbones as b; print(b.list_backbones())'` lists them"
    if family not in _FAMILIES or not name:
        near = difflib.get_close_matches(spec, list_backbones(), n=3, cutoff=0.3)
        raise ValueError(
            f"`backbone` must be `family:name` with one of the families {', '.join(_FAMILIES)}, got {spec!r}. Near: "
            f"{', '.join(near) or 'none'}; {listing}."
        )
    known = list_backbones(family)
    if (spec.split(".")[0] if family == "timm" else spec) not in known:
        near = difflib.get_close_matches(spec, known, n=3, cutoff=0.3)
        raise ValueError(f"`backbone`: unknown {spec!r}. Near: {', '.join(near) or 'none'}; {listing}.")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1 (or None to keep the pretrained head), got {num_classes}.")
    if head not in ("original", "pool_linear", "pretrained"):
        raise ValueError(f"`head` must be 'original', 'pool_linear' or 'pretrained', got {head!r}.")


def _open(spec: str, weights: str | None) -> WeightFile | None:
    """Read the weight file that is asked for, if it is a file at all."""
    if weights is None or not weight_files_are_read():
        return None
    if not looks_like_file(weights):
        if not spec.startswith("bsdp:"):
            return None
        bundled = bundled_weights(spec.partition(":")[2])
        if weights != "default" or not bundled.is_file():
            raise ValueError(
                f"`weights`: {spec!r} has no weights named {weights!r} in this package; give the path of a weight "
                "file, or `none` for random weights."
            )
        return read_weight_file(bundled)
    return read_weight_file(find_weight_file(weights))


def _load(backbone: Backbone, file: WeightFile, *, keep_head: bool) -> Backbone:
    """Load a file, whose number of classes may be any; without a head in it the head stays random."""
    weight = file.state.get(f"{backbone.head}.weight")
    if weight is not None and weight.shape[0] != backbone.num_classes:
        replace_head(backbone.network, backbone.head, num_classes=weight.shape[0])
        backbone = replace(backbone, num_classes=weight.shape[0])
    top = backbone.head.split(".")[0]
    load_state(backbone.network, file, spec=backbone.spec, may_lack=top, extra=_AUXILIARY)
    if weight is None and keep_head:
        raise ValueError(
            f"`num_classes`: {file.path} has no tensor {backbone.head}.weight, so there is no pretrained head to keep; "
            "give the number of classes."
        )
    known = {key: file.metadata[key] for key in ("mean", "std", "image_size", "class_names") if key in file.metadata}
    names = known.get("class_names")
    return replace(
        backbone,
        normalization={key: list(known.get(key, backbone.normalization[key])) for key in ("mean", "std")},
        image_size=int(known.get("image_size", backbone.image_size)),
        class_names=None if names is None else tuple(names),
    )


def _build_own(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
    factory, normalization = _OWN[name]
    network = factory()
    head = find_head(network, num_classes=10, spec=spec)
    return Backbone(spec, network, head, 10, normalization, 32, None, None)


def _build_torchvision(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
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
        network = models.get_model(name, weights=entry if published is not None else None, **options)
    except OSError as error:  # urllib's errors are OSErrors
        raise ValueError(
            f"`weights`: the published weights of {spec!r} could not be downloaded ({error}). Without a network, give "
            "the path of a weight file, or `none` for random weights."
        ) from error
    count = len(entry.meta["categories"]) if published is not None else 1000
    transforms = entry.transforms() if entry is not None else None
    normalization = {"mean": list(transforms.mean), "std": list(transforms.std)} if transforms else _IMAGENET
    size = transforms.crop_size[0] if transforms else 224
    head = find_head(network, num_classes=count, spec=spec)
    return Backbone(spec, network, head, count, normalization, size, None, None)


def _build_timm(spec: str, name: str, published: str | None, pretrained: bool) -> Backbone:
    timm = _timm()
    full = name if published in (None, "default") else f"{name.split('.')[0]}.{published}"
    try:
        network = timm.create_model(full, pretrained=published is not None)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"`weights`: timm could not give {full!r} ({str(error).splitlines()[0]}). Give the path of a weight file, "
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


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError('`backbone`: the family "timm" needs the package timm: pip install "bsdp[timm]".') from error
    return timm
