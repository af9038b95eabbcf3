import os
from pathlib import Path

import pytest
import torch

from bsdp.datamodules import ImageFolderDataModule
from bsdp.datamodules.image_folder import read_image
from tests.datamodules.sets import NORMALIZATION, write_folder

COUNTS = {"train": {"bee": 8, "ant": 6}, "test": {"ant": 3, "bee": 2}}


def module_of(root: Path, **arguments: object) -> ImageFolderDataModule:
    settings = {"image_size": 28, "batch_size": 4, "val_fraction": 0.25, "drop_last": False} | arguments
    data = ImageFolderDataModule(data_dir=str(root), folder="insects", **settings)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "insects", COUNTS)
    return tmp_path


def whole(loader: torch.utils.data.DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_attributes_come_from_the_folders(root: Path) -> None:
    data = ImageFolderDataModule(data_dir=str(root), folder="insects")
    assert (data.num_classes, data.class_names, data.image_shape) == (2, ["ant", "bee"], (3, 224, 224))
    assert ImageFolderDataModule(data_dir=str(root / "insects")).class_names == ["ant", "bee"]
    assert ImageFolderDataModule(data_dir="/nowhere", folder=str(root / "insects")).class_names == ["ant", "bee"]


def test_a_relative_folder_is_one_here_or_below_the_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for data_dir in ("/nowhere", str(root)):
        assert ImageFolderDataModule(data_dir=data_dir, folder="insects").class_names == ["ant", "bee"]
    with pytest.raises(FileNotFoundError, match=f"'/nowhere/birds/train', '{root}/birds/train'"):
        ImageFolderDataModule(data_dir="/nowhere", folder="birds").class_names  # noqa: B018 (reading raises)


def test_predictions_know_their_files(root: Path) -> None:
    assert ImageFolderDataModule(data_dir=str(root), folder="insects").predicted_files == []
    files = module_of(root).predicted_files
    assert [Path(file).parent.name for file in files] == ["ant"] * 3 + ["bee"] * 2


def test_splits_and_shapes(root: Path) -> None:
    data = module_of(root)
    assert whole(data.predict_dataloader())[1].tolist() == [0, 0, 0, 1, 1]
    assert whole(data.val_dataloader())[1].bincount().tolist() == [2, 2]
    images, labels = whole(data.train_dataloader())
    assert labels.bincount().tolist() == [4, 6]
    assert images.shape == (10, 3, 28, 28)
    assert images.dtype == torch.float32
    assert 0.0 <= float(images.min()) < float(images.max()) <= 1.0


def test_takes_its_own_validation_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "insects", COUNTS | {"val": {"bee": 5}})
    data = module_of(tmp_path)
    assert whole(data.val_dataloader())[1].tolist() == [1] * 5
    assert len(whole(data.train_dataloader())[1]) == 14


def test_evaluation_takes_the_middle_of_the_scaled_image(root: Path) -> None:
    image = read_image(str(root / "insects" / "test" / "bee" / "1.png"), image_size=28)
    assert image.shape[1:] == (32, 44)
    images, _ = whole(module_of(root).predict_dataloader())
    assert torch.equal((images[4] * 255).round().byte(), image[:, 2:30, 8:36])


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip"])
def test_cache_and_workers_change_nothing(augment: str, root: Path) -> None:
    reference = whole(module_of(root, augment=augment).train_dataloader())
    for arguments in ({"cache": True}, {"num_workers": 2}):
        images, labels = whole(module_of(root, augment=augment, **arguments).train_dataloader())
        assert torch.equal(images, reference[0])
        assert torch.equal(labels, reference[1])


def test_cache_is_read_once(root: Path) -> None:
    data = module_of(root, cache=True)
    for file in root.rglob("*.png"):
        file.unlink()
    assert len(whole(data.train_dataloader())[1]) == 10


def test_augmentation_depends_on_seed_epoch_and_index_only(root: Path) -> None:
    def batch(seed: int, keys: list[tuple[int, int]]) -> torch.Tensor:
        return module_of(root, seed=seed)._dataset("train", augment="crop_flip").__getitems__(keys)[0]

    everything = [(1, index) for index in range(10)]
    reference = batch(0, everything)
    assert torch.equal(batch(0, everything[::-1]).flip(0), reference)
    assert not torch.equal(batch(0, [(2, index) for index in range(10)]), reference)
    assert not torch.equal(batch(1, everything), reference)


