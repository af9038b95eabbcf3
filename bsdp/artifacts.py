"""What a run leaves behind, read back without Lightning: run folders, checkpoints and ``pruned.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.backbone_families import Backbone
from bsdp.backbones import build_backbone
from bsdp.files import load, read_metadata
from bsdp.folding import fold
from bsdp.layers import named_pairs, watching
from bsdp.probing import evaluating
from bsdp.reading import shown
from bsdp.structure import STRUCTURE_VERSION, read_checkpoint, rebuild, rebuild_for
from bsdp.surgery import load_tensors
from bsdp.weight_files import no_weight_files

CONFIG_FILE = "config.yaml"
PRUNED_CHECKPOINT = "pruned.ckpt"
FAMILIES = ("bsdp", "torchvision", "timm")
IMAGES = "bsdp_images"  # key of a checkpoint under which a `TransferTask` tells of its images
_PREFIX = "network."


class UnknownNetworkError(ValueError):
    """A file is whole, but does not say how to build its network.

    Args:
        message: What to do in Python.
        path: The file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Artifact:
    """A network that was read back, with all that is known of it.

    Attributes:
        source: The file, or the name of a backbone.
        decomposed: The network with its pairs, in eval mode. Of a safetensors file with pairs only the structure is
            like this, and the values mean nothing: they are in `folded`.
        folded: The same network of plain layers, in eval mode.
        image_shape: ``(channels, height, width)`` of the images that it was made for.
        metadata: ``backbone``, ``head``, ``num_classes``, ``pretrained`` and, where they are known, ``class_names``,
            ``image_size``, ``mean`` and ``std``, as values that JSON can hold.
    """

    source: Path | str
    decomposed: nn.Module
    folded: nn.Module
    image_shape: tuple[int, ...]
    metadata: dict[str, Any]

    @property
    def is_pruned(self) -> bool:
        """Whether there are pairs at all."""
        return bool(named_pairs(self.decomposed))

    def original(self) -> nn.Module:
        """The undecomposed architecture with the same head and random weights, in eval mode."""
        return _build(self.metadata, self.source).network.eval()

    def example(self, batch_size: int = 1, *, image_size: int | None = None) -> Tensor:
        """Random images that do not change from call to call.

        Args:
            batch_size: Number of images.
            image_size: Height and width; None for those that the network was made for.
        """
        shape = self.image_shape if image_size is None else (self.image_shape[0], image_size, image_size)
        return torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(0))


def load_artifact(
    target: str | os.PathLike[str], *, backbones: bool = False, num_classes: int | None = None
) -> Artifact:
    """Read a run folder, a checkpoint or a safetensors file; nothing is unpickled.

    Args:
        target: A run folder (its ``pruned.ckpt`` is read), a checkpoint of `bsdp.task.TransferTask`, or a file of
            `bsdp.save` whose metadata names the backbone.
        backbones: Whether the name of a backbone, such as ``bsdp:resnet20``, will do, too.
        num_classes: Outputs of a new head for such a backbone; None keeps its own. Other networks have theirs.

    Raises:
        FileNotFoundError: If there is no such file, or the run folder has no pruned checkpoint.
        UnknownNetworkError: If the file does not say how to build its network.
        ValueError: If the file is damaged or of another kind.
    """
    if backbones and str(target).partition(":")[0] in FAMILIES:
        return _from_backbone(str(target), num_classes)
    path = find_artifact(target, backbones=backbones)
    artifact = _from_safetensors(path) if path.suffix == ".safetensors" else _from_checkpoint(path)
    own = artifact.metadata["num_classes"]
    if num_classes is not None and num_classes != own:
        raise ValueError(
            f"`num_classes={num_classes}` gives the head of a backbone that is named; {path} has {own} classes of its "
            "own. Leave it out."
        )
    return artifact


