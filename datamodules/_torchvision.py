"""Reading of the public sets that torchvision knows."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from bsdp.datamodules._paths import not_found
from bsdp.datamodules.arrays import ArraySource
from bsdp.datamodules.base import ImageDataModule, Split


class TorchvisionDataModule(ImageDataModule):
    """A set that torchvision reads, whole, into one array; it has no validation split of its own."""

    DATASET: ClassVar[str]
    """Name of the class in ``torchvision.datasets``."""

    @property
    @abstractmethod
    def _folder(self) -> Path:
        """Where torchvision keeps the files."""

    def _places(self) -> list[Path]:
        """List the folders that would be read, in the order in which they are tried."""
        return [self._folder]

    def prepare_data(self) -> None:
        """Check that the data are there, or download them.

        Raises:
            FileNotFoundError: If they are not there and `download` is false.
        """
        if any(place.is_dir() for place in self._places()):
            return
        if not self.download:
            raise not_found(self.DATASET, looked_for=self._places(), data_dir=self.data_dir, download=True)
        self._dataset_class()(str(self._root), download=True)

    def _load(self, split: Split) -> ArraySource | None:
        if split == "val":
            return None
        try:
            data = self._dataset_class()(str(self._root), train=split == "train", download=False)
        except Exception as error:  # torchvision raises five different kinds for damaged files
            raise ValueError(
                f"The files of {self.DATASET} in '{self._folder.absolute()}' are incomplete or damaged ({error}). "
                "Remove that folder and fetch it again, or have it done with `--data.download true`."
            ) from error
        images = torch.as_tensor(data.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return ArraySource(images, torch.as_tensor(data.targets, dtype=torch.int64))

    def _dataset_class(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.DATASET)
