import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from bsdp.datamodules import NPZDataModule
from bsdp.datamodules.npz import physical_memory
from tests.datamodules.sets import pixels, write_npz


def module_of(path: Path, **arguments: object) -> NPZDataModule:
    data = NPZDataModule(file=str(path), augment="none", drop_last=False, **arguments)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("grey", [True, False])
def test_reads_every_split(grey: bool, tmp_path: Path) -> None:
    arrays = write_npz(tmp_path / "set.npz", grey=grey)
    data = module_of(tmp_path / "set.npz")
    for name in ("val", "test"):
        images, labels = next(iter(getattr(data, f"{name}_dataloader")()))
        expected = arrays[f"{name}_images"]
        expected = np.stack([expected] * 3, axis=-1) if grey else expected
        read = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        found = sorted(zip((image.tobytes() for image in read), labels.tolist(), strict=True))
        numbers = arrays[f"{name}_labels"].flatten().tolist()
        assert found == sorted(zip((image.tobytes() for image in expected), numbers, strict=True))
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 20


def test_cuts_a_validation_split_where_there_is_none(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", val=False)
    data = module_of(tmp_path / "set.npz", val_fraction=0.2)
    assert {split: len(source) for split, source in data._sources.items()} == {"train": 16, "val": 4, "test": 8}


def test_attributes_come_from_the_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", test_images=pixels(8, 24, 20), train_images=pixels(20, 24, 20))
    data = NPZDataModule(data_dir=str(tmp_path), file="set.npz")
    assert (data.num_classes, data.class_names) == (2, ["0", "1"])
    assert (data.image_shape, data.image_size) == ((3, 24, 20), 24)
    resized = NPZDataModule(data_dir=str(tmp_path), file="set.npz", image_size=16, class_names=["no", "yes"])
    assert (resized.image_shape, resized.class_names) == ((3, 16, 16), ["no", "yes"])


def test_image_of_any_shape_is_resized_to_a_square(tmp_path: Path) -> None:
    write_npz(
        tmp_path / "set.npz", **{f"{s}_images": pixels(n, 24, 20) for s, n in (("train", 20), ("test", 8))}, val=False
    )
    images, _ = next(iter(module_of(tmp_path / "set.npz", image_size=16).test_dataloader()))
    assert images.shape == (8, 3, 16, 16)


def test_a_relative_file_is_one_here_or_below_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "x.npz")
    monkeypatch.chdir(tmp_path)
    for data_dir in ("/nowhere", str(tmp_path)):
        assert NPZDataModule(file="x.npz", data_dir=data_dir).num_classes > 1


def test_refuses_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"Looked for '{tmp_path}/set.npz'")):
        _ = NPZDataModule(data_dir=str(tmp_path), file="set.npz").num_classes


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 no archive"])
def test_refuses_a_file_that_is_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"set.npz' cannot be read as an .npz file"):
        module_of(tmp_path / "set.npz")


def test_refuses_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", pixels(3, 28, 28))
    with pytest.raises(ValueError, match=r"set.npy' cannot be read as an .npz file .*single array"):
        module_of(tmp_path / "set.npy")


