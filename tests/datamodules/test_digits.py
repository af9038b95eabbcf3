import torch
from sklearn.datasets import load_digits

from bsdp.datamodules import DigitsDataModule


def loaded(**arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the test images at their own size, in their own order."""
    data = DigitsDataModule(image_size=None, **arguments)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("test")
    images, labels = zip(*data.predict_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_pixels_are_those_of_scikit_learn() -> None:
    digits = load_digits()
    known = {
        (image / 16).astype("float32").tobytes(): label
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    images, labels = loaded()
    # Steps of 1/16 come back from steps of 1/255.
    steps = (images[:, 0] * 16).round() / 16
    assert [known[image.numpy().tobytes()] for image in steps] == labels.tolist()
    assert (images[:, 0] - steps).abs().max() < 1 / 255


def test_splits_hold_every_image_once() -> None:
    data = DigitsDataModule()
    data.setup()
    assert {split: len(source) for split, source in data._sources.items()} == {"train": 1008, "val": 250, "test": 539}
    assert data.image_shape == (3, 32, 32)


def test_test_split_is_stratified_and_never_changes() -> None:
    images, labels = loaded()
    shares = labels.bincount() / torch.from_numpy(load_digits().target).bincount()
    assert (shares - 0.3).abs().max() < 0.005
    others = loaded(seed=4, split_seed=4, val_fraction=0.5, samples_per_class=2)
    assert torch.equal(images, others[0])
    assert int(images[7].mul(255).round().sum()) == 18078


def test_train_and_test_images_are_different() -> None:
    data = DigitsDataModule(augment="none", drop_last=False)
    data.setup()
    parts = [
        {image.numpy().tobytes() for images, _ in loader for image in images}
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert len(parts[0] | parts[1] | parts[2]) == sum(len(part) for part in parts) == 1797


def test_digits_are_not_mirrored() -> None:
    assert DigitsDataModule().augment == "crop"
