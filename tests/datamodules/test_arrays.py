import numpy as np
import pytest
import torch
from PIL import Image

from bsdp.datamodules import arrays
from bsdp.datamodules.arrays import ArrayDataset, ArraySource, normalize, shift_and_flip
from tests.datamodules.sets import NORMALIZATION, pixels


def source_of(count: int = 12, channels: int = 3, size: int = 16) -> ArraySource:
    images = torch.from_numpy(pixels(count, channels, size, size))
    return ArraySource(images, torch.arange(count) % 3)


def shift_and_flip_slowly(image: torch.Tensor, down: int, right: int, *, mirror: bool) -> torch.Tensor:
    """Move one image pixel by pixel."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + down, (width - 1 - x if mirror else x) + right
            if 0 <= from_y < height and 0 <= from_x < width:
                result[:, y, x] = image[:, from_y, from_x]
    return result


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_flip_equals_the_slow_version(flip: bool, channels: int) -> None:
    images = torch.from_numpy(pixels(9, channels, 16, 24))
    draws = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    draws[0], draws[1] = 0.0, 1 - 1e-7
    moved = shift_and_flip(images, draws, flip=flip)
    for image, result, (y, x, z) in zip(images, moved, draws.tolist(), strict=True):
        down, right = int(y * 5) - 2, int(x * 7) - 3
        assert torch.equal(result, shift_and_flip_slowly(image, down, right, mirror=flip and z < 0.5))


def test_shifts_reach_an_eighth_and_no_further() -> None:
    image = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    image[..., 8, 8] = 255
    draws = torch.cartesian_prod(*[torch.linspace(0, 1 - 1e-6, 50)] * 2)
    draws = torch.cat([draws, torch.ones(len(draws), 1)], dim=1)
    moved = shift_and_flip(image.expand(len(draws), -1, -1, -1), draws, flip=False)
    rows = moved.amax(3).argmax(2).flatten()
    assert sorted(set(rows.tolist())) == [6, 7, 8, 9, 10]
    counts = rows.bincount()[6:]
    assert int(counts.max()) <= 1.3 * int(counts.min())


def test_middle_draw_changes_nothing() -> None:
    images = source_of().images
    assert torch.equal(shift_and_flip(images, torch.full((len(images), 3), 0.5), flip=True), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_equals_the_slow_version(channels: int) -> None:
    images = source_of(channels=channels).images
    result = normalize(images, NORMALIZATION)
    assert result.shape == (12, 3, 16, 16)
    assert result.dtype == torch.float32
    for channel in range(3):
        grey = images[:, channel if channels == 3 else 0].double() / 255
        expected = (grey - NORMALIZATION["mean"][channel]) / NORMALIZATION["std"][channel]
        torch.testing.assert_close(result[:, channel].double(), expected, atol=1e-6, rtol=1e-6)


def test_without_normalization_values_lie_in_0_to_1() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert normalize(images, None).flatten().tolist() == [0.0, 1.0] * 3


def test_normalize_leaves_its_argument_alone() -> None:
    images = source_of().images
    before = images.clone()
    normalize(images, NORMALIZATION)
    assert torch.equal(images, before)


def test_resize_is_that_of_pil() -> None:
    source = source_of(count=4, size=28)
    resized = source.prepare(20).images
    for image, result in zip(source.images, resized, strict=True):
        expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BILINEAR)
        difference = np.abs(np.asarray(expected).astype(int) - result.permute(1, 2, 0).numpy().astype(int))
        assert difference.max() <= 1


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_resizing_batch_by_batch_gives_the_same(augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once = source_of().prepare(24)
    monkeypatch.setattr(arrays, "_RESIZE_ONCE_BYTES", 0)
    later = source_of().prepare(24)
    assert once.images.shape[-1] == 24
    assert later.images.shape[-1] == 16
    batches = [
        source.dataset(augment=augment, normalization=None, seed=1).__getitems__([(2, 5), (2, 1)])  # type: ignore[arg-type]
        for source in (once, later)
    ]
    assert torch.equal(batches[0][0], batches[1][0])


def test_native_size_is_not_resized() -> None:
    source = source_of()
    assert source.prepare(None) is source
    assert source.prepare(16) is source


def test_batch_holds_the_asked_images_in_order() -> None:
    source = source_of()
    dataset = source.dataset(augment="none", normalization=None, seed=0)
    images, labels = dataset.__getitems__([(0, 7), (0, 2), (0, 2)])
    assert torch.equal((images * 255).round().to(torch.uint8), source.images[[7, 2, 2]])
    assert labels.tolist() == [1, 2, 2]
    assert images.is_contiguous()


def test_plain_indices_are_epoch_0() -> None:
    dataset = source_of().dataset(augment="crop_flip", normalization=None, seed=0)
    assert torch.equal(dataset.__getitems__([4, 1])[0], dataset.__getitems__([(0, 4), (0, 1)])[0])


def test_single_item_is_one_of_a_batch() -> None:
    dataset = source_of().dataset(augment="crop_flip", normalization=NORMALIZATION, seed=0)
    image, label = dataset[(3, 5)]
    images, labels = dataset.__getitems__([(3, 1), (3, 5)])
    assert torch.equal(image, images[1])
    assert int(label) == int(labels[1])


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    def batch(seed: int, keys: list[tuple[int, int]]) -> torch.Tensor:
        dataset: ArrayDataset = source_of().dataset(augment="crop_flip", normalization=None, seed=seed)
        return dataset.__getitems__(list(keys))[0]

    everything = [(4, index) for index in range(12)]
    reference = batch(0, everything)
    torch.rand(3)
    assert torch.equal(batch(0, everything[::-1]).flip(0), reference)
    assert torch.equal(batch(0, everything[6:]), reference[6:])
    assert not torch.equal(batch(0, [(5, index) for index in range(12)]), reference)
    assert not torch.equal(batch(1, everything), reference)