def find_artifact(target: str | os.PathLike[str], *, backbones: bool = False) -> Path:
    """Find the file that a path means: the file itself, or the pruned checkpoint of a run folder.

    Args:
        target: See `load_artifact`.
        backbones: Whether the error speaks of backbone names, too.

    Raises:
        FileNotFoundError: If there is none; the message names the checkpoints or the newest run that are there.
    """
    path = Path(target).expanduser()
    try:
        is_file = path.is_file()
        is_folder = path.is_dir() and str(target) != ""  # which would mean the present folder
    except OSError:  # for example a name that is too long
        is_file = is_folder = False
    if is_file:
        return path
    if not is_folder:
        names = ", or the name of a backbone such as bsdp:resnet20" if backbones else ""
        raise FileNotFoundError(
            f"there is no file or folder {str(target)!r}: give a run folder, a checkpoint (.ckpt) or a .safetensors "
            f"file written by bsdp{names}."
        )
    if (path / PRUNED_CHECKPOINT).is_file():
        return path / PRUNED_CHECKPOINT
    runs = [p.parent for pattern in ("*/", "*/*/") for p in path.glob(pattern + PRUNED_CHECKPOINT)]
    if runs:
        newest = max(runs, key=lambda run: (run / PRUNED_CHECKPOINT).stat().st_mtime)
        raise FileNotFoundError(
            f"the folder {str(target)!r} is not that of a run, but has {len(runs)} of them. Give one; the newest is "
            f"{str(newest)!r}."
        )
    files = sorted(p for pattern in ("*.ckpt", "*/*.ckpt", "*.safetensors") for p in path.glob(pattern))
    others = ", ".join(str(p.relative_to(path)) for p in files[:5])
    advice = f"Give one of its files instead: {others}." if files else "There is no other checkpoint in it, either."
    raise FileNotFoundError(f"the folder {str(target)!r} has no {PRUNED_CHECKPOINT}, so no run ended there. {advice}")


def run_folder_of(checkpoint: Path) -> Path | None:
    """Find the folder of the run that wrote a checkpoint: the next one above it that holds ``config.yaml``."""
    parents = list(checkpoint.absolute().parents)[:3]
    return next((folder for folder in parents if (folder / CONFIG_FILE).is_file()), None)


def _from_backbone(spec: str, num_classes: int | None) -> Artifact:
    with no_weight_files():
        backbone = build_backbone(spec, num_classes=num_classes)
    network = backbone.network.eval()
    metadata = {"backbone": spec, "head": "original", "num_classes": backbone.num_classes, "pretrained": True}
    size = backbone.image_size
    return Artifact(spec, network, network, (3, size, size), metadata | backbone.normalization | {"image_size": size})


def _from_safetensors(path: Path) -> Artifact:
    metadata = read_metadata(path)
    plan, widths = metadata.pop("layers"), metadata.pop("widths", {})
    metadata.pop("format_version")
    if not isinstance(metadata.get("backbone"), str):
        raise UnknownNetworkError(
            f"{path} does not say which backbone it is of, so its network cannot be built here. In Python: "
            f"`network = bsdp.load(MyNetwork(), {str(path)!r})`, then `bsdp.export(network, 'model.onnx', images)`.",
            path,
        )
    backbone = _build(metadata, path)
    folded = load(backbone.network, path)
    decomposed = folded
    if any(entry["kind"] != "plain" for entry in plan.values()):
        decomposed = _build(metadata, path).network.eval()
        _decompose_by_plan(decomposed, plan, widths)
    return Artifact(path, decomposed, folded, *_image_facts(metadata, None, backbone))


