"""Training a network on another task, and giving a decomposed network the weights of a plain copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.pretraining import pretrain, take_over
from tests.helpers.pruning_runs import small_network


def task(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Three batches of images with one bright column of three."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(3):
        labels = torch.randint(3, (32,), generator=generator)
        images = torch.randn(32, 1, 8, 8, generator=generator)
        images[torch.arange(32), 0, :, 2 * labels] += 3.0
        yield images, labels


def train(network: nn.Module, **arguments: Any) -> Any:
    return pretrain(network, task, **{"head": "3", "num_classes": 3, "epochs": 2, "steps": 3, **arguments})


def values(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_learns_and_keeps_its_own_head() -> None:
    network = small_network()
    own, before = network[3], values(network)
    shown: list[int] = []
    done = train(network, epochs=8, on_epoch=lambda epoch, _: shown.append(epoch))
    assert done[-1].accuracy > 0.9 > done[0].accuracy
    assert done[-1].loss < done[0].loss
    assert [entry.images for entry in done] == [96] * 8
    assert shown == list(range(8))
    assert network[3] is own
    after = network.state_dict()
    assert {key for key in before if torch.equal(before[key], after[key])} == {"3.weight", "3.bias"}


def test_seed_decides_and_the_random_state_is_left_alone() -> None:
    start = small_network()
    results = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        network = copy.deepcopy(start)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        train(network, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(network[0][0].weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_biases_do_not_decay() -> None:
    network = small_network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1e-4)
        network[0][2].weight.zero_()  # no gradient reaches what comes before
        network[0][2].bias.fill_(-1.0)
    train(network, weight_decay=1.0)
    assert (network[0][0].bias == 1e-4).all()
    assert (network[0][0].weight < 1e-4).all()


@pytest.mark.parametrize("decompose", [True, False])
def test_take_over_gives_the_function_and_keeps_the_parameters(decompose: bool) -> None:
    network = small_network()
    if decompose:
        bsdp.decompose(network)
    trained, head = bsdp.fold(network), values(network[3])
    train(trained)
    plain = copy.deepcopy(trained)
    held = [id(parameter) for parameter in network.parameters()]
    assert all(not p.requires_grad for n, p in network.named_parameters() if "basis" in n)
    take_over(network, trained, head="3")
    assert [id(parameter) for parameter in network.parameters()] == held
    assert all(not p.requires_grad for n, p in network.named_parameters() if "basis" in n)
    assert bool(bsdp.named_pairs(network)) == decompose
    assert all(torch.equal(value, head[key]) for key, value in network[3].state_dict().items())
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(network[:3](images), plain[:3](images), rtol=1e-4, atol=1e-5)


def test_take_over_of_untrained_weights_changes_nothing() -> None:
    network = small_network()
    bsdp.decompose(network)
    images = torch.randn(5, 1, 8, 8)
    expected = network(images)
    take_over(network, bsdp.fold(network), head="3")
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-6)


def test_take_over_into_a_pruned_network_is_refused() -> None:
    network = small_network()
    bsdp.decompose(network)
    trained = bsdp.fold(network)
    pair = bsdp.named_pairs(network)["0.2"]
    pair.keep(torch.arange(3))
    with pytest.raises(ValueError, match=r"`network` was pruned: 1 layers \(first: '0.2'\)"):
        take_over(network, trained, head="3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "`epochs` must be at least 1"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0 and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0 and finite, got nan"),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0"),
        ({"head": "0.0"}, "`head` must be a linear layer or a 1x1 convolution, '0.0' is a Conv2d"),
        ({"num_classes": 2}, "`num_classes` is 2, but a batch has the label 2"),
        ({"learning_rate": 1e30}, "the loss is not finite any more: lower `learning_rate`"),
    ],
)
def test_refusals_leave_the_head(arguments: dict[str, Any], message: str) -> None:
    network = small_network()
    own = network[3]
    with pytest.raises(ValueError, match=message):
        train(network, **arguments)
    assert network[3] is own


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="`batches` gave no batch"):
        pretrain(small_network(), lambda epoch: [], head="3", num_classes=3, epochs=1, steps=1)
