"""`ConditionalSourceDataModule`: a target, and the source images that are most useful for it."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bsdp.datamodules.arrays import Normalization
from bsdp.datamodules.base import ImageDataModule
from bsdp.datamodules.sampling import Batch, TrainingLoader
from bsdp.datamodules.source_selection import (
    Distance,
    classifier_scores,
    cluster_scores,
    highest,
    low_resolution_features,
    random_scores,
)

Method = Literal["clustering", "classifier", "random"]


class ConditionalSourceDataModule(LightningDataModule):
    """A target to transfer to, and the images of a source that are worth a pretraining for it.

    Training, validation and test images are the target's. The picked source images, with the source's own labels,
    come from `source_train_dataloader`; `bsdp.callbacks.SourcePretraining` trains on them before the fit. Both sides
    are chosen from training splits alone: validation and test images have no part in it. What is published of the
    method and what is our reconstruction stands in `bsdp.datamodules.source_selection`.

    The source may have another, lower resolution than the target, by its own `image_size`. It is read only when its
    images are asked for, so a resumed run and a test do without it.

    Args:
        source: Data module of the source. Its training images are filtered, its batch size, augmentation and seed hold
            for the pretraining. Its normalization is that of the target, whatever was given.
        target: Data module of the target.
        budget: Source images to pick, at most as many as the source has for training.
        method: How: ``clustering`` (close to the target's k-means centres), ``classifier`` (taken for target images by
            a classifier that tells the two apart) or ``random`` (the control).
        feature_size: Height and width to which the pixels are averaged that are compared. Not used with `features`.
        features: A network whose outputs are compared instead of pixels. It gets the normalised images of both sides,
            each at its own size. Default: none.
        clusters: Centres of the k-means for ``clustering``, at most the number of distinct target images.
        distance: For ``clustering``: ``nearest`` counts the distance to the nearest centre, ``mean`` that to all.
        selection_seed: Seed of the choice.
    """

    def __init__(
        self,
        *,
        source: ImageDataModule,
        target: ImageDataModule,
        budget: int,
        method: Method = "clustering",
        feature_size: int = 8,
        features: nn.Module | None = None,
        clusters: int = 20,
        distance: Distance = "nearest",
        selection_seed: int = 0,
    ) -> None:
        super().__init__()
        if source is target:
            raise ValueError("`source` and `target` are the same data module: give each one of its own.")
        for name, choice, allowed in (("method", method, get_args(Method)), ("distance", distance, get_args(Distance))):
            if choice not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {choice!r}.")
        least = {"budget": (budget, 1), "feature_size": (feature_size, 1), "clusters": (clusters, 1)}
        for name, (value, minimum) in (least | {"selection_seed": (selection_seed, 0)}).items():
            if value is None or value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        self.source = source
        self.target = target
        self.budget = budget
        self.method: Method = method
        self.feature_size = feature_size
        self.features = features
        self.clusters = clusters
        self.distance: Distance = distance
        self.selection_seed = selection_seed
        self.picked: Tensor | None = None
        """Places of the picked images among the source's training images, ascending; None before they are picked."""

    # --- the target -----------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the target's classes."""
        return self.target.class_names

    @property
    def num_classes(self) -> int:
        """Number of the target's classes."""
        return self.target.num_classes

    @property
    def image_size(self) -> int:
        """Height and width of the target's images."""
        return self.target.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one target image: channels, height, width."""
        return self.target.image_shape

    @property
    def normalization(self) -> Normalization | None:
        """Mean and std that the batches of both sides are normalised with."""
        return self.target.normalization

    @normalization.setter
    def normalization(self, value: Normalization | None) -> None:
        self.target.normalization = value

    def prepare_data(self) -> None:
        """Check that the data of both sides are there, or download them."""
        self.source.prepare_data()
        self.target.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read the target's data that a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``; None for everything.

        Raises:
            ValueError: If source and target have images of another number of channels.
        """
        channels = self.source.image_shape[0], self.target.image_shape[0]
        if channels[0] != channels[1]:
            raise ValueError(
                f"`source` has images of {channels[0]} channels, `target` of {channels[1]}: one network cannot take "
                "both. Give a source with as many channels as the target."
            )
        self.target.setup(stage)

    def train_dataloader(self) -> TrainingLoader:
        """Give the target's training images."""
        self.target.trainer = self.trainer
        return self.target.train_dataloader()

    def val_dataloader(self) -> DataLoader[Batch]:
        """Give the target's validation images."""
        return self.target.val_dataloader()

    def test_dataloader(self) -> DataLoader[Batch]:
        """Give the target's test images."""
        return self.target.test_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Give the target's test images, for predictions."""
        return self.target.predict_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Give the state of the target's training loader."""
        return self.target.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the target's next training loader."""
        self.target.load_state_dict(state_dict)

    # --- the source -----------------------------------------------------------------------------------------------

    @property
    def source_num_classes(self) -> int:
        """Number of the source's classes, all of them, whatever was picked."""
        return self.source.num_classes

    def source_train_dataloader(self) -> TrainingLoader:
        """Give the picked source images, augmented, in an order that depends on (seed, epoch); pick them if need be.

        Call ``setup("fit")`` first.

        Raises:
            ValueError: If the source has fewer images than `budget`, or the two sides cannot be compared.
        """
        if self.picked is None:
            self.source.normalization = self.target.normalization
            self.source.setup("fit")
            self.picked = highest(self._scores(), count=self.budget)
            self.source.keep_train_images(self.picked)
        return self.source.train_dataloader()

    def _scores(self) -> Tensor:
        count = self.source.num_train_images
        if self.budget > count:
            raise ValueError(
                f"`budget` must be at most {count}, the training images of the source (after its validation cut and "
                f"`samples_per_class`), got {self.budget}. Lower it, or give a larger source."
            )
        if self.method == "random":
            return random_scores(count, seed=self.selection_seed)
        source, target = self._describe(self.source), self._describe(self.target)
        if self.method == "classifier":
            return classifier_scores(source, target, seed=self.selection_seed)
        return cluster_scores(source, target, clusters=self.clusters, distance=self.distance, seed=self.selection_seed)

    @torch.no_grad()
    def _describe(self, data: ImageDataModule) -> Tensor:
        """Compute the features of all training images of one side, ``[n, d]``."""
        batches = (images for images, _ in data.plain_train_dataloader())
        if self.features is not None:
            modes = {module: module.training for module in self.features.modules()}
            self.features.eval()
            outputs = torch.cat([self.features(images).flatten(1).float() for images in batches])
            for module, mode in modes.items():
                module.training = mode
            return outputs
        if self.feature_size > min(data.image_shape[1:]):
            side = "source" if data is self.source else "target"
            raise ValueError(
                f"`feature_size` must be at most the height and width of the images, got {self.feature_size} for "
                f"images of {data.image_shape[1]}x{data.image_shape[2]} in the {side}. Lower it."
            )
        return torch.cat([low_resolution_features(images, size=self.feature_size) for images in batches])