def _decompose_by_plan(
    network: nn.Module, plan: Mapping[str, Mapping[str, Any]], widths: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a network the widths, ranks and biases of a file that `bsdp.load` has checked; the values mean nothing."""
    # A pair that was saved as one layer is described as one, also where only measured times said so.
    ranks = {
        name: {"rank": entry["rank"]} | ({"pair_limit": 0} if entry["kind"] == "fused" else {})
        for name, entry in plan.items()
        if entry["kind"] != "plain"
    }
    rebuild(network, {"version": STRUCTURE_VERSION, "pairs": ranks, "widths": widths})
    for name, pair in named_pairs(network).items():
        with torch.no_grad():
            pair.scaling.bias.fill_(float(plan[name]["bias"]))


def _from_checkpoint(path: Path) -> Artifact:
    checkpoint = read_checkpoint(path)
    settings, state = checkpoint.get("hyper_parameters", {}), checkpoint["state_dict"]
    known = isinstance(settings.get("backbone"), str) and "head" in settings
    if not known or not all(str(key).startswith(_PREFIX) for key in state):
        raise UnknownNetworkError(
            f"{path} is of another LightningModule than `bsdp.task.TransferTask`, whose network cannot be built here. "
            f"In Python: `module = MyModule(); bsdp.load_checkpoint(module, {str(path)!r})`, then "
            "`bsdp.export(module.network, 'model.onnx', images)` with the module's own network.",
            path,
        )
    metadata = {key: settings.get(key) for key in ("backbone", "head", "num_classes")}
    metadata["pretrained"] = str(settings.get("weights") or "none").lower() != "none"
    metadata |= {key: value for key, value in (settings.get("normalization") or {}).items() if key in ("mean", "std")}
    backbone = _build(metadata, path)
    network = backbone.network.eval()
    module = nn.ModuleDict({_PREFIX.removesuffix("."): network})
    rebuild_for(module, checkpoint, source=path)
    load_tensors(module, state)
    images = _images_of(checkpoint, backbone.num_classes)
    told = images.pop("shape", None)
    metadata |= images | _facts_of_run(path, metadata)
    shape, metadata = _image_facts(metadata, _seen_shape(checkpoint) or told, backbone)
    with suppress(Exception), evaluating(network), watching(named_pairs(network).values()):
        network(torch.zeros(1, *shape))  # pairs whose weight the network reads fold into one layer each
    return Artifact(path, network, fold(network).eval(), shape, metadata)


def _build(metadata: Mapping[str, Any], source: Path | str) -> Backbone:
    """Build the original network that the metadata describe, with random weights."""
    classes, head = metadata.get("num_classes"), metadata.get("head", "original")
    if type(classes) is not int or classes < 1:
        raise ValueError(f"{source} names the number of classes {shown(classes)}; it must be an integer of at least 1.")
    with no_weight_files():
        return build_backbone(
            metadata["backbone"],
            num_classes=classes,
            # Two networks of torchvision shift their input if, and only if, they are pretrained.
            weights="default" if metadata.get("pretrained", True) else "none",
            head=head,
        )


def _facts_of_run(checkpoint: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the other files of the run know of the images: the pruned weights, else the configuration."""
    folder = run_folder_of(checkpoint) or checkpoint.parent
    same = [checkpoint.with_suffix(".safetensors"), folder / Path(PRUNED_CHECKPOINT).with_suffix(".safetensors")]
    for path in same:
        try:
            found = read_metadata(path)
        except (FileNotFoundError, ValueError):
            continue
        if all(found.get(key) == metadata[key] for key in ("backbone", "num_classes")):
            return {key: found[key] for key in ("class_names", "image_size", "mean", "std") if found.get(key)}
    return _facts_of_config(folder / CONFIG_FILE)


def _facts_of_config(path: Path) -> dict[str, Any]:
    try:
        import yaml

        settings = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]
        facts = {"image_size": settings.get("image_size"), **(settings.get("normalization") or {})}
    except Exception:  # no such file, no YAML, or another shape of it: only a default is lost
        return {}
    return {key: facts[key] for key in ("image_size", "mean", "std") if facts.get(key)}


def _images_of(checkpoint: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """What a `TransferTask` wrote of the images that it was trained on, as far as it is sound."""
    found = checkpoint.get(IMAGES)
    if not isinstance(found, Mapping):
        return {}
    names = found.get("class_names")
    sound = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    return {"shape": found.get("shape")} | ({"class_names": names} if sound else {})


def _seen_shape(checkpoint: Mapping[str, Any]) -> object:
    """The shape of the images that a pruning callback saw in training, as its record in the checkpoint says."""
    states = checkpoint.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        record = state.get("record") if isinstance(state, Mapping) else None
        shapes = record.get("input_shapes") if isinstance(record, Mapping) else None
        if isinstance(shapes, list) and len(shapes) == 1 and isinstance(shapes[0], list):
            return shapes[0][1:]
    return None


def _image_facts(metadata: dict[str, Any], seen: object, backbone: Backbone) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape of the images, from the best source there is, and the metadata with their size."""
    size = metadata.get("image_size") or backbone.image_size
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    shape = seen if isinstance(seen, list) and len(seen) == 3 else [3, height, width]
    if not all(type(side) is int and 1 <= side <= 2**16 for side in shape):
        raise ValueError(f"the image size {shown(shape)} of the file is no size; the file is damaged.")
    return tuple(shape), {**metadata, "image_size": shape[1] if shape[1] == shape[2] else shape[1:]}