def test_refuses_a_damaged_archive(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz")
    content = bytearray((tmp_path / "set.npz").read_bytes())
    content[600:9000] = bytes(8400)
    (tmp_path / "set.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"set.npz' cannot be read as an .npz file"):
        module_of(tmp_path / "set.npz")


def test_never_unpickles(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 20, dtype=object)
    write_npz(tmp_path / "set.npz", train_images=objects)
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file .*allow_pickle=False"):
        module_of(tmp_path / "set.npz")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_an_archive_runs(tmp_path: Path) -> None:
    objects = np.empty(20, dtype=object)
    objects[:] = [Payload(tmp_path / "marker")] * 20
    write_npz(tmp_path / "set.npz", train_labels=objects)
    for path, content in ((tmp_path / "set.npz", None), (tmp_path / "raw.npz", pickle.dumps(objects))):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
            module_of(path)
    assert not (tmp_path / "marker").exists()


def test_an_array_that_unpacks_to_more_than_the_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = write_npz(tmp_path / "set.npz")
    monkeypatch.setattr("bsdp.datamodules.npz.physical_memory", lambda: arrays["train_images"].nbytes)
    with pytest.raises(ValueError, match=r"`train_images` of .*set\.npz' unpacks to 0\.0 GiB, more than the"):
        module_of(tmp_path / "set.npz")
    monkeypatch.setattr("bsdp.datamodules.npz.physical_memory", lambda: None)
    module_of(tmp_path / "set.npz")


def test_the_memory_of_this_machine_is_known_on_linux() -> None:
    memory = physical_memory()
    assert memory is None or memory > 2**28


@pytest.mark.parametrize("shape", ["(99999999999999,)", "(-5, 28, 28)", "(20, 28", "()"])
def test_headers_of_arrays_that_lie_are_refused(shape: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", train_images=None)
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00\x76\x00" + header + b"\0" * 20 * 28 * 28)
    with pytest.raises(ValueError, match=r"set\.npz' cannot be read as|`train_images` of .* must be uint8 of shape"):
        module_of(tmp_path / "set.npz")


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", train_images=None)
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr("train_images", b"hello")
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file .*`train_images` is no array"):
        module_of(tmp_path / "set.npz")


@pytest.mark.parametrize("key", ["train_images", "train_labels", "test_images", "test_labels", "val_labels"])
def test_refuses_a_missing_array(key: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", **{key: None})
    with pytest.raises(ValueError, match=f"has no array `{key}`, it has .*Needed are train_images"):
        module_of(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((20, 28, 28), np.float32)}, "`train_images` of .* must be uint8 .* got float32"),
        (
            {"train_images": pixels(20, 28, 28, 28)},
            r"or \[n, height, width, 3\], got uint8 of shape \[20, 28, 28, 28\]",
        ),
        ({"test_images": pixels(7, 28, 28)}, "has 7 test_images, but 8 test_labels"),
        ({"train_labels": np.zeros((20, 1), np.uint8)}, r"at least 2 classes, .* got the labels \[0\]"),
        ({"train_labels": np.arange(20) % 2 * 2}, r"without gaps, got the labels \[0, 2\]"),
        ({"train_labels": np.arange(20) % 2 + 1}, r"without gaps, got the labels \[1, 2\]"),
        ({"test_labels": np.arange(8)}, "`test_labels` of .* must lie in 0 to 1 .* got 0 to 7"),
        ({"test_labels": np.arange(8) - 1}, "got -1 to 6"),
        ({"train_labels": np.zeros((20, 3), np.uint8)}, "Sets with several labels for an image are not supported"),
        ({"train_labels": np.arange(20) / 2}, "one whole number for each image, got float64"),
        ({"train_labels": np.zeros(0, np.uint8)}, "one whole number for each image"),
    ],
)
def test_refuses_unfit_arrays(changed: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", **changed)
    with pytest.raises(ValueError, match=message):
        module_of(tmp_path / "set.npz")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_is_checked_before_any_work(split: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz", **{f"{split}_images": pixels(3, 28, 28)})
    with pytest.raises(ValueError, match=f"has 3 {split}_images"):
        NPZDataModule(file=str(tmp_path / "set.npz")).prepare_data()


def test_refuses_the_wrong_number_of_names(tmp_path: Path) -> None:
    write_npz(tmp_path / "set.npz")
    with pytest.raises(ValueError, match=r"`class_names` must name the 2 classes of .*, got 3 names"):
        module_of(tmp_path / "set.npz", class_names=["a", "b", "c"])


@pytest.mark.skipif("BSDP_DATA" not in os.environ, reason="needs the real images below BSDP_DATA")
def test_real_images() -> None:
    data = NPZDataModule(file="pneumoniamnist_balanced/pneumoniamnist.npz")
    data.prepare_data()
    data.setup()
    assert data.image_shape == (3, 28, 28)
    assert {split: len(source) for split, source in data._sources.items()} == {"train": 2428, "val": 270, "test": 468}
    assert torch.cat([labels for _, labels in data.test_dataloader()]).bincount().tolist() == [234, 234]
