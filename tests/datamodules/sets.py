"""Tiny data sets for the tests of the data modules."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bsdp.datamodules import ImageDataModule
from bsdp.datamodules.arrays import ArraySource
from bsdp.datamodules.base import Split

NORMALIZATION = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 1.0]}


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    """Give random uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class ToyDataModule(ImageDataModule):
    """Random 8x8 images: 44 for training, 10 for testing, of 2 classes."""

    CLASS_NAMES = ("even", "odd")
    NATIVE_SIZE = 8

    def _load(self, split: Split) -> ArraySource | None:
        if split == "val":
            return None
        count = 44 if split == "train" else 10
        images = torch.from_numpy(pixels(count, 1, 8, 8, seed=count))
        return ArraySource(images, torch.arange(count) % 2)


def write_strips(folder: Path, class_names: tuple[str, ...], *, count: int, seed: int = 0) -> np.ndarray:
    """Write PNG strips; give the pixels, ``[classes, count, 32, 32, 3]``."""
    folder.mkdir(parents=True)
    images = pixels(len(class_names), count, 32, 32, 3, seed=seed)
    for name, strip in zip(class_names, images, strict=True):
        Image.fromarray(strip.reshape(-1, 32, 3)).save(folder / f"{name}.png")
    return images


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array in the idx form of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(head + array.tobytes())


def write_npz(
    path: Path, *, grey: bool = True, val: bool = True, **changed: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Write 20 / 6 / 8 images of 2 classes in the form of MedMNIST; None leaves an array out."""
    arrays: dict[str, np.ndarray | None] = {}
    for seed, (split, count) in enumerate({"train": 20, "val": 6, "test": 8}.items()):
        if split != "val" or val:
            arrays[f"{split}_images"] = pixels(count, 28, 28, *(() if grey else (3,)), seed=seed)
            arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1)
    kept = {key: array for key, array in (arrays | changed).items() if array is not None}
    np.savez_compressed(path, **kept)
    return kept


def write_folder(root: Path, counts: dict[str, dict[str, int]]) -> None:
    """Write PNG photographs of changing shape: ``{split: {class: number}}``."""
    for split, classes in counts.items():
        for number, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                # A ramp of colour that tells classes and images apart and survives scaling.
                height, width = 40 + 2 * i, 60 - i
                image = np.zeros((height, width, 3), np.uint8)
                image[..., 0] = np.linspace(0, 255, width)[None]
                image[..., 1] = 100 * number
                image[..., 2] = 10 * i
                Image.fromarray(image).save(root / split / name / f"{i}.png")
