"""CIFAR-10 and CIFAR-100."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bsdp.datamodules._torchvision import TorchvisionDataModule
from bsdp.datamodules.arrays import ArraySource
from bsdp.datamodules.base import Split

_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class CIFAR10DataModule(TorchvisionDataModule):
    """CIFAR-10: 32x32 RGB photographs of 10 classes.

    Two forms are read, the first that is there: torchvision's own (``cifar-10-batches-py`` below `data_dir`), and PNG
    strips (``cifar10/train/<class>.png`` and ``cifar10/test/<class>.png``, each a stack of that class's images from
    top to bottom).
    """

    CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    NATIVE_SIZE = 32
    DATASET = "CIFAR10"

    @property
    def _folder(self) -> Path:
        return self._root / "cifar-10-batches-py"

    @property
    def _strips(self) -> Path:
        return self._root / "cifar10"

    def _places(self) -> list[Path]:
        return [self._folder, self._strips / "train"]

    def _load(self, split: Split) -> ArraySource | None:
        if split == "val" or self._folder.is_dir():
            return super()._load(split)
        return read_strips(self._strips / split, class_names=self.CLASS_NAMES)


class CIFAR100DataModule(TorchvisionDataModule):
    """CIFAR-100: 32x32 RGB photographs of 100 classes; torchvision's form, ``cifar-100-python`` below `data_dir`."""

    CLASS_NAMES = tuple(_CIFAR100_NAMES.split())
    NATIVE_SIZE = 32
    DATASET = "CIFAR100"

    @property
    def _folder(self) -> Path:
        return self._root / "cifar-100-python"


def read_strips(folder: Path, *, class_names: tuple[str, ...]) -> ArraySource:
    """Read a folder of PNG strips, one for each class.

    Args:
        folder: Holds ``<class>.png``, 32 wide and a multiple of 32 high.
        class_names: The classes in the order of their indices.

    Returns:
        All images, class after class.

    Raises:
        FileNotFoundError: If a class has no file.
        ValueError: If a file is no such strip.
    """
    images = [_read_strip(folder / f"{name}.png") for name in class_names]
    labels = torch.arange(len(images)).repeat_interleave(torch.tensor([len(strip) for strip in images]))
    return ArraySource(torch.cat(images), labels)


def _read_strip(path: Path) -> Tensor:
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"'{path}' is missing: a folder of PNG strips holds one file for every class.")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"'{path}' cannot be read as an image ({error}). Fetch this file again.") from error
    if pixels.shape[1] != 32 or pixels.shape[0] % 32:
        height, width = pixels.shape[:2]
        raise ValueError(f"'{path}' must be 32 pixels wide and a multiple of 32 high, it is {width} by {height}.")
    return torch.from_numpy(pixels.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).contiguous()
