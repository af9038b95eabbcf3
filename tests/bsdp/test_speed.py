"""Networks side by side; no test looks at how long anything takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.speed import Speed, SpeedComparison

IMAGE = torch.zeros(1, 3, 8, 8)


class Watcher(nn.Module):
    """Notes the batches that it gets and the layout of its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, images: Tensor) -> Tensor:
        last = torch.channels_last
        layout = self.conv.weight.is_contiguous(memory_format=last), images.is_contiguous(memory_format=last)
        LOG.append((self.conv.out_channels, len(images), *layout, self.training, torch.get_num_threads()))
        return self.conv(images)


LOG: list[tuple[Any, ...]] = []


def test_networks_are_compared_like_with_like() -> None:
    original, pruned = Watcher(8), Watcher(4)
    threads = torch.get_num_threads()
    LOG.clear()
    image = torch.randn(1, 3, 8, 8)
    comparison = bsdp.compare_speed(original, pruned, image, batch_sizes=[1, 2], threads=1, repeats=2, warmup=1)

    passes = [entry for entry in LOG if entry[5] == 1][-24:]
    per_round = [(8, False, False), (4, False, False), (8, True, True), (4, True, True)]
    assert [(e[0], e[2], e[3]) for e in passes] == per_round * 6
    assert [e[1] for e in passes] == [1] * 12 + [2] * 12 and not any(e[4] for e in passes)
    assert [(s.batch_size, s.layout, s.repeats) for s in comparison.speeds] == [
        (1, "contiguous", 2), (1, "channels_last", 2), (2, "contiguous", 2), (2, "channels_last", 2),
    ]  # fmt: skip
    assert (comparison.threads, comparison.device, comparison.mac_reduction) == (1, "cpu", 2.0)
    assert torch.get_num_threads() == threads and original.training
    assert original.conv.weight.is_contiguous()


def test_the_better_layouts_are_compared() -> None:
    rows = (
        Speed(1, "contiguous", 8.0, 4.0, 30),
        Speed(1, "channels_last", 6.0, 5.0, 30),
        Speed(32, "contiguous", 100.0, 50.0, 30),
    )
    comparison = SpeedComparison(rows, macs_original=300, macs_pruned=100, threads=2, device="cpu")
    assert comparison.speed_up(1) == 1.5 and comparison.speed_up(32) == 2.0
    text = str(comparison)
    assert "cpu, 2 thread(s)" in text and "MACs: 300 -> 100 (3.00x fewer)" in text
    assert "batch 1: 1.50x as fast, each in its better layout (original channels_last, pruned contiguous)" in text
    assert "speed-up / MAC reduction: 0.50" in text and "batch 32: 2.00x" in text
    assert "640/s" in text and "20.00" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizes": []}, "`batch_sizes` is empty"),
        ({"batch_sizes": [0]}, "`batch_sizes` must be at least 1"),
        ({"layouts": ["nhwc"]}, "`layouts` must be one of 'contiguous', 'channels_last', got 'nhwc'"),
        ({"threads": 0}, "`threads` must be between 1 and 1024"),
        ({"threads": 10**12}, "`threads` must be between 1 and 1024"),
        ({"seconds": -1.0}, "`seconds` must be at least 0"),
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"warmup": -1}, "`warmup` must be at least 0"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=words):
        bsdp.compare_speed(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 2, 3), IMAGE, **options)
    assert torch.get_num_threads() == threads