def test_augmentation_leaves_the_global_generator_alone(root: Path) -> None:
    data = module_of(root)
    before = torch.get_rng_state()
    whole(data.train_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_only_crop_flip_mirrors(root: Path) -> None:
    def rising(augment: str) -> set[bool]:
        dataset = module_of(root)._dataset("train", augment=augment)  # type: ignore[arg-type]
        images = torch.cat([dataset.__getitems__([(epoch, i) for i in range(10)])[0] for epoch in range(3)])
        return set((images[:, 0, 14, -1] > images[:, 0, 14, 0]).tolist())

    assert rising("crop") == {True}
    assert rising("crop_flip") == {True, False}


def test_min_crop_bounds_the_crops(root: Path) -> None:
    def spread(min_crop: float) -> float:
        dataset = module_of(root, min_crop=min_crop)._dataset("train", augment="crop")
        images = torch.cat([dataset.__getitems__([(epoch, i) for i in range(10)])[0] for epoch in range(3)])
        return float((images[:, 0, 14, -1] - images[:, 0, 14, 0]).min())

    # The red channel rises from 0 to 1 over the width: a small crop sees little of the rise.
    assert spread(0.05) < 0.35 < spread(0.6)


def test_single_item_and_normalization(root: Path) -> None:
    plain, data = module_of(root), module_of(root, normalization=NORMALIZATION)
    raw, normalized = (module._dataset("test", augment="none")[3] for module in (plain, data))
    mean, std = (torch.tensor(NORMALIZATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(normalized[0], (raw[0] - mean) / std)
    assert int(raw[1]) == int(normalized[1]) == 1


def test_samples_per_class(root: Path) -> None:
    labels = whole(module_of(root, samples_per_class=2).train_dataloader())[1]
    assert labels.bincount().tolist() == [2, 2]


def test_refuses_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"'insects' was not found. Looked for '{tmp_path}/insects/train'"):
        module_of(tmp_path)


def test_refuses_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "insects" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"insects/train' must hold at least 2 folders, .* got \[\]"):
        module_of(tmp_path)


def test_refuses_one_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "insects", {"train": {"ant": 2}, "test": {"ant": 2}})
    with pytest.raises(ValueError, match=r"must hold at least 2 folders, one for each class, got \['ant'\]"):
        module_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_refuses_a_class_without_images(split: str, root: Path) -> None:
    for file in (root / "insects" / split / "bee").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{split}' must hold a folder .* \(ant, bee\): .*bee"):
        module_of(root)


def test_refuses_a_missing_test_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "insects", {"train": COUNTS["train"]})
    with pytest.raises(FileNotFoundError, match="insects/test' must hold a folder with at least one image"):
        module_of(tmp_path)


def test_refuses_a_class_that_was_not_trained(tmp_path: Path) -> None:
    write_folder(tmp_path / "insects", COUNTS | {"test": {"ant": 1, "wasp": 1}})
    with pytest.raises(ValueError, match=r"insects/test' holds classes that .* does not: \['wasp'\]"):
        module_of(tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_is_checked_before_any_work(split: str, tmp_path: Path) -> None:
    write_folder(tmp_path, COUNTS | {"val": {"bee": 1}})
    for file in (tmp_path / split / "bee").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{split}' must hold a folder"):
        ImageFolderDataModule(data_dir=str(tmp_path)).prepare_data()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_refuses_a_damaged_image_and_names_it(content: bytes | None, root: Path) -> None:
    path = root / "insects" / "test" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:120] if content is None else content)
    with pytest.raises(ValueError, match=r"bee/1.png' cannot be read as an image"):
        module_of(root, cache=True)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_refuses_min_crop_outside_its_range(value: float) -> None:
    with pytest.raises(ValueError, match=rf"`min_crop` must be in \(0, 1\], got {value}"):
        ImageFolderDataModule(min_crop=value)


@pytest.mark.skipif("BSDP_DATA" not in os.environ, reason="needs the real images below BSDP_DATA")
def test_real_images() -> None:
    data = ImageFolderDataModule(folder="caltech20", image_size=64, samples_per_class=2)
    data.prepare_data()
    data.setup("fit")
    assert data.num_classes == 20
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 64, 64)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 80
