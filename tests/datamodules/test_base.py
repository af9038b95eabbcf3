import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from bsdp.datamodules import ImageDataModule
from bsdp.datamodules.base import Source, Split
from tests.datamodules.sets import NORMALIZATION, ToyDataModule


def ready(**arguments: object) -> ToyDataModule:
    data = ToyDataModule(**arguments)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


def images_of(loader: torch.utils.data.DataLoader) -> list[bytes]:
    """Give every image of a loader as bytes."""
    return [image.numpy().tobytes() for images, _ in loader for image in images]


def test_attributes_before_any_file_is_read() -> None:
    data = ToyDataModule(image_size=20)
    assert (data.num_classes, data.class_names) == (2, ["even", "odd"])
    assert (data.image_size, data.image_shape) == (20, (3, 20, 20))
    assert ToyDataModule().image_shape == (3, 8, 8)


def test_batches_have_the_announced_shape_and_range() -> None:
    data = ready(image_size=12, batch_size=4)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, *data.image_shape)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert 0.0 <= float(images.min()) < 0.2
        assert 0.8 < float(images.max()) <= 1.0


def test_grey_images_have_three_equal_channels() -> None:
    images, _ = next(iter(ready().test_dataloader()))
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_normalization_reaches_every_loader() -> None:
    plain, data = ready(augment="none"), ready(augment="none")
    data.normalization = NORMALIZATION
    mean, std = (torch.tensor(NORMALIZATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    for name in ("train", "val", "test", "predict"):
        raw, normalized = (next(iter(getattr(module, f"{name}_dataloader")()))[0] for module in (plain, data))
        torch.testing.assert_close(normalized, (raw - mean) / std)


def test_splits_are_disjoint_and_their_sizes_add_up() -> None:
    data = ready(augment="none", drop_last=False, val_fraction=0.25)
    train, val, test = (
        images_of(loader) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert (len(train), len(val), len(test)) == (32, 12, 10)
    assert len({*train, *val, *test}) == 54


def test_validation_images_are_never_augmented() -> None:
    assert images_of(ready(augment="crop_flip").val_dataloader()) == images_of(ready(augment="none").val_dataloader())
    assert images_of(ready(augment="crop_flip").train_dataloader()) != images_of(
        ready(augment="none").train_dataloader()
    )


def test_split_follows_split_seed_and_not_seed() -> None:
    reference = images_of(ready().val_dataloader())
    assert images_of(ready(seed=5).val_dataloader()) == reference
    assert images_of(ready(split_seed=5).val_dataloader()) != reference
    assert images_of(ready(split_seed=5).test_dataloader()) == images_of(ready().test_dataloader())


def test_samples_per_class_cuts_training_images_only() -> None:
    whole, few = (ready(augment="none", drop_last=False, samples_per_class=count) for count in (None, 3))
    labels = torch.cat([labels for _, labels in few.train_dataloader()])
    assert labels.bincount().tolist() == [3, 3]
    assert set(images_of(few.train_dataloader())) < set(images_of(whole.train_dataloader()))
    assert images_of(few.val_dataloader()) == images_of(whole.val_dataloader())
    assert images_of(few.test_dataloader()) == images_of(whole.test_dataloader())


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [(16, True, [16, 16]), (16, False, [16, 16, 8]), (20, True, [20, 20]), (64, True, [40]), (40, True, [40])],
)
def test_incomplete_training_batch(batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    loader = ready(batch_size=batch_size, drop_last=drop_last).train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_no_test_image_is_dropped_and_predictions_keep_their_order() -> None:
    data = ready(batch_size=4)
    assert torch.cat([labels for _, labels in data.predict_dataloader()]).tolist() == [0, 1] * 5
    assert sorted(images_of(data.test_dataloader())) == sorted(images_of(data.predict_dataloader()))


class ClassByClass(ToyDataModule):
    """Stored as folders of images are: all of a class, then all of the next one."""

    def _load(self, split: Split) -> Source | None:
        source = super()._load(split)
        return None if source is None else source.select(source.labels.argsort())


@pytest.mark.parametrize("name", ["val", "test"])
def test_some_batches_stand_for_all(name: str) -> None:
    data = ClassByClass(batch_size=5, val_fraction=0.25)
    data.setup()
    loader = getattr(data, f"{name}_dataloader")
    assert set(next(iter(loader()))[1].tolist()) == {0, 1}
    assert images_of(loader()) == images_of(loader())


def test_setup_reads_only_what_the_stage_needs() -> None:
    data = ToyDataModule()
    data.setup("fit")
    data.train_dataloader(), data.val_dataloader()
    with pytest.raises(RuntimeError, match=r"test images are not read yet: call `prepare_data\(\)` and `setup\(\)`"):
        data.test_dataloader()
    data.setup("test")
    data.predict_dataloader()


@pytest.mark.parametrize(("variable", "argument", "expected"), [("7", None, 7), ("7", 2, 2), (None, None, 0)])
def test_seed_defaults_to_that_of_the_run(
    variable: str | None, argument: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    if variable is not None:
        monkeypatch.setenv("PL_GLOBAL_SEED", variable)
    assert ToyDataModule(seed=argument).seed == expected


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*is deprecated")
def test_predictions_come_for_all_test_images() -> None:
    class Labels(LightningModule):
        def predict_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return batch[1]

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert torch.cat(trainer.predict(Labels(), ToyDataModule(batch_size=4))).tolist() == [0, 1] * 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
        ({"samples_per_class": 0}, "`samples_per_class` must be at least 1, got 0"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"split_seed": -2}, "`split_seed` must be at least 0, got -2"),
        ({"val_fraction": 0.0}, r"`val_fraction` must be in \(0, 1\), got 0.0"),
        ({"val_fraction": 1.0}, r"`val_fraction` must be in \(0, 1\), got 1.0"),
        ({"augment": "flip"}, "`augment` must be one of none, crop, crop_flip, got 'flip'"),
        ({"normalization": {"mean": [0.5] * 3}}, "`normalization` must be None or hold the lists `mean` and `std`"),
        ({"normalization": {"mean": [0.5] * 3, "std": [0.5]}}, "three numbers each"),
        ({"normalization": {"mean": [0.5] * 3, "std": [0.5, 0.0, 0.5]}}, "`std` above 0 in every channel"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyDataModule(**arguments)  # type: ignore[arg-type]


def test_refuses_bad_normalization_later_too() -> None:
    data = ToyDataModule()
    with pytest.raises(ValueError, match="`normalization` must be None or hold"):
        data.normalization = {"mean": [0.5] * 3, "var": [0.5] * 3}
    assert data.normalization is None


def test_refuses_more_samples_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"`samples_per_class` must be at most 20.*got 21"):
        ToyDataModule(samples_per_class=21).setup("fit")


def test_refuses_a_set_that_leaves_no_validation_image() -> None:
    data = ToyDataModule()
    single = data._load("train")
    assert single is not None
    data._load = lambda split: None if split == "val" else single.select(torch.tensor([0, 1]))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="none can be cut off for validation"):
        data.setup("fit")


def test_arguments_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        ImageDataModule("data")  # type: ignore[misc]
