"""Small image sets, held in memory as one uint8 tensor and given out as whole batches.

Images are ``[n, channels, height, width]`` with 1 or 3 channels; batches are ``[b, 3, height, width]`` in float32.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bsdp.datamodules.sampling import Batch, Key, generator_for

Augment = Literal["none", "crop", "crop_flip"]
Normalization = dict[str, list[float]]

_RESIZE_ONCE_BYTES = 2**30


def normalize(images: Tensor, normalization: Normalization | None) -> Tensor:
    """Turn uint8 images into RGB floats.

    Args:
        images: ``[b, 1 or 3, height, width]``, uint8.
        normalization: ``mean`` and ``std`` of the three channels on a scale of 0 to 1; None leaves values in [0, 1].

    Returns:
        ``[b, 3, height, width]``, float32.
    """
    scaled = images.expand(-1, 3, -1, -1).to(torch.float32).div_(255.0)
    if normalization is None:
        return scaled
    mean, std = (torch.tensor(normalization[key]).view(3, 1, 1) for key in ("mean", "std"))
    return scaled.sub_(mean).div_(std)


@dataclass(frozen=True)
class ArraySource:
    """Images and labels of one split.

    Attributes:
        images: ``[n, 1 or 3, height, width]``, uint8.
        labels: ``[n]``, int64.
        size: Height and width that batches have; None for those of `images`.
    """

    images: Tensor
    labels: Tensor
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> "ArraySource":
        """Keep the images at `indices`."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def prepare(self, image_size: int | None) -> "ArraySource":
        """Resize now if the result is small enough to keep, else batch by batch, to the same values."""
        if image_size is None or self.images.shape[-2:] == (image_size, image_size):
            return self
        size = (image_size, image_size)
        if self.images.shape[:2].numel() * image_size**2 > _RESIZE_ONCE_BYTES:
            return replace(self, size=size)
        chunks = [_resize(chunk, size) for chunk in torch.split(self.images, 1024)]
        return replace(self, images=torch.cat(chunks))

    def dataset(self, *, augment: Augment, normalization: Normalization | None, seed: int) -> "ArrayDataset":
        """Make the data set a loader reads."""
        return ArrayDataset(self, augment=augment, normalization=normalization, seed=seed)


class ArrayDataset(Dataset[Batch]):
    """Batches of an `ArraySource`.

    The augmentation of an image depends on (seed, epoch, index) only: not on the worker, nor on its place in a batch.

    Args:
        source: Images and labels.
        augment: ``none``, ``crop`` (shift by up to an eighth of the height, black outside) or ``crop_flip`` (also
            mirrored left to right, in half of the cases).
        normalization: See `normalize`.
        seed: Seed of the augmentation.
    """

    def __init__(
        self, source: ArraySource, *, augment: Augment, normalization: Normalization | None, seed: int
    ) -> None:
        self._source = source
        self._augment = augment
        self._normalization = normalization
        self._seed = seed
        self._draws: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Batch:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[Key]) -> Batch:
        epoch = keys[0][0] if isinstance(keys[0], tuple) else 0
        indices = torch.tensor([key[1] if isinstance(key, tuple) else key for key in keys])
        images = self._source.images[indices]
        if self._source.size is not None:
            images = _resize(images, self._source.size)
        if self._augment != "none":
            images = shift_and_flip(images, self._draws_of(epoch)[indices], flip=self._augment == "crop_flip")
        return normalize(images, self._normalization), self._source.labels[indices]

    def _draws_of(self, epoch: int) -> Tensor:
        """Give three uniform numbers for every image of the set, drawn once for an epoch."""
        if self._draws is None or self._draws[0] != epoch:
            # The last word keeps this stream apart from that of the order.
            generator = generator_for(self._seed, epoch, 1)
            self._draws = (epoch, torch.rand(len(self), 3, generator=generator))
        return self._draws[1]


def shift_and_flip(images: Tensor, draws: Tensor, *, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its size and mirror some, all at once.

    Args:
        images: ``[b, channels, height, width]``.
        draws: Uniform numbers in [0, 1), ``[b, 3]``: shift down, shift right, mirror (below one half).
        flip: Whether to mirror at all.

    Returns:
        New images of the same shape; what comes in from outside is 0.
    """
    height, width = images.shape[-2:]
    pad_y, pad_x = max(height // 8, 1), max(width // 8, 1)
    padded = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    top = (draws[:, 0] * (2 * pad_y + 1)).long()
    left = (draws[:, 1] * (2 * pad_x + 1)).long()
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if flip:
        columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    flat = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).flatten(1)
    taken = padded.flatten(2).gather(2, flat[:, None].expand(-1, images.shape[1], -1))
    return taken.view_as(images)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    resized: Tensor = functional.resize(images, list(size), antialias=True)
    return resized
