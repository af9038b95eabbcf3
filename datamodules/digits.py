"""scikit-learn's handwritten digits, which need no file and no network."""

from functools import cache
from typing import Any

import numpy as np
import torch

from bsdp.datamodules.arrays import ArraySource, Augment
from bsdp.datamodules.base import ImageDataModule, Split
from bsdp.datamodules.splits import stratified_split

_TEST_FRACTION = 0.3
_TEST_SEED = 0


class DigitsDataModule(ImageDataModule):
    """The 1,797 handwritten digits (8x8 grey, given as RGB) that ship inside scikit-learn.

    The set has no official test split: a fixed, stratified 30 % are the test images, whatever the seeds.

    Args:
        image_size: Height and width the images are resized to. None keeps 8, which is too small for most backbones.
        val_fraction: Share of every class of the training images that becomes the validation split, in (0, 1).
        augment: What happens to training images: ``none`` or ``crop`` (small random shifts); ``crop_flip`` would also
            mirror the digits.
    """

    CLASS_NAMES = tuple("0123456789")
    NATIVE_SIZE = 8

    def __init__(
        self,
        *,
        image_size: int | None = 32,
        val_fraction: float = 0.2,
        augment: Augment = "crop",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, val_fraction=val_fraction, augment=augment, **kwargs)

    def _load(self, split: Split) -> ArraySource | None:
        if split == "val":
            return None
        digits = _digits()
        train, test = stratified_split(digits.labels, fraction=_TEST_FRACTION, seed=_TEST_SEED)
        return digits.select(train if split == "train" else test)


@cache
def _digits() -> ArraySource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)  # the set counts from 0 to 16
    return ArraySource(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target).long())
