"""Array files in the form of MedMNIST."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from bsdp.datamodules._paths import first_there, not_found, places_of
from bsdp.datamodules.arrays import ArraySource, Augment
from bsdp.datamodules.base import ImageDataModule, Split


def physical_memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


class NPZDataModule(ImageDataModule):
    """One ``.npz`` file with the arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``.

    Images are uint8, ``[n, height, width]`` (grey, given as RGB) or ``[n, height, width, 3]``; labels count from 0,
    ``[n]`` or ``[n, 1]``. The arrays ``val_images`` and ``val_labels`` become the validation split if they are there.

    Args:
        file: The file: a path, or a path below `data_dir`.
        class_names: Names of the classes in the order of their labels. None calls them by their numbers.
        augment: What happens to training images: ``none``, ``crop`` (small random shifts) or ``crop_flip`` (also
            mirrored left to right, where left and right mean nothing).
    """

    def __init__(
        self,
        *,
        file: str,
        class_names: list[str] | None = None,
        augment: Augment = "crop",
        **kwargs: Any,
    ) -> None:
        super().__init__(augment=augment, **kwargs)
        self.file = file
        self._names = class_names
        self._count: int | None = None
        self._native: tuple[int, int] | None = None

    @property
    def _path(self) -> Path:
        return first_there(places_of(self.file, self._root))

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their labels; read from the file's labels if none were given."""
        if self._count is None:
            self._count = self._count_classes()
        names = self._names or [str(label) for label in range(self._count)]
        if len(names) != self._count:
            raise ValueError(
                f"`class_names` must name the {self._count} classes of '{self._path}', got {len(names)} names."
            )
        return list(names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image in a batch: channels, height, width."""
        if self._image_size is not None:
            return (3, self._image_size, self._image_size)
        if self._native is None:
            self._native = self._array("test_images").shape[1:3]
        return (3, *self._native)

    @property
    def image_size(self) -> int:
        """Height of the images in a batch."""
        return self.image_shape[1]

    def prepare_data(self) -> None:
        """Check the file: that it is there, its arrays, its classes.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it cannot be read, lacks an array, or its labels are not 0, 1, 2 and so on.
        """
        for split in get_args(Split):
            self._load(split)

    def _count_classes(self) -> int:
        found = sorted(set(self._labels("train").tolist()))
        if len(found) < 2 or found != list(range(len(found))):
            raise ValueError(
                f"`train_labels` of '{self._path}' must hold at least 2 classes, counted from 0 without gaps, "
                f"got the labels {found}."
            )
        return len(found)

    def _load(self, split: Split) -> ArraySource | None:
        with self._open() as arrays:
            if split == "val" and "val_images" not in arrays:
                return None
        images, labels = self._array(f"{split}_images"), self._labels(split)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
            raise ValueError(
                f"`{split}_images` of '{self._path}' must be uint8 of shape [n, height, width] or "
                f"[n, height, width, 3], got {images.dtype} of shape {list(images.shape)}."
            )
        if len(images) != len(labels):
            raise ValueError(f"'{self._path}' has {len(images)} {split}_images, but {len(labels)} {split}_labels.")
        if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"`{split}_labels` of '{self._path}' must lie in 0 to {self.num_classes - 1} like those for training, "
                f"got {int(labels.min())} to {int(labels.max())}."
            )
        pixels = torch.from_numpy(images)
        pixels = pixels.unsqueeze(1) if images.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return ArraySource(pixels, labels)

    def _labels(self, split: Split) -> Tensor:
        labels = self._array(f"{split}_labels")
        if labels.size == 0 or labels.size != len(labels) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"`{split}_labels` of '{self._path}' must be one whole number for each image, got {labels.dtype} of "
                f"shape {list(labels.shape)}. Sets with several labels for an image are not supported."
            )
        return torch.from_numpy(labels.reshape(-1).astype(np.int64))

    def _array(self, key: str) -> Any:
        with self._open() as arrays:
            if key not in arrays:
                raise ValueError(
                    f"'{self._path}' has no array `{key}`, it has {sorted(arrays)}. Needed are train_images, "
                    "train_labels, test_images and test_labels; val_images and val_labels may be there."
                )
            name = key if key in arrays.zip.namelist() else f"{key}.npy"
            self._refuse_too_large(arrays.zip.getinfo(name).file_size, key)
            try:
                array = arrays[key]
                if not isinstance(array, np.ndarray):
                    raise TypeError(f"`{key}` is no array")
                return array
            except Exception as error:  # a damaged archive raises one of half a dozen kinds
                raise self._unreadable(error) from error

    def _refuse_too_large(self, size: int, key: str) -> None:
        """A compressed array may be a thousand times as large in memory as in the file."""
        memory = physical_memory()
        if memory is not None and size > memory:
            raise ValueError(
                f"`{key}` of '{self._path}' unpacks to {size / 2**30:.1f} GiB, more than the {memory / 2**30:.1f} GiB "
                "of memory here. Use fewer or smaller images, or an image folder, which is read bit by bit."
            )

    @contextmanager
    def _open(self) -> Iterator[Any]:
        if not self._path.is_file():
            places = places_of(self.file, self._root)
            raise not_found(f"The file '{self.file}'", looked_for=places, data_dir=self.data_dir, download=False)
        with self._path.open("rb") as file:
            try:
                arrays = np.load(file, allow_pickle=False)
            except Exception as error:  # as above
                raise self._unreadable(error) from error
            if not hasattr(arrays, "files"):
                raise self._unreadable(TypeError("it holds a single array"))
            yield arrays

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"'{self._path}' cannot be read as an .npz file ({error}). Fetch it again.")
