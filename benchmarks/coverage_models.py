"""The models of `coverage.py`: what to build, without any network, and which input to give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Image sizes where 128 is too small for the architecture, or is not allowed.
_TORCHVISION_SIZES = {"inception": 299, "vit": 224, "maxvit": 224}
_TIMM_SIZES = {"deepseek_vit": 126, "gemma4_vit": 96, "qwen3_vit": 96}  # multiples of their patches


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        family: Where it stands in the table.
        name: The library's name of the model.
        build: Builds it with random weights.
        inputs: Builds the arguments of one forward pass for a batch size.
        training: Builds the arguments of a training pass; None: the same as `inputs`.
    """

    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    training: Callable[[int], tuple[Any, ...]] | None = None


def torchvision_cases() -> Iterator[Case]:
    """Every classification, segmentation, detection and video model of torchvision."""
    import torchvision.models as zoo

    for name in zoo.list_models(module=zoo):
        size = next((size for start, size in _TORCHVISION_SIZES.items() if name.startswith(start)), 128)
        yield _torchvision_case("classification", name, partial(_images, size), init_weights=None)
    for name in zoo.list_models(module=zoo.segmentation):
        yield _torchvision_case("segmentation", name, partial(_images, 96), weights_backbone=None)
    for name in zoo.list_models(module=zoo.detection):
        yield Case(
            "torchvision detection", name, partial(Detector, name), _image_list, partial(_image_list, targets=True)
        )
    for name in zoo.list_models(module=zoo.video):
        size, frames = (64, 8) if name.endswith("_18") else (224 if name.startswith(("mvit", "s3d")) else 112, 16)
        yield _torchvision_case("video", name, partial(_clips, size, frames))


def timm_cases() -> Iterator[Case]:
    """The smallest model of every family that timm knows; counting all of them takes minutes."""
    for family, name in smallest_timm_models().items():
        yield timm_case(name, family=family)


def timm_case(name: str, *, family: str | None = None) -> Case:
    """One model of timm, at 224 pixels or the size that it was made for."""
    import timm

    config = timm.get_pretrained_cfg(name)
    family, size = family or timm_family(name), 224
    if config is not None:
        smallest = config.min_input_size or (0, 0, 0)
        size = config.input_size[1] if config.fixed_input_size else max(smallest[1], min(224, config.input_size[1]))
    return Case(
        f"timm {family}", name, partial(timm.create_model, name), partial(_images, _TIMM_SIZES.get(family, size))
    )


def timm_families() -> dict[str, list[str]]:
    """The names of timm's models by family, which is the module that defines them."""
    import timm

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm_family(name), []).append(name)
    return families


def timm_family(name: str) -> str:
    """The module of timm that defines a model."""
    import timm

    return str(timm.model_entrypoint(name).__module__).rpartition(".")[2]


def smallest_timm_models() -> dict[str, str]:
    """The model with the fewest parameters of every family."""
    import timm

    smallest = {}
    for family, names in sorted(timm_families().items()):
        sizes = {}
        for name in names:
            with torch.device("meta"), contextlib.suppress(Exception):  # some cannot be built without memory
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
        smallest[family] = min(sizes or {names[0]: 0}, key=lambda name: sizes.get(name, 0))
    return smallest


def _torchvision_case(kind: str, name: str, inputs: Callable[[int], tuple[Any, ...]], **options: Any) -> Case:
    from torchvision.models import get_model

    if "init_weights" in options and not name.startswith(("googlenet", "inception")):
        del options["init_weights"]
    elif "init_weights" in options:
        options["init_weights"] = True
    return Case(f"torchvision {kind}", name, partial(get_model, name, weights=None, **options), inputs)


class Detector(nn.Module):
    """A detector whose outputs in eval mode are what its heads say, before boxes are chosen.

    The choice (the best scores, overlaps above a threshold) turns differences of rounding into other boxes. The heads
    of the second stage see the same boxes every time.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        from torchvision.models import get_model

        self.model = get_model(name, weights=None, weights_backbone=None, num_classes=5)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        model = self.model
        if self.training:
            return model(images, targets)
        detections = model(images)
        assert len(detections) == len(images)
        batch, _ = model.transform(images)
        features = model.backbone(batch.tensors)
        features = {"0": features} if isinstance(features, Tensor) else features
        levels = list(features.values())
        if not hasattr(model, "roi_heads"):
            return model.head(levels)
        outputs = [model.rpn.head(levels)]
        heads, size = model.roi_heads, batch.image_sizes[0]
        boxes = [torch.tensor([[8.0, 8.0, size[1] / 2, size[0] / 2], [20.0, 4.0, 120.0, 99.0]]).to(levels[0])]
        for kind in ("box", "mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, [size])
                pooled = getattr(heads, f"{kind}_head")(pooled)
                outputs.append(getattr(heads, f"{kind}_predictor")(pooled))
        return outputs


def _tensors(shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)),)


def _images(size: int, batch: int) -> tuple[Tensor, ...]:
    return _tensors((3, size, size), batch)


def _clips(size: int, frames: int, batch: int) -> tuple[Tensor, ...]:
    return _tensors((3, frames, size, size), batch)


def _image_list(batch: int, *, targets: bool = False) -> tuple[Any, ...]:
    images = list(_images(160, batch)[0].sigmoid())
    if not targets:
        return (images,)
    boxes = torch.tensor([[10.0, 20.0, 90.0, 120.0], [40.0, 10.0, 150.0, 80.0]])
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 1]),
        "masks": torch.ones(2, 160, 160, dtype=torch.uint8),
        "keypoints": torch.cat([torch.full((2, 17, 2), 60.0), torch.ones(2, 17, 1)], dim=2),
    }
    return images, [target] * batch
