"""Data modules: public image sets, image folders and array files, with splits and orders that are reproducible."""

from bsdp.datamodules.base import ImageDataModule
from bsdp.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from bsdp.datamodules.conditional_source import ConditionalSourceDataModule
from bsdp.datamodules.digits import DigitsDataModule
from bsdp.datamodules.image_folder import ImageFolderDataModule
from bsdp.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from bsdp.datamodules.npz import NPZDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ConditionalSourceDataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "NPZDataModule",
]
