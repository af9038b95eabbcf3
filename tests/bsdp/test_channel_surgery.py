"""Removing channels from the real model: optimizers, frozen parameters, pairs and their bases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models import mobilenet_v2

import bsdp
from bsdp.calibration import collect_output_moments
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_surgery import remove_channels
from bsdp.factorize import to_float64
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import to_matrix
from tests.helpers.channel_removal import cut, halved, ignoring, random_units, traceable_batch, traceable_net
from tests.helpers.compare import (
    assert_same_state,
    decomposed,
    half_ranks,
    is_channels_last,
    keep_ranks,
    randomize_scales,
    snapshot,
)
from tests.helpers.nets import ConvNet

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
}


def train(net: nn.Module, optimizer: Optimizer, batch: Tensor, *, steps: int = 2) -> float:
    loss = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(net(batch), torch.arange(len(batch)) % 3)
        value.backward()
        optimizer.step()
        loss = value.item()
    return loss


@pytest.mark.parametrize("pairs", [False, True])
def test_the_memory_format_stays(pairs: bool) -> None:
    net, batch = ConvNet().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if pairs:
        bsdp.decompose(net)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    train(net, optimizer, batch)
    cut(net, batch[:1], random_units(channel_groups(net, batch[:1])), optimizers=[optimizer])
    for layer in (net.conv1, net.conv2):
        weight = layer.basis.weight if pairs else layer.weight
        assert is_channels_last(weight)
        assert pairs or is_channels_last(optimizer.state[weight]["momentum_buffer"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_holds_for_the_remaining_elements_stays_bit_for_bit(name: str) -> None:
    net, batch = traceable_net("concat"), traceable_batch("concat")
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, batch)
    identities = [id(p) for p in net.parameters()]
    # A twin whose weights are the positions says which elements stay.
    numbered = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape))
    values, state = snapshot(net), copy.deepcopy(optimizer.state_dict()["state"])
    remove = random_units(channel_groups(net, batch[:1]))
    cut(numbered, batch[:1], remove)
    cut(net, batch[:1], remove, optimizers=[optimizer])
    assert [id(p) for p in net.parameters()] == identities
    kept = {n: p.detach().long() for n, p in numbered.named_parameters()}
    assert any(kept[n].numel() < values[n].numel() for n in kept)
    now = optimizer.state_dict()["state"]
    for i, (key, parameter) in enumerate(net.named_parameters()):
        assert torch.equal(parameter.detach(), values[key].flatten()[kept[key]])
        for entry, old in state[i].items():
            new = now[i][entry]
            expected = old.flatten()[kept[key]] if isinstance(old, Tensor) and old.dim() else old
            assert torch.equal(torch.as_tensor(new), torch.as_tensor(expected)), (key, entry)
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    assert train(net, optimizer, batch) > train(net, optimizer, batch, steps=20)


def test_training_goes_on_as_if_the_channels_had_never_been() -> None:
    """A step after the cut is that of a small model whose optimizer had this momentum all along."""
    net, batch = traceable_net("flatten"), traceable_batch("flatten")
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    train(net, optimizer, batch)
    cut(net, batch[:1], random_units(channel_groups(net, batch[:1])), optimizers=[optimizer])
    twin = copy.deepcopy(net)
    other = OPTIMIZERS["sgd"](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, batch)
    train(twin, other, batch)
    for one, two in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_an_optimizer_that_never_stepped_or_does_not_know_the_layer_is_left_alone() -> None:
    net, batch = traceable_net("flatten"), traceable_batch("flatten")
    fresh = OPTIMIZERS["adam"](net.parameters())
    foreign = OPTIMIZERS["adam"](nn.Linear(2, 2).parameters())
    cut(net, batch[:1], random_units(channel_groups(net, batch[:1])), optimizers=[fresh, foreign])
    assert not fresh.state
    train(net, fresh, batch)


def test_frozen_stays_frozen_and_modes_stay() -> None:
    net, batch = traceable_net("concat"), traceable_batch("concat")
    net.stem.requires_grad_(False)
    net.norm1.train()
    wants = {name: p.requires_grad for name, p in net.named_parameters()}
    halved(net, batch[:1])
    assert {name: p.requires_grad for name, p in net.named_parameters()} == wants
    assert (net.training, net.norm1.training) == (False, True)
    assert not any(p.grad_fn for p in net.parameters())


def test_sizes_that_modules_tell_follow() -> None:
    net, batch = traceable_net("grouped"), traceable_batch("grouped")
    halved(net, batch[:1])
    assert (net.stem.out_channels, net.grouped.in_channels, net.grouped.out_channels) == (4, 4, 6)
    assert (net.depthwise.in_channels, net.depthwise.groups, net.head.in_features) == (6, 6, 6)
    assert net.grouped.groups == 2


# --- pairs


def orthonormality_error(pair: BasisPair) -> float:
    basis = to_float64(to_matrix(pair.basis.weight.detach(), pair.groups, transposed=pair.transposed))
    return float((basis @ basis.mT - torch.eye(pair.rank, dtype=torch.float64)).abs().max())


# Oracle 9
@pytest.mark.parametrize("name", ["flatten", "grouped", "upwards", "concat"])
def test_decomposing_again_restores_orthonormal_bases(name: str) -> None:
    net, batch = decomposed(traceable_net(name)), traceable_batch(name)
    keep_ranks(net, half_ranks(net))
    groups = channel_groups(net, batch[:1])
    remove = random_units(groups)
    cut_by_hand = []
    for group, units in remove.items():
        for member in groups[group].sides("in"):
            pair = net.get_submodule(member.layer)
            if isinstance(pair, BasisPair) and pair.groups == 1 and not pair.transposed:
                keep = torch.ones(pair.basis.weight.shape[1], dtype=torch.bool)
                keep[member.index[units].flatten()] = False
                rows = pair.basis.weight.detach()[:, keep].flatten(1)
                cut_by_hand.append(float((rows @ rows.T - torch.eye(pair.rank)).abs().max()))
    if name != "upwards":
        assert not cut_by_hand or max(cut_by_hand) > 0.05  # without a new SVD they are not orthonormal
    expected = ignoring(net, groups, remove)(batch)
    cut(net, batch[:1], remove)
    assert max(orthonormality_error(pair) for pair in named_pairs(net).values()) < 1e-12
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)


def test_scales_are_multiplied_in_and_start_anew() -> None:
    net, batch = decomposed(traceable_net("residual")), traceable_batch("residual")
    randomize_scales(net)
    optimizer = OPTIMIZERS["sgd"]([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, batch)
    groups = channel_groups(net, batch[:1])
    cut(net, batch[:1], random_units(groups), optimizers=[optimizer])
    touched = {m.layer for group in groups.values() for m in group.members}
    for name, pair in named_pairs(net).items():
        assert name in touched
        assert not pair.scaling.delta.any()
        assert pair.scaling.delta.requires_grad
        assert not pair.basis.weight.requires_grad
        assert "momentum_buffer" not in optimizer.state.get(pair.scaling.delta, {})
        assert (pair.scaling.sigma.diff(dim=-1) <= 1e-12).all()
    train(net, optimizer, batch)


def test_a_layer_that_nothing_touches_keeps_scales_and_momentum() -> None:
    net, batch = decomposed(ConvNet()).double().eval(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    randomize_scales(net)
    optimizer = OPTIMIZERS["sgd"]([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, batch)
    before = snapshot(net.conv1)
    momentum = optimizer.state[net.conv1.scaling.delta]["momentum_buffer"].clone()
    groups = channel_groups(net, batch[:1], exclude=["conv1"])
    remove_channels(net, plan_removal(net, batch[:1], groups, random_units(groups)), optimizers=[optimizer])
    assert_same_state(net.conv1, before)
    assert torch.equal(optimizer.state[net.conv1.scaling.delta]["momentum_buffer"], momentum)


@pytest.mark.parametrize("name", ["flatten", "grouped"])
def test_the_activation_metric_survives(name: str) -> None:
    """Outputs are those of ignoring, and the features of a layer whose inputs stay are decorrelated again."""
    net, batch = traceable_net(name), traceable_batch(name, batch=64)
    statistics = collect_output_moments(net, [batch])
    bsdp.decompose(net, metric="activation", statistics=statistics, shrinkage=0.0)
    first = next(iter(named_pairs(net).values()))
    assert orthonormality_error(first) > 0.01
    groups = channel_groups(net, batch[:1])
    remove = random_units(groups)
    expected = ignoring(net, groups, remove)(batch)
    cut(net, batch[:1], remove)
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-9)
    power = features(first, batch).T @ features(first, batch)
    scale = power.diagonal().sqrt()
    assert (power / scale[:, None] / scale[None] - torch.eye(first.rank)).abs().max() < 1e-4  # a ridge


def features(pair: BasisPair, batch: Tensor) -> Tensor:
    return pair.basis(batch).transpose(0, 1).flatten(1).T.detach()


def test_a_pair_never_has_more_rank_than_its_new_shape_allows() -> None:
    net, batch = decomposed(traceable_net("flatten")), traceable_batch("flatten")
    groups = channel_groups(net, batch[:1])
    cut(net, batch[:1], random_units(groups, share=1.0))
    assert {name: pair.rank for name, pair in named_pairs(net).items()} == {"conv": 1, "hidden": 1}


def test_several_cuts_in_a_row() -> None:
    net, batch = decomposed(traceable_net("depthwise")), traceable_batch("depthwise")
    for seed in range(2):
        groups = channel_groups(net, batch[:1])
        remove = random_units(groups, seed=seed, share=0.3)
        expected = ignoring(net, groups, remove)(batch)
        torch.testing.assert_close(cut(net, batch[:1], remove)(batch), expected, rtol=0, atol=1e-12)


def test_sequences_that_say_sizes_of_their_own_are_left_alone() -> None:
    """torchvision's convolution, norm and activation is a sequence with `out_channels` and an activation at its end."""
    model = mobilenet_v2(num_classes=4, width_mult=0.25).eval()
    images = torch.randn(2, 3, 32, 32)
    groups = channel_groups(model, (images,))
    block = model.features[0]
    assert isinstance(block, nn.Sequential) and block.out_channels == 8
    name = next(n for n, group in groups.items() if any(m.layer == "features.0.0" for m in group.members))
    remove = {n: torch.arange(2 if n == name else 0) for n in groups}
    remove_channels(model, plan_removal(model, (images,), groups, remove))
    assert model.features[0][0].out_channels == 6
    assert model(images).shape == (2, 4)
