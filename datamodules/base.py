"""What all data modules share: arguments, splits, loaders."""

import os
from abc import abstractmethod
from functools import partial
from math import isfinite
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bsdp.datamodules._paths import data_root
from bsdp.datamodules.arrays import Augment, Normalization
from bsdp.datamodules.sampling import Batch, EpochSampler, TrainingLoader, as_is, generator_for
from bsdp.datamodules.splits import stratified_split, take_per_class

Split = Literal["train", "val", "test"]


class Source(Protocol):
    """Images and labels of one split, wherever the images are."""

    @property
    def labels(self) -> Tensor:
        """Class indices, ``[n]``."""

    def __len__(self) -> int: ...

    def select(self, indices: Tensor) -> "Source":
        """Keep some of the images."""

    def prepare(self, image_size: int | None) -> "Source":
        """Do the work that is the same in every epoch, once."""

    def dataset(self, *, augment: Augment, normalization: Normalization | None, seed: int) -> Dataset[Batch]:
        """Make the data set a loader reads."""


class ImageDataModule(LightningDataModule):
    """Labelled images, split into train, val and test, as RGB batches.

    The test images are used for testing and predicting only, all of them. Validation images come from the data set's
    own validation split where it has one, else they are cut off the training images. Both are read in a fixed order
    that mixes the classes, so that ``limit_val_batches`` and ``limit_test_batches`` give a fair sample; predictions
    come in the order of the data set. The order and the augmentation of training images depend on (seed, epoch, index)
    alone, so a resumed run sees exactly the batches that the unbroken run would have.

    Args:
        data_dir: Folder that holds the data sets. None takes the environment variable BSDP_DATA, else ``./data``.
        image_size: Height and width the images are resized to. None keeps the data set's own size.
        batch_size: Images in a batch (on each device).
        num_workers: Worker processes of each loader. 0 loads in the main process, which is best for sets in memory.
        val_fraction: Share of every class of the training images that becomes the validation split, in (0, 1). Not
            used where the data set has a validation split of its own.
        split_seed: Seed of the validation cut and of `samples_per_class`. Not changed by `seed`.
        samples_per_class: Train on so many images of each class, chosen after the validation cut. None takes all.
        augment: What happens to training images: ``none``, ``crop`` (small random shifts) or ``crop_flip`` (also
            mirrored left to right).
        normalization: Lists ``mean`` and ``std`` of three numbers, for values on a scale of 0 to 1: those the backbone
            was trained with. None leaves values in [0, 1].
        download: Download the data if they are not there and the set can be downloaded.
        drop_last: Leave out an incomplete last training batch. One that is the only batch is kept.
        seed: Seed of the order of the training images and of the augmentation. None takes the seed of the run
            (`seed_everything`), else 0.
    """

    CLASS_NAMES: ClassVar[tuple[str, ...]] = ()
    NATIVE_SIZE: ClassVar[int] = 0

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        samples_per_class: int | None = None,
        augment: Augment = "crop_flip",
        normalization: dict[str, list[float]] | None = None,
        download: bool = False,
        drop_last: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("num_workers", num_workers, 0)
        _check_at_least("split_seed", split_seed, 0)
        _check_at_least("image_size", image_size, 1, optional=True)
        _check_at_least("samples_per_class", samples_per_class, 1, optional=True)
        _check_at_least("seed", seed, 0, optional=True)
        if val_fraction is None or not 0.0 < val_fraction < 1.0:
            raise ValueError(f"`val_fraction` must be in (0, 1), got {val_fraction}.")
        if augment not in get_args(Augment):
            raise ValueError(f"`augment` must be one of {', '.join(get_args(Augment))}, got {augment!r}.")
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.samples_per_class = samples_per_class
        self.augment: Augment = augment
        self.normalization = normalization
        self.download = download
        self.drop_last = drop_last
        # Lightning keeps the seed of `seed_everything` in this variable.
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self._image_size = image_size
        self._root = data_root(data_dir)
        self._sources: dict[Split, Source] = {}
        self._train_loader: TrainingLoader | None = None
        self._saved: dict[str, Any] = {}

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        return list(self.CLASS_NAMES)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Height and width of the images in a batch."""
        return self._image_size or self.NATIVE_SIZE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image in a batch: channels, height, width."""
        return (3, self.image_size, self.image_size)

    @property
    def normalization(self) -> Normalization | None:
        """Mean and std that batches are normalised with; may be set until the loaders are made."""
        return self._normalization

    @normalization.setter
    def normalization(self, value: Normalization | None) -> None:
        _check_normalization(value)
        self._normalization = value

    @abstractmethod
    def _load(self, split: Split) -> Source | None:
        """Read a split; None where the data set has no validation split of its own."""

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data that a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for everything.
        """
        if stage in ("fit", "validate", None) and "train" not in self._sources:
            self._setup_train_and_val()
        if stage in ("test", "predict", None) and "test" not in self._sources:
            test = self._load("test")
            assert test is not None
            self._sources["test"] = test.prepare(self._image_size)

    def _setup_train_and_val(self) -> None:
        train, val = self._load("train"), self._load("val")
        assert train is not None
        if val is None:
            stay, cut = stratified_split(train.labels, fraction=self.val_fraction, seed=self.split_seed)
            if not len(cut):
                raise ValueError("No class has 2 training images or more: none can be cut off for validation.")
            train, val = train.select(stay), train.select(cut)
        if self.samples_per_class is not None:
            train = train.select(take_per_class(train.labels, count=self.samples_per_class, seed=self.split_seed))
        self._sources |= {"train": train.prepare(self._image_size), "val": val.prepare(self._image_size)}

    def train_dataloader(self) -> TrainingLoader:
        """Give augmented training images in an order that depends on (seed, epoch)."""
        dataset = self._dataset("train", augment=self.augment)
        sampler = EpochSampler(
            dataset,
            seed=self.seed,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        loader = TrainingLoader(
            dataset, sampler=sampler, drop_last=self.drop_last and len(sampler) > self.batch_size, **self._loader_args()
        )
        # The trainer of now: another one may take this data module for a test while the first is still fitting.
        loader.position = partial(_position, self.trainer)
        if self._saved:
            loader.load_state_dict(self._saved)
        self._train_loader, self._saved = loader, {}
        return loader

    @property
    def num_train_images(self) -> int:
        """Number of training images that were read; `setup` comes first."""
        return len(self._read("train"))

    def plain_train_dataloader(self) -> DataLoader[Batch]:
        """Give all training images in their own order and without augmentation, for statistics."""
        return DataLoader(self._dataset("train", augment="none"), **self._loader_args())

    def keep_train_images(self, indices: Tensor) -> None:
        """Leave out all training images but those at `indices`, from the next loader on.

        Args:
            indices: Places in the order of `plain_train_dataloader`, ``[n]``.
        """
        self._sources["train"] = self._read("train").select(indices)

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the training loader."""
        return {} if self._train_loader is None else dict(self._train_loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the next training loader.

        Lightning gives it to the loader itself, too, but not if somebody has asked for the number of steps before, as
        most schedules of the learning rate do.
        """
        self._saved = state_dict

    def val_dataloader(self) -> DataLoader[Batch]:
        """Give the validation images, in a fixed order that mixes the classes."""
        return self._mixed("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Give all test images, in a fixed order that mixes the classes."""
        return self._mixed("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Give the test images in their own order, for predictions."""
        return DataLoader(self._dataset("test", augment="none"), **self._loader_args())

    def _mixed(self, split: Split) -> DataLoader[Batch]:
        """Images are often stored class by class; where some batches are to stand for all, they must not be read so."""
        order = torch.randperm(len(self._read(split)), generator=torch.Generator().manual_seed(0)).tolist()
        return DataLoader(self._dataset(split, augment="none"), sampler=order, **self._loader_args())

    def _dataset(self, split: Split, *, augment: Augment) -> Dataset[Batch]:
        return self._read(split).dataset(augment=augment, normalization=self.normalization, seed=self.seed)

    def _read(self, split: Split) -> Source:
        if split not in self._sources:
            raise RuntimeError(f"The {split} images are not read yet: call `prepare_data()` and `setup()` first.")
        return self._sources[split]

    def _loader_args(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "collate_fn": as_is,
            # Without one of its own, a loader takes a number from the global generator whenever it starts.
            "generator": generator_for(self.seed),
        }


def _position(trainer: Trainer | None) -> tuple[int, int] | None:
    """Give the running epoch and how many of its batches are done, as the trainer counts them."""
    if trainer is None:
        return None
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


def _check_at_least(name: str, value: int | None, least: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if value is None or value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _check_normalization(value: Normalization | None) -> None:
    if value is None:
        return
    lists = list(value.values())
    if set(value) != {"mean", "std"} or any(len(numbers) != 3 or not all(map(isfinite, numbers)) for numbers in lists):
        raise ValueError(
            "`normalization` must be None or hold the lists `mean` and `std` of three numbers each (R, G, B), "
            f"got {value}."
        )
    if min(value["std"]) <= 0.0:
        raise ValueError(f"`normalization` needs a `std` above 0 in every channel, got {value['std']}.")
