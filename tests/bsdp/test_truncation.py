"""Truncation in the order of calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bsdp
from bsdp.truncation import truncate_sequentially
from tests.helpers.compare import decomposed, half_ranks, relative_error
from tests.helpers.nets import NETS, make_input, make_net


def test_later_layers_that_see_the_shortened_ones_lose_less() -> None:
    # Two layers without anything between them, where it can be proven: what the first one lost is uncorrelated with
    # what the second one still sees, so that the errors add, and bases for what it sees have the least error there.
    net = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 9, 1), nn.Flatten(), nn.Linear(9 * 16, 3)).double()
    images = torch.randn(64, 6, 1, 1, dtype=torch.float64) + 0.5 * torch.randn(64, 6, 6, 6, dtype=torch.float64) + 1
    expected = net[:2](images)
    gains = []
    for rank in range(1, 9):
        errors = []
        for passes in (2, 1):
            model = decomposed(net)
            ranks = {"0": rank, "1": rank}
            truncate_sequentially(model, ranks, [images], passes=passes, shrinkage=0.0)
            errors.append(relative_error(model[:2](images), expected))
        assert errors[0] <= errors[1] * (1 + 1e-4)
        gains.append(errors[1] / errors[0])
    assert max(gains) > 1.01


@pytest.mark.parametrize("metric", ["activation", "kfac"])
@pytest.mark.parametrize("name", list(NETS))
def test_ranks_are_those_asked_for_and_full_ranks_change_nothing(name: str, metric: str) -> None:
    model, inputs = decomposed(make_net(name)), make_input(name, batch=16)
    expected = model(inputs)
    truncate_sequentially(model, {n: p.rank for n, p in bsdp.named_pairs(model).items()}, [inputs], metric=metric)
    assert relative_error(model(inputs), expected) < 1e-9
    ranks = half_ranks(model)
    truncate_sequentially(model, ranks, [inputs], metric=metric)
    assert {n: p.rank for n, p in bsdp.named_pairs(model).items()} == ranks
    assert model(inputs).isfinite().all()


@pytest.mark.parametrize("name", ["conv", "grouped"])
def test_the_mean_output_of_a_layer_stays(name: str) -> None:
    net, inputs = make_net(name), make_input(name, batch=16)
    key = "conv1" if name == "conv" else "grouped"
    model, means = decomposed(net), []
    for network in (net, model):
        if network is model:
            truncate_sequentially(model, {key: 2}, [inputs])
        handle = network.get_submodule(key).register_forward_hook(lambda _m, _i, o: means.append(o.mean((0, 2, 3))))
        network(inputs)
        handle.remove()
    assert relative_error(means[1], means[0]) < 1e-5


def test_what_cannot_be_truncated_is_refused() -> None:
    model, inputs = decomposed(make_net("conv")), make_input("conv")
    for ranks, message in (
        ({"conv9": 2}, "`ranks` names layer 'conv9'"),
        ({"conv1": 9}, "asks for rank 9 of layer 'conv1', which has rank 8"),
        ({"conv1": 0}, "asks for rank 0"),
    ):
        with pytest.raises(ValueError, match=message):
            truncate_sequentially(model, ranks, [inputs])
    with pytest.raises(ValueError, match="`batches` is empty"):
        truncate_sequentially(model, {"conv1": 2}, [])
    with pytest.raises(ValueError, match="`metric` must be one of 'activation', 'kfac'"):
        truncate_sequentially(model, {"conv1": 2}, [inputs], metric="euclidean")
    model.idle = bsdp.pair_from_layer(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'idle', which is never called"):
        truncate_sequentially(model, {"idle": 2}, [inputs])
