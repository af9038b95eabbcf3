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
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from bsdp.backbone_families import OWN, Backbone, build_own, build_timm, build_torchvision, import_timm
from bsdp.heads import pool_linear_head, replace_head
from bsdp.reading import shown
from bsdp.weight_files import (
    WeightFile,
    find_weight_file,
    load_state,
    looks_like_file,
    read_weight_file,
    weight_files_are_read,
)
from bsdp.widths import set_widths

HeadKind = Literal["original", "pool_linear", "pretrained"]
_AUXILIARY = ("aux1", "aux2", "AuxLogits")
_BUILDERS = {"bsdp": build_own, "torchvision": build_torchvision, "timm": build_timm}


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
    backbone = _BUILDERS[family](spec, name, weights if published else None, weights is not None)
    # Where no weights are read, a whole checkpoint follows, whose head may have any number of classes.
    keep_head = num_classes is None or (head == "pretrained" and weight_files_are_read())
    if file is not None:
        backbone = _load(backbone, file, keep_head=keep_head)
    if head == "pretrained" and keep_head and num_classes not in (None, backbone.num_classes):
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
        return [f"bsdp:{name}" for name in sorted(OWN)]
    if family == "timm":
        return [f"timm:{name}" for name in import_timm().list_models()]
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)]


def bundled_weights(name: str) -> Path:
    """Path of the weight file of this package for a ``bsdp:`` backbone; the file need not exist."""
    return Path(__file__).parent / "weights" / f"{name}_cifar10.safetensors"


def _check(spec: str, num_classes: int | None, head: str) -> None:
    family, _, name = spec.partition(":")
    listing = "`python -c 'import bsdp.backbones as b; print(b.list_backbones())'` lists them"
    if family not in _BUILDERS or not name:
        near = difflib.get_close_matches(spec, list_backbones(), n=3, cutoff=0.3)
        raise ValueError(
            f"`backbone` must be `family:name` with one of the families {', '.join(_BUILDERS)}, got {spec!r}. Near: "
            f"{', '.join(near) or 'none'}; {listing}."
        )
    known = list_backbones(family)
    listing = listing.replace("()", f'("{family}")')
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
    """Load a file, whose number of classes may be any; without a head in it the head stays random.

    The network gets the widths of a file whose channels were pruned.
    """
    try:
        set_widths(backbone.network, file.metadata.get("widths", {}))
    except ValueError as error:
        raise ValueError(f"`weights`: {file.path} does not fit the backbone {backbone.spec!r}: {error}") from error
    key = f"{backbone.head}.weight"
    weight, own = file.state.get(key), backbone.network.state_dict().get(key)
    # Only what fits but for the number of classes: a file may claim any number of rows with nothing in them.
    fits = weight is not None and own is not None and weight.dim() > 1 and weight.shape[1:] == own.shape[1:]
    if weight is not None and fits and weight.shape[0] not in (0, backbone.num_classes):
        replace_head(backbone.network, backbone.head, num_classes=weight.shape[0])
        backbone = replace(backbone, num_classes=weight.shape[0])
    top = backbone.head.split(".")[0]
    load_state(backbone.network, file, spec=backbone.spec, may_lack=top, extra=_AUXILIARY)
    if weight is None and keep_head:
        raise ValueError(
            f"`num_classes`: {file.path} has no tensor {backbone.head}.weight, so there is no pretrained head to keep; "
            "give the number of classes."
        )
    known = {key: file.metadata[key] for key in _KNOWN if file.metadata.get(key) is not None}
    wrong = next((key for key, value in known.items() if not _KNOWN[key](value)), None)
    if wrong is not None:
        raise ValueError(f"`weights`: {file.path} has metadata with an impossible `{wrong}`: {shown(known[wrong])}.")
    names = known.get("class_names")
    return replace(
        backbone,
        normalization={key: list(known.get(key, backbone.normalization[key])) for key in ("mean", "std")},
        image_size=int(known.get("image_size", backbone.image_size)),
        class_names=None if names is None else tuple(names),
    )


def _are_channels(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) and isfinite(v) for v in value)


# What a file may say of the images it was made for, and what each entry must be.
_KNOWN: dict[str, Callable[[Any], bool]] = {
    "mean": _are_channels,
    "std": lambda value: _are_channels(value) and min(value) > 0,
    "image_size": lambda value: type(value) is int and 1 <= value <= 8192,
    "class_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
