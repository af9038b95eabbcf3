import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bsdp.datamodules import FashionMNISTDataModule, MNISTDataModule
from tests.datamodules.sets import pixels, write_idx

MODULES = [MNISTDataModule, FashionMNISTDataModule]


def write_set(raw: Path) -> np.ndarray:
    """Write 40 training and 10 test images; give the test images."""
    for seed, (prefix, count) in enumerate({"train": 40, "t10k": 10}.items()):
        images = pixels(count, 28, 28, seed=seed)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return images


@pytest.mark.parametrize("module", MODULES)
def test_reads_idx_files(module: type[MNISTDataModule], tmp_path: Path) -> None:
    test = write_set(tmp_path / module.DATASET / "raw")
    data = module(data_dir=str(tmp_path), val_fraction=0.25)
    data.prepare_data()
    data.setup()
    images, labels = next(iter(data.predict_dataloader()))
    assert images.shape == (10, 3, 28, 28)
    assert np.array_equal((images[:, 1] * 255).round().byte().numpy(), test)
    assert labels.tolist() == list(range(10))
    sizes = [sum(len(labels) for _, labels in loader) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert sizes == [30, 10]


def test_digits_are_not_mirrored_and_clothes_are() -> None:
    assert MNISTDataModule().augment == "crop"
    assert FashionMNISTDataModule().augment == "crop_flip"
    assert MNISTDataModule(augment="none").augment == "none"


def test_names_of_the_classes() -> None:
    assert MNISTDataModule().class_names == list("0123456789")
    assert FashionMNISTDataModule().num_classes == 10
    assert FashionMNISTDataModule().class_names[9] == "Ankle boot"


@pytest.mark.parametrize("module", MODULES)
def test_refuses_when_nothing_is_there(module: type[MNISTDataModule], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"Looked for '{tmp_path}/{module.DATASET}/raw'"):
        module(data_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("damage", ["missing", "short", "empty"])
def test_refuses_damaged_files(damage: str, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_set(raw)
    path = raw / "train-images-idx3-ubyte"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 300 if damage == "short" else 0])
    with pytest.raises(ValueError, match=f"MNIST in '{raw}' are incomplete or damaged.*--data.download true"):
        MNISTDataModule(data_dir=str(tmp_path)).setup("fit")


@pytest.mark.skipif("BSDP_DATA" not in os.environ, reason="needs the real images below BSDP_DATA")
@pytest.mark.parametrize(("module", "mean"), [(MNISTDataModule, 0.1325), (FashionMNISTDataModule, 0.2868)])
def test_real_images(module: type[MNISTDataModule], mean: float) -> None:
    data = module()
    data.prepare_data()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    assert len(labels) == 10000
    assert abs(float(images.mean()) - mean) < 5e-4
