"""A source and a target in one data module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bsdp.datamodules import ConditionalSourceDataModule
from bsdp.datamodules.arrays import ArraySource
from bsdp.datamodules.base import Split
from tests.datamodules.sets import NORMALIZATION, ToyDataModule, pixels


class Domains(ToyDataModule):
    """16x16 images, dark (label 0) and bright (label 1) in turn, or only those of one kind; reads are noted."""

    NATIVE_SIZE = 16

    def __init__(self, *, only: int | None = None, count: int = 60, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.only, self.count, self.reads = only, count, set[str]()

    def _load(self, split: Split) -> ArraySource | None:
        self.reads.add(split)
        if split == "val":
            return None
        bright = torch.arange(self.count) % 2 if self.only is None else torch.full((self.count,), self.only)
        noise = torch.from_numpy(pixels(self.count, 1, 16, 16, seed=7 + len(split))) // 8
        return ArraySource(noise + 200 * bright.view(-1, 1, 1, 1).to(torch.uint8), torch.arange(self.count) % 2)


def make(*, source: Any = None, target: Any = None, **arguments: Any) -> ConditionalSourceDataModule:
    data = ConditionalSourceDataModule(
        source=source or Domains(augment="none", batch_size=4, drop_last=False),
        target=target or Domains(only=1, count=40),
        **{"budget": 20, "clusters": 3, "feature_size": 4, **arguments},
    )
    data.prepare_data()
    data.setup("fit")
    return data


def picked_images(data: ConditionalSourceDataModule) -> tuple[Tensor, Tensor]:
    batches = list(data.source_train_dataloader())
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


@pytest.mark.parametrize("method", ["clustering", "classifier"])
@pytest.mark.parametrize("kind", [0, 1])
def test_picks_the_domain_of_the_target(method: str, kind: int) -> None:
    data = make(target=Domains(only=kind, count=40), method=method)
    images, labels = picked_images(data)
    assert images.shape == (20, 3, 16, 16)
    assert (labels == kind).all()
    assert ((images.mean((1, 2, 3)) > 0.5) == bool(kind)).all()
    assert data.picked is not None
    assert data.picked.tolist() == sorted(data.picked.tolist())


def test_random_is_another_choice() -> None:
    _, labels = picked_images(make(method="random"))
    assert len(labels) == 20
    assert 0 < int(labels.sum()) < 20


def test_target_is_given_out_as_it_is() -> None:
    data, alone = make(target=Domains(only=1, count=40, batch_size=8)), Domains(only=1, count=40, batch_size=8)
    alone.setup()
    data.source_train_dataloader()
    data.setup("test")
    for name in ("train", "val", "test", "predict"):
        for (images, _), (expected, _) in zip(
            getattr(data, f"{name}_dataloader")(), getattr(alone, f"{name}_dataloader")(), strict=True
        ):
            assert torch.equal(images, expected)
    names = ("class_names", "num_classes", "image_size", "image_shape")
    assert [getattr(data, name) for name in names] == [getattr(alone, name) for name in names]
    assert data.source_num_classes == 2


def test_training_images_alone_decide_and_no_test_image_is_read() -> None:
    data = make()
    assert not data.source.reads  # type: ignore[attr-defined]  # not before somebody asks for it
    data.source_train_dataloader()
    assert data.source.reads | data.target.reads == {"train", "val"}  # type: ignore[attr-defined]
    assert data.picked is not None
    assert int(data.picked.max()) < 54  # the validation images are not among those to choose from


def test_one_normalization_for_both_sides() -> None:
    data = make(budget=54)
    data.normalization = NORMALIZATION
    images, _ = picked_images(data)
    plain, _ = picked_images(make(budget=54))
    mean, std = (torch.tensor(NORMALIZATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(images, (plain - mean) / std)
    assert data.normalization == NORMALIZATION


def test_source_has_its_own_resolution_and_the_choice_is_made_once() -> None:
    data = make(source=Domains(image_size=8, batch_size=4, drop_last=False))
    images, _ = picked_images(data)
    assert images.shape == (20, 3, 8, 8)
    assert data.image_size == 16
    data.setup("fit")
    assert len(picked_images(data)[0]) == 20


def test_features_of_a_network() -> None:
    class Corner(nn.Module):
        """Looks at one pixel and notes what it gets."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = set[tuple[int, bool]]()

        def forward(self, images: Tensor) -> Tensor:
            self.seen.add((images.shape[-1], self.training))
            return images[:, :1, 0, 0]

    network = Corner()
    source = Domains(image_size=8, batch_size=4, drop_last=False)
    data = make(source=source, features=network, feature_size=99)
    _, labels = picked_images(data)
    assert (labels == 1).all()
    assert network.seen == {(8, False), (16, False)}
    assert network.training


class Grey(Domains):
    """Announces one channel."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (1, self.image_size, self.image_size)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 55}, "`budget` must be at most 54, the training images of the source .* got 55. Lower it"),
        ({"clusters": 99}, "`clusters` must be .* at most 36, the distinct images of the target, got 99"),
        ({"feature_size": 9, "source": Domains(image_size=8)}, "`feature_size` must .* got 9 for .* 8x8 in the source"),
        ({"source": Grey()}, "`source` has images of 1 channels, `target` of 3: one network"),
        ({"budget": 0}, "`budget` must be at least 1, got 0"),
        ({"feature_size": 0}, "`feature_size` must be at least 1"),
        ({"selection_seed": -1}, "`selection_seed` must be at least 0"),
        ({"method": "best"}, "`method` must be one of clustering, classifier, random, got 'best'"),
        ({"distance": "far"}, "`distance` must be one of nearest, mean, got 'far'"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments).source_train_dataloader()


def test_the_same_data_module_twice() -> None:
    side = Domains()
    with pytest.raises(ValueError, match="`source` and `target` are the same data module"):
        make(source=side, target=side)


def test_state_is_that_of_the_target() -> None:
    data = make()
    loader = data.train_dataloader()
    assert data.state_dict() == loader.state_dict()
    again = make()
    again.load_state_dict({"batch_size": 1, "images": 2, "seed": 3})
    assert again.train_dataloader()._saved == {"batch_size": 1, "images": 2, "seed": 3}
