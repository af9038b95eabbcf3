"""MNIST and Fashion-MNIST."""

from pathlib import Path
from typing import Any

from bsdp.datamodules._torchvision import TorchvisionDataModule
from bsdp.datamodules.arrays import Augment


class MNISTDataModule(TorchvisionDataModule):
    """MNIST: 28x28 grey handwritten digits, given as RGB; idx files in ``MNIST/raw`` below `data_dir`.

    Args:
        augment: What happens to training images: ``none`` or ``crop`` (small random shifts); ``crop_flip`` would also
            mirror the digits.
    """

    CLASS_NAMES = tuple("0123456789")
    NATIVE_SIZE = 28
    DATASET = "MNIST"

    def __init__(self, *, augment: Augment = "crop", **kwargs: Any) -> None:
        super().__init__(augment=augment, **kwargs)

    @property
    def _folder(self) -> Path:
        return self._root / self.DATASET / "raw"


class FashionMNISTDataModule(TorchvisionDataModule):
    """Fashion-MNIST: 28x28 grey clothes, given as RGB; idx files in ``FashionMNIST/raw`` below `data_dir`."""

    CLASS_NAMES = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )
    NATIVE_SIZE = 28
    DATASET = "FashionMNIST"

    @property
    def _folder(self) -> Path:
        return self._root / self.DATASET / "raw"
