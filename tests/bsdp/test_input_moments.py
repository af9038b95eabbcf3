"""Moments of unfolded inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bsdp.input_moments import InputMoments, patches

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(3, 5, 3, padding=1, stride=2), (3, 9, 8)),
    "dilated": (nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=2), (3, 9, 8)),
    "same": (nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular"), (2, 11)),
    "valid": (nn.Conv2d(3, 5, 3, padding="valid", padding_mode="reflect"), (3, 6, 6)),
    "volume": (nn.Conv3d(2, 3, 2, padding=1, stride=2), (2, 4, 5, 4)),
    "linear": (nn.Linear(7, 3), (7,)),
    "tokens": (nn.Linear(7, 3), (4, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_patches_times_the_weight_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name]
    inputs = torch.randn(4, *shape)
    outputs = layer(inputs)
    outputs = outputs.movedim(1, -1) if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else outputs
    weight = layer.weight.flatten(1)
    found = patches(layer, inputs) @ weight.mT + layer.bias
    torch.testing.assert_close(found, outputs.reshape(-1, outputs.shape[-1]))


def test_moments_are_those_of_all_patches_whatever_the_batches() -> None:
    layer, shape = LAYERS["conv"]
    inputs = torch.randn(10, *shape)
    moments = InputMoments({"conv": layer})
    for batch in inputs.split(3):
        moments.update("conv", batch)
    rows = patches(layer, inputs).double()
    found = moments.compute()["conv"]
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.second, rows.mT @ rows / len(rows))
    torch.testing.assert_close(found.covariance, rows.mT.cov(correction=0))
    assert found.count == len(rows)
    moments.reset()
    assert moments.compute() == {}


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = LAYERS["conv"]
    inputs = torch.randn(5, *shape)
    found = []
    for size in (1 << 24, 1):
        monkeypatch.setattr("bsdp.input_moments._CHUNK", size)
        moments = InputMoments({"conv": layer})
        moments.update("conv", inputs)
        found.append(moments.compute()["conv"])
    assert found[0].count == found[1].count
    torch.testing.assert_close(found[0].second, found[1].second)


@pytest.mark.parametrize(("name", "most"), [("conv", 6), ("conv", 1), ("tokens", 2), ("volume", 5)])
def test_positions_are_limited(name: str, most: int) -> None:
    layer, shape = LAYERS[name]
    inputs = torch.randn(2, *shape)
    some, every = patches(layer, inputs, max_positions=most), patches(layer, inputs)
    assert 2 <= len(some) <= 2 * most
    assert all(bool((row == every).all(1).any()) for row in some)


def test_only_inside_the_block_and_nothing_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 3)).train()
    moments = InputMoments({"3": net[3]})
    images = torch.randn(2, 3, 8, 8)
    mean = net[1].running_mean.clone()
    with moments.collecting(net):
        net(images)
    net(images)
    assert moments.compute()["3"].count == 2 * 4 * 4
    assert net.training and net[2].training
    assert not net[3]._forward_pre_hooks
    assert not torch.equal(mean, net[1].running_mean)


def test_broken_examples_and_missing_batch_axis() -> None:
    layer = nn.Linear(3, 2)
    moments = InputMoments({"linear": layer})
    rows: Tensor = torch.randn(4, 3)
    rows[1, 2] = torch.nan
    moments.update("linear", rows)
    moments.update("linear", torch.full((3,), torch.inf))
    moments.update("linear", torch.ones(3))
    found = moments.compute()["linear"]
    assert found.count == 4
    assert bool(found.second.isfinite().all())
    torch.testing.assert_close(found.mean, (rows[[0, 2, 3]].sum(0) + 1).double() / 4)


def test_refusal() -> None:
    with pytest.raises(ValueError, match="max_positions"):
        InputMoments({}, max_positions=0)
