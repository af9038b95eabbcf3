"""Channel factors: where they stand, folding, following a cut, and their scores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_group import ChannelGroup
from bsdp.channel_scales import ScaleScores, add_scales, keep_scales, scale_layout
from bsdp.channel_surgery import remove_channels
from bsdp.importance import NoScoresError
from bsdp.scale_hooks import ChannelScales, drop_scales, fold_scales, scales_as_values, scales_of, set_scales
from tests.helpers.channel_removal import TRACEABLE, ignoring, traceable_batch, traceable_net
from tests.helpers.compare import assert_same_state, decomposed, snapshot


def scaled(name: str, *, low: float = 0.5) -> tuple[nn.Module, dict[str, ChannelGroup]]:
    net = traceable_net(name)
    groups = channel_groups(net, traceable_batch(name, batch=1))
    scales = add_scales(net, groups)
    nn.init.uniform_(scales.weight, low, 1.5)
    return net, groups


@pytest.mark.parametrize("name", TRACEABLE)
def test_factors_of_one_change_nothing_and_zero_is_ignoring(name: str) -> None:
    net, batch = traceable_net(name), traceable_batch(name)
    expected, groups = net(batch), channel_groups(net, batch[:1])
    zero = {n: torch.tensor([group.size - 1]) for n, group in groups.items()}
    without = ignoring(net, groups, zero)(batch)
    scales = add_scales(net, groups)
    assert len(scales.weight) == sum(group.size for group in groups.values())
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-15)
    ends = torch.tensor([group.size for group in groups.values()]).cumsum(0) - 1
    with torch.no_grad():
        scales.weight[ends] = 0.0
    torch.testing.assert_close(net(batch), without, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", TRACEABLE)
def test_folding_is_exact(name: str) -> None:
    net, batch = scaled(name)[0], traceable_batch(name)
    expected = net(batch)
    folded = bsdp.fold(net)
    assert scales_of(net) is not None
    assert scales_of(folded) is None
    assert not any(module._forward_pre_hooks for module in folded.modules())
    torch.testing.assert_close(folded(batch), expected, rtol=0, atol=1e-12)
    fold_scales(net)
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)
    assert "channel_scales.weight" not in net.state_dict()


def test_factors_train_and_copies_have_their_own() -> None:
    net, batch = scaled("flatten")[0], traceable_batch("flatten")
    twin = copy.deepcopy(net)
    with torch.no_grad():
        scales_of(twin).weight.zero_()
    assert net(batch).std(0).max() > 1e-3
    assert torch.equal(twin(batch), twin.head.bias.expand(4, -1))
    net(batch).sum().backward()
    assert scales_of(net).weight.grad.abs().max() > 0
    assert scales_of(twin).weight.grad is None


class ByKeyword(nn.Sequential):
    """Calls its layers by keyword."""

    def forward(self, images: Tensor) -> Tensor:
        return self[2](input=self[1](input=self[0](input=images)))


def test_readers_may_be_called_by_keyword() -> None:
    net, images = ByKeyword(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 5, 5)
    scales = ChannelScales(net, {"2": [1, 2, 3, 4]}, units=4)
    nn.init.uniform_(scales.weight, 0.5, 1.5)
    expected = net(images)
    fold_scales(net)
    torch.testing.assert_close(net(images), expected)


def test_dropping_leaves_no_trace() -> None:
    net = traceable_net("concat")
    before = snapshot(net)
    add_scales(net, channel_groups(net, traceable_batch("concat", batch=1)))
    drop_scales(net)
    assert_same_state(net, before)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_foreign_hooks_stay() -> None:
    net = scaled("flatten")[0]
    seen: list[int] = []
    net.hidden.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    drop_scales(net)
    net(traceable_batch("flatten"))
    assert seen == [1]


def test_decomposed_networks_are_refused() -> None:
    net = decomposed(traceable_net("flatten"))
    with pytest.raises(ValueError, match=r"channel scaling needs a plain network.*leave `BasisDecomposition` out"):
        add_scales(net, {})


@pytest.mark.parametrize("name", ["residual", "concat", "grouped", "flatten"])
def test_a_cut_keeps_the_right_factors_and_their_momentum(name: str) -> None:
    """The model that lost the channels with their factors is the one whose factors there are 0."""
    (net, groups), batch = scaled(name), traceable_batch(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    net(batch).square().sum().backward()
    optimizer.step()
    scales = scales_of(net)
    held = optimizer.state[scales.weight]["momentum_buffer"].clone()
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(len(scales.weight), generator=generator) < 0.6
    first = 0
    remove = {}
    for group_name, group in groups.items():
        keep[first] = True
        remove[group_name] = (~keep[first : first + group.size]).nonzero().flatten()
        first += group.size
    masked = copy.deepcopy(net)
    with torch.no_grad():
        scales_of(masked).weight[~keep] = 0.0
    expected = masked(batch)
    values, weight = scales.weight.detach().clone(), scales.weight
    remove_channels(net, plan_removal(net, batch[:1], groups, remove), optimizers=[optimizer])
    keep_scales(net, channel_groups(net, batch[:1]), keep.nonzero().flatten(), [optimizer])
    assert scales.weight is weight
    assert torch.equal(weight, values[keep])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], held[keep])
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)
    net(batch).square().sum().backward()
    optimizer.step()


def test_the_layout_names_every_reader_and_position() -> None:
    net = traceable_net("flatten")
    groups = channel_groups(net, traceable_batch("flatten", batch=1))
    readers, units = scale_layout(net, groups)
    assert units == 11
    assert readers == {
        "hidden": [1 + position // 4 for position in range(24)],
        "head": [7, 8, 9, 10, 11],
    }


# --- scores


def test_scores_are_the_size_of_the_factors() -> None:
    net, groups = scaled("flatten", low=-1.5)
    scores = ScaleScores(net, groups, taylor=False)
    assert not scores.needs_gradients
    weight = scales_of(net).weight.detach()
    assert torch.equal(torch.cat(list(scores.compute().values())), weight.abs().float())
    assert {name: len(score) for name, score in scores.compute().items()} == {"conv": 6, "hidden": 5}
    with torch.no_grad():
        scales_of(net).weight[0] = float("nan")
    with pytest.raises(NoScoresError, match="NaN or infinite"):
        scores.compute()


def test_taylor_scores_are_the_mean_over_minibatches_and_resume() -> None:
    net, groups = scaled("flatten")
    scores = ScaleScores(net, groups, taylor=True)
    with pytest.raises(NoScoresError, match="no finite gradient"):
        scores.compute()
    weight, terms = scales_of(net).weight, []
    for _ in range(3):
        net.zero_grad()
        net(traceable_batch("flatten")).square().sum().backward()
        scores.update()
        terms.append((weight.detach() * weight.grad).abs())
    weight.grad[0] = float("inf")
    scores.update()  # counts for nothing
    expected = torch.stack(terms).mean(0).float()
    torch.testing.assert_close(torch.cat(list(scores.compute().values())), expected)
    other = ScaleScores(net, groups, taylor=True)
    other.load_state_dict(copy.deepcopy(scores.state_dict()))
    assert torch.equal(torch.cat(list(other.compute().values())), torch.cat(list(scores.compute().values())))
    scores.reduce(lambda tensor: tensor * 2)
    torch.testing.assert_close(torch.cat(list(scores.compute().values())), expected)  # sums and counts alike
    with pytest.raises(ValueError, match="other widths"):
        other.load_state_dict({"sum": torch.ones(3), "steps": 1.0})
    scores.reset()
    with pytest.raises(NoScoresError):
        scores.compute()


# --- as values


def test_values_give_another_network_the_same_factors() -> None:
    net, batch = scaled("concat")[0], traceable_batch("concat")
    other = traceable_net("concat")
    values = scales_as_values(net)
    assert values[""]["units"] == 10
    set_scales(other, values)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(batch), net(batch))
    set_scales(other, {})
    assert scales_of(other) is None
    assert not any(module._forward_pre_hooks for module in other.modules())


def test_a_network_inside_of_a_model() -> None:
    model = nn.ModuleDict({"network": scaled("flatten")[0]})
    values = scales_as_values(model)
    assert list(values) == ["network"]
    fold_scales(model)
    assert scales_as_values(model) == {}


@pytest.mark.parametrize(
    "values",
    [
        [1],
        {"nothing": {"units": 1, "readers": {}}},
        {"": {"units": 0, "readers": {}}},
        {"": {"units": True, "readers": {}}},
        {"": {"units": 10**9, "readers": {}}},
        {"": {"units": 3}},
        {"": {"units": 3, "readers": {"conv": 3}}},
        {"": {"units": 3, "readers": {"norm": [1, 2, 3]}}},
        {"": {"units": 3, "readers": {"conv": [1, 2, 4]}}},
        {"": {"units": 3, "readers": {"conv": [1, 2, -1]}}},
        {"": {"units": 3, "readers": {"conv": [1, 2, 3.0]}}},
        {"": {"units": 3, "readers": {"conv": [1, 2]}}},
        {"": {"units": 3, "readers": {"conv": [1, 2, 3, 3]}}},
    ],
)
def test_values_that_do_not_fit_are_refused(values: object) -> None:
    net = scaled("flatten")[0]
    before, told = snapshot(net), scales_as_values(net)
    with pytest.raises(ValueError, match="channel scales that do not fit the model"):
        set_scales(net, values)
    assert_same_state(net, before)
    assert scales_as_values(net) == told


def test_it_shows_its_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert repr(ChannelScales(net, {"2": [1, 2, 3, 4]}, units=4)) == "ChannelScales(units=4, readers=1)"
