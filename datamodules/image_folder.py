"""Folders of image files, one folder for each class."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from bsdp.datamodules._paths import first_there, not_found, places_of
from bsdp.datamodules.arrays import Augment, Normalization, normalize
from bsdp.datamodules.base import ImageDataModule, Split
from bsdp.datamodules.sampling import Batch, Key, seed_for


class ImageFolderDataModule(ImageDataModule):
    """Image files below ``train/<class>/`` and ``test/<class>/``, and ``val/<class>/`` if there is such a folder.

    Images are scaled so that their shorter side is an eighth longer than `image_size`; then training images are
    cropped at random, the others in the middle.

    Args:
        folder: The folder that holds ``train`` and ``test``: a path, or a path below `data_dir`. None is `data_dir`.
        image_size: Height and width of the crops.
        batch_size: Images in a batch (on each device).
        cache: Decode and scale every image once and keep it in memory, about 0.3 MB for each at 224 pixels.
        min_crop: Random crops take at least this share of the area, in (0, 1].
        augment: What happens to training images: ``none`` (the middle, as in validation), ``crop`` (a random part,
            scaled up) or ``crop_flip`` (also mirrored left to right).
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        image_size: int = 224,
        batch_size: int = 32,
        cache: bool = False,
        min_crop: float = 0.35,
        augment: Augment = "crop_flip",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, augment=augment, **kwargs)
        if min_crop is None or not 0.0 < min_crop <= 1.0:
            raise ValueError(f"`min_crop` must be in (0, 1], got {min_crop}.")
        self.folder = folder
        self.cache = cache
        self.min_crop = min_crop

    @property
    def _places(self) -> list[Path]:
        return places_of(self.folder or "", self._root)

    @property
    def _path(self) -> Path:
        return first_there(self._places)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders below ``train``, in alphabetical order.

        Raises:
            FileNotFoundError: If ``train`` is not there.
            ValueError: If there are fewer than two.
        """
        train = self._path / "train"
        if not train.is_dir():
            name = f"The image folder '{self.folder or self._path}'"
            raise not_found(
                name, looked_for=[place / "train" for place in self._places], data_dir=self.data_dir, download=False
            )
        names = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
        if len(names) < 2:
            raise ValueError(
                f"'{train}' must hold at least 2 folders, one for each class, got {names}. "
                "Each class's images belong into a folder of their own."
            )
        return names

    @property
    def predicted_files(self) -> list[str]:
        """Paths of the images that predictions are made for, in their order; empty before `setup`."""
        source = self._sources.get("test")
        return list(source.files) if isinstance(source, FileSource) else []

    def prepare_data(self) -> None:
        """Check the folders.

        Raises:
            FileNotFoundError: If ``train`` or ``test`` is not there, or a class has no image.
            ValueError: If there are fewer than two classes, or a class that was not trained.
        """
        for split in get_args(Split):
            self._load(split)

    def _load(self, split: Split) -> "FileSource | None":
        from torchvision.datasets import ImageFolder

        path, names = self._path / split, self.class_names
        if split == "val" and not path.is_dir():
            return None
        try:
            found = ImageFolder(str(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"'{path}' must hold a folder with at least one image for each class ({', '.join(names)}): {error}"
            ) from error
        if unknown := set(found.classes) - set(names):
            raise ValueError(f"'{path}' holds classes that '{self._path / 'train'}' does not: {sorted(unknown)}.")
        labels = [names.index(found.classes[label]) for label in found.targets]
        files = tuple(file for file, _ in found.samples)
        return FileSource(files, torch.tensor(labels), self.image_size, cache=self.cache, min_crop=self.min_crop)


@dataclass(frozen=True)
class FileSource:
    """Files and labels of one split.

    Attributes:
        files: Paths of the images.
        labels: ``[n]``, int64.
        image_size: Height and width of the crops.
        cache: Whether `prepare` decodes the images.
        min_crop: Smallest share of the area in a random crop.
        images: The decoded and scaled images, ``[3, height, width]`` in uint8 each, if they are cached.
    """

    files: tuple[str, ...]
    labels: Tensor
    image_size: int
    cache: bool
    min_crop: float
    images: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def select(self, indices: Tensor) -> "FileSource":
        """Keep the files at `indices`."""
        return replace(self, files=tuple(self.files[i] for i in indices.tolist()), labels=self.labels[indices])

    def prepare(self, image_size: int | None) -> "FileSource":
        """Decode everything once if it is to be kept in memory."""
        if not self.cache:
            return self
        return replace(self, images=tuple(read_image(file, image_size=self.image_size) for file in self.files))

    def read(self, index: int) -> Tensor:
        """Give one image with its shorter side scaled, ``[3, height, width]`` in uint8."""
        if self.images is not None:
            return self.images[index]
        return read_image(self.files[index], image_size=self.image_size)

    def dataset(self, *, augment: Augment, normalization: Normalization | None, seed: int) -> "FileDataset":
        """Make the data set a loader reads."""
        return FileDataset(self, augment=augment, normalization=normalization, seed=seed)


class FileDataset(Dataset[Batch]):
    """Batches of a `FileSource`; the augmentation of an image depends on (seed, epoch, index) only.

    Args:
        source: Files and labels.
        augment: ``none``, ``crop`` or ``crop_flip``.
        normalization: See `bsdp.datamodules.arrays.normalize`.
        seed: Seed of the augmentation.
    """

    def __init__(self, source: FileSource, *, augment: Augment, normalization: Normalization | None, seed: int) -> None:
        from torchvision.transforms import v2

        self._source = source
        self._normalization = normalization
        self._seed = seed
        size = source.image_size
        random_crop = v2.RandomResizedCrop(size, scale=(source.min_crop, 1.0), antialias=True)
        self._transform = {
            "none": v2.CenterCrop(size),
            "crop": random_crop,
            "crop_flip": v2.Compose([random_crop, v2.RandomHorizontalFlip()]),
        }[augment]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: Key) -> Batch:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: list[Key]) -> Batch:
        pairs = [key if isinstance(key, tuple) else (0, key) for key in keys]
        images = torch.stack([self._crop(epoch, index) for epoch, index in pairs])
        return normalize(images, self._normalization), self._source.labels[[index for _, index in pairs]]

    def _crop(self, epoch: int, index: int) -> Tensor:
        image = self._source.read(index)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(seed_for(self._seed, epoch, index, 2))
            cropped: Tensor = self._transform(image)
        return cropped


def read_image(file: str, *, image_size: int) -> Tensor:
    """Read an image as RGB and scale its shorter side to 8/7 of the size of a crop (256 for 224).

    Args:
        file: Path of the image.
        image_size: Height and width of a crop.

    Returns:
        ``[3, height, width]``, uint8.

    Raises:
        ValueError: If the file cannot be read.
    """
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2 import functional

    try:
        image = functional.pil_to_tensor(default_loader(file))
    except (OSError, SyntaxError) as error:  # PIL's kinds for damaged files
        raise ValueError(f"'{file}' cannot be read as an image ({error}). Remove it or fetch it again.") from error
    scaled: Tensor = functional.resize(image, [round(image_size * 8 / 7)], antialias=True)
    return scaled
