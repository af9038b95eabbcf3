"""Pruning networks with compensation, without a trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.channel_compensation import Compensation, collect_input_moments, norms_after, unfit_groups
from bsdp.channel_group import UntraceableError
from tests.helpers.channel_nets import channel_batch, channel_net, groups_of
from tests.helpers.nets import ConvNet


def lively(net: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def work_on(name: str, *, batch: int = 32, **options: Any) -> tuple[nn.Module, Compensation, Tensor]:
    net, images = lively(channel_net(name)), channel_batch(name, batch=batch)
    groups = groups_of(name)
    readers = {m.layer: net.get_submodule(m.layer) for group in groups.values() for m in group.sides("in")}
    fit = {n: layer for n, layer in readers.items() if getattr(layer, "groups", 1) == 1}
    return net, Compensation(net, groups, (images[:1],), collect_input_moments(net, [images], fit), **options), images


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise"])
def test_removing_and_taking_it_back_leaves_every_bit(name: str) -> None:
    net, work, images = work_on(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outputs = net(images)
    work.apply({group: found.size // 2 for group, found in work.groups.items()})
    assert not torch.equal(net(images), outputs)
    assert max(work.losses().values()) > 1e-4
    work.apply({})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(loss == 0 for loss in work.losses().values())


@pytest.mark.parametrize("name", ["concat", "flatten", "depthwise", "grouped"])
def test_removal_in_earnest_gives_what_was_simulated(name: str) -> None:
    net, images = lively(channel_net(name)), channel_batch(name, batch=32)
    simulated: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        simulated.append(model(images))
        return 1.0

    result = bsdp.compensated_prune(net, [images], images[:1], evaluate=evaluate, max_ratio=0.6)
    assert any(left < size for left, size in result.kept.values())
    assert result.evaluations == len(simulated)
    torch.testing.assert_close(net(images), simulated[-1])
    for group, (left, _) in result.kept.items():
        layer = net.get_submodule(group)
        units = groups_of(name)[group].units
        assert left * units.shape[1] == (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def test_copies_of_channels_go_without_a_trace() -> None:
    torch.manual_seed(0)
    net, images = lively(ConvNet().double().eval()), torch.randn(32, 3, 8, 8).double()
    net.bn1.running_var.fill_(1.0)
    for tensor in (net.conv1.weight, net.conv1.bias, *net.bn1.parameters(), net.bn1.running_mean):
        if tensor is not None:
            tensor.data[4:] = tensor.data[:4]
    outputs = net(images)
    result = bsdp.compensated_prune(net, [images], images[:1], target=0.5, target_kind="channels", exclude=["conv2"])
    assert result.kept == {"conv1": (4, 8)}
    torch.testing.assert_close(net(images), outputs, atol=1e-4, rtol=1e-3)


def test_compensation_beats_removal_alone() -> None:
    torch.manual_seed(0)
    net, work, images = work_on("flatten", batch=256)
    plain = copy.deepcopy(net)
    outputs = net(images)
    work.apply({"conv": 2})
    reader = plain.get_submodule("hidden")
    units = work.units("conv")
    gone = next(work.groups["conv"].sides("in")).index[units].flatten()
    reader.weight.data[:, gone] = 0.0
    assert (net(images) - outputs).square().mean() < 0.5 * (plain(images) - outputs).square().mean()


@pytest.mark.parametrize("bias", [True, False])
def test_the_mean_stays_through_bias_or_batch_norm(bias: bool) -> None:
    net, images = lively(ConvNet(bias=bias).double().eval()), torch.randn(64, 3, 8, 8).double()
    seen: list[Tensor] = []
    net.bn2.register_forward_hook(lambda _m, _i, output: seen.append(output.mean((0, 2, 3))))
    net(images)
    bsdp.compensated_prune(net, [images], images[:1], target=0.4, target_kind="channels", exclude=["conv2"])
    net(images)
    assert net.conv1.out_channels < 8
    assert (net.conv2.bias is not None) is bias
    torch.testing.assert_close(seen[-1], seen[0])


def test_a_target_needs_no_labels_and_is_met() -> None:
    net, images = lively(channel_net("depthwise")), channel_batch("depthwise", batch=16)
    before = sum(p.numel() for p in net.parameters())
    result = bsdp.compensated_prune(net, [images], images[:1], target=0.3)
    after = sum(p.numel() for p in net.parameters())
    assert 0.55 * before < after <= 0.7 * before
    assert (result.reference, result.value, result.evaluations) == (None, None, 0)
    assert max(result.losses.values()) < 1.0


def test_target_and_tolerance_together() -> None:
    net, images = lively(channel_net("concat")), channel_batch("concat", batch=16)
    before = sum(p.numel() for p in net.parameters())
    free, bound = copy.deepcopy(net), copy.deepcopy(net)
    bsdp.compensated_prune(free, [images], images[:1], evaluate=lambda _: 1.0, target=0.2)
    assert 0.5 * before < sum(p.numel() for p in free.parameters()) <= 0.8 * before  # no more than the target
    calls = iter([1.0])
    result = bsdp.compensated_prune(bound, [images], images[:1], evaluate=lambda _: next(calls, 0.0), target=0.2)
    assert all(left == size for left, size in result.kept.values())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in bound.state_dict().items())


def test_groups_that_cannot_be_compensated_stay() -> None:
    assert unfit_groups(channel_net("grouped"), groups_of("grouped")).keys() == {"stem"}
    transposed = unfit_groups(channel_net("transposed"), groups_of("transposed"))
    assert "transposed" in transposed["conv"]
    net, images = channel_net("grouped"), channel_batch("grouped", batch=16)
    result = bsdp.compensated_prune(net, [images], images[:1], target=0.2)
    assert "grouped convolution" in result.skipped["stem"]
    assert "stem" not in result.kept


def test_norms_are_found_only_behind_a_layer_that_nothing_else_reads() -> None:
    def found(name: str) -> set[str]:
        net = lively(channel_net(name))
        layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
        before = {key: value.clone() for key, value in net.state_dict().items()}
        norms = norms_after(net, (channel_batch(name, batch=1),), layers)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        return set(norms)

    assert found("depthwise") == {"expand"}
    assert found("concat") == set()  # the stem's output also goes on to the concatenation
    assert {"conv1", "layer2.0.conv2", "layer2.0.downsample.0"} <= found("residual")


def test_an_error_in_evaluate_leaves_the_network() -> None:
    net, images = channel_net("concat"), channel_batch("concat", batch=8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    calls: list[int] = []

    def evaluate(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return 1.0

    with pytest.raises(RuntimeError, match="no more"):
        bsdp.compensated_prune(net, [images], images[:1], evaluate=evaluate)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to stop at": ({}, "`evaluate`, `target` or both"),
    "target": ({"target": 0.99}, "out of reach"),
    "share": ({"target": 1.5}, "`target` is a share"),
    "tolerance": ({"evaluate": lambda _: 1.0, "tolerance": -1.0}, "`tolerance`"),
    "positions": ({"target": 0.2, "max_positions": 0}, "`max_positions`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, words = REFUSED[case]
    net, images = channel_net("concat"), channel_batch("concat")
    with pytest.raises(ValueError, match=words):
        bsdp.compensated_prune(net, [images], images[:1], **options)


def test_networks_that_do_not_go() -> None:
    with pytest.raises(UntraceableError):
        bsdp.compensated_prune(channel_net("transposed"), [], channel_batch("transposed", batch=1), target=0.3)
    net, images = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    bsdp.decompose(net)
    with pytest.raises(ValueError, match="decomposed"):
        bsdp.compensated_prune(net, [images], images[:1], target=0.3)
