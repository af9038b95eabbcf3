import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bsdp.datamodules import CIFAR10DataModule, CIFAR100DataModule
from tests.datamodules.sets import pixels, write_strips

NAMES = CIFAR10DataModule.CLASS_NAMES


@pytest.fixture
def strips(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write 5 training and 2 test images of each class."""
    train = write_strips(tmp_path / "cifar10" / "train", NAMES, count=5, seed=1)
    test = write_strips(tmp_path / "cifar10" / "test", NAMES, count=2, seed=2)
    return tmp_path, train, test


def write_batches(folder: Path, *, fine: bool = False) -> np.ndarray:
    """Write torchvision's form, 4 images in each training file and 6 for testing; give the test images."""
    folder.mkdir()
    keys = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for seed, key in enumerate(keys):
        images = pixels(6 if "test" in key else 4, 3, 32, 32, seed=seed)
        entry = {"data": images.reshape(-1, 3072), "fine_labels" if fine else "labels": list(range(len(images)))}
        (folder / key).write_bytes(pickle.dumps(entry))
    names = CIFAR100DataModule.CLASS_NAMES if fine else NAMES
    meta = {"fine_label_names" if fine else "label_names": list(names)}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta))
    return images


def trust_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read files that it did not write."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())


def test_reads_strips(strips: tuple[Path, np.ndarray, np.ndarray]) -> None:
    root, train, test = strips
    data = CIFAR10DataModule(data_dir=str(root), augment="none", batch_size=3, drop_last=False, val_fraction=0.2)
    data.prepare_data()
    data.setup()
    loaded = list(data.predict_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*loaded, strict=True))
    expected = test.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    assert np.array_equal((images * 255).round().byte().numpy(), expected)
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert len(torch.cat([labels for _, labels in data.train_dataloader()])) == 40
    held = torch.cat([images for images, _ in data.val_dataloader()])
    known = {image.tobytes() for image in train.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy()}
    assert {image.tobytes() for image in (held * 255).round().byte().numpy()} < known


def test_reads_the_form_of_torchvision_first(
    strips: tuple[Path, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = strips[0]
    test = write_batches(root / "cifar-10-batches-py")
    trust_files(monkeypatch)
    data = CIFAR10DataModule(data_dir=str(root))
    data.prepare_data()
    data.setup("test")
    images, labels = next(iter(data.predict_dataloader()))
    assert np.array_equal((images * 255).round().byte().numpy(), test)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_reads_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = write_batches(tmp_path / "cifar-100-python", fine=True)
    trust_files(monkeypatch)
    data = CIFAR100DataModule(data_dir=str(tmp_path))
    data.prepare_data()
    data.setup("test")
    images, _ = next(iter(data.predict_dataloader()))
    assert np.array_equal((images * 255).round().byte().numpy(), test)


def test_names_of_the_classes() -> None:
    assert CIFAR10DataModule().class_names[::9] == ["airplane", "truck"]
    names = CIFAR100DataModule().class_names
    assert (len(set(names)), names[0], names[72], names[99]) == (100, "apple", "seal", "worm")
    assert names == sorted(names)


def test_refuses_when_neither_form_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py', '.*cifar10/train'.*--data.download true"):
        CIFAR10DataModule(data_dir=str(tmp_path)).prepare_data()


def test_downloads_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, **arguments: calls.append((root, arguments)))
    with pytest.raises(FileNotFoundError, match="CIFAR100 was not found"):
        CIFAR100DataModule(data_dir=str(tmp_path)).prepare_data()
    assert calls == []
    CIFAR100DataModule(data_dir=str(tmp_path), download=True).prepare_data()
    assert calls == [(str(tmp_path), {"download": True})]


def test_refuses_damaged_files_of_torchvision(tmp_path: Path) -> None:
    write_batches(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match=r"CIFAR10 in '.*cifar-10-batches-py' are incomplete or damaged"):
        CIFAR10DataModule(data_dir=str(tmp_path)).setup("test")


def test_refuses_a_missing_strip(strips: tuple[Path, np.ndarray, np.ndarray]) -> None:
    (strips[0] / "cifar10" / "test" / "frog.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"test/frog.png' is missing: .* one file for every class"):
        CIFAR10DataModule(data_dir=str(strips[0])).setup("test")


def test_refuses_a_damaged_strip(strips: tuple[Path, np.ndarray, np.ndarray]) -> None:
    path = strips[0] / "cifar10" / "test" / "frog.png"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"frog.png' cannot be read as an image .* Fetch this file again"):
        CIFAR10DataModule(data_dir=str(strips[0])).setup("test")


def test_refuses_a_strip_of_another_shape(strips: tuple[Path, np.ndarray, np.ndarray]) -> None:
    from PIL import Image

    Image.new("RGB", (32, 40)).save(strips[0] / "cifar10" / "test" / "frog.png")
    with pytest.raises(ValueError, match=r"frog.png' must be 32 pixels wide and a multiple of 32 high, it is 32 by 40"):
        CIFAR10DataModule(data_dir=str(strips[0])).setup("test")


@pytest.mark.skipif("BSDP_DATA" not in os.environ, reason="needs the real images below BSDP_DATA")
def test_real_images() -> None:
    data = CIFAR10DataModule()
    data.prepare_data()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    assert labels.bincount().tolist() == [1000] * 10
    # The well-known mean of CIFAR-10.
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([0.494, 0.485, 0.450]), atol=0.005, rtol=0.0)
