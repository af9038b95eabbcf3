"""Which channels go together, and what a removal does: checked by removing them."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import channel_check, channel_graph
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_group import ChannelGroup, UntraceableError
from bsdp.channel_surgery import remove_channels
from bsdp.cifar_nets import CifarResNet
from tests.helpers.channel_removal import (
    TRACEABLE,
    AttentionNet,
    CircularPadNet,
    RecurrentNet,
    cut,
    ignoring,
    random_units,
    traceable_batch,
    traceable_net,
)
from tests.helpers.compare import assert_same_state, decomposed, half_ranks, keep_ranks, randomize_scales, snapshot
from tests.helpers.nets import ConvNet, ResidualNet, SharedNet, TokenNet, make_input, make_net


def pruned_pairs(name: str) -> nn.Module:
    net = decomposed(traceable_net(name))
    randomize_scales(net)
    keep_ranks(net, half_ranks(net))
    return net


# Oracle 10
@pytest.mark.parametrize("make", [traceable_net, pruned_pairs], ids=["plain", "decomposed"])
@pytest.mark.parametrize("name", TRACEABLE)
def test_removing_channels_is_ignoring_them(name: str, make: Callable[[str], nn.Module]) -> None:
    net, batch = make(name), traceable_batch(name)
    groups = channel_groups(net, batch[:1])
    remove = random_units(groups, seed=1)
    expected = ignoring(net, groups, remove)(batch)
    assert (expected - net(batch)).abs().max() > 1e-4  # else nothing was ignored
    before = sum(p.numel() for p in net.parameters())
    cut(net, batch[:1], remove)
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in net.parameters()) < before
    left = {n: group.size for n, group in channel_groups(net, batch[:1]).items()}
    assert left == {n: group.size - len(remove[n]) for n, group in groups.items()}


def test_one_unit_may_be_left_everywhere() -> None:
    net, batch = traceable_net("residual"), traceable_batch("residual")
    groups = channel_groups(net, batch[:1])
    remove = random_units(groups, share=1.0)
    expected = ignoring(net, groups, remove)(batch)
    torch.testing.assert_close(cut(net, batch[:1], remove)(batch), expected, rtol=0, atol=1e-12)
    assert {group.size for group in channel_groups(net, batch[:1]).values()} == {1}


def test_removing_nothing_changes_nothing() -> None:
    net, batch = traceable_net("concat"), traceable_batch("concat")
    groups = channel_groups(net, batch[:1])
    assert plan_removal(net, batch[:1], groups, {name: torch.empty(0, dtype=torch.long) for name in groups}) == {}


def test_members_of_a_residual_stream() -> None:
    groups = channel_groups(ResidualNet(), torch.zeros(1, 3, 8, 8))
    assert {name: group.size for name, group in groups.items()} == {"right": 8, "left": 8}
    sides = {(m.layer, m.side) for m in groups["right"].members}
    assert sides == {("stem", "out"), ("right", "out"), ("left", "in"), ("head", "in")}
    assert groups["right"].channels == 8


def test_flattened_positions_follow_their_channel() -> None:
    groups = channel_groups(traceable_net("flatten"), traceable_batch("flatten")[:1])
    reader = next(m for m in groups["conv"].members if m.layer == "hidden")
    assert torch.equal(reader.index, torch.arange(24).view(6, 4))
    assert [m.layer for m in groups["conv"].members if m.batch_norm] == ["norm"]


def test_a_unit_of_a_grouped_convolution_is_a_channel_of_every_group() -> None:
    groups = channel_groups(traceable_net("grouped"), traceable_batch("grouped")[:1])
    assert torch.equal(groups["stem"].units, torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]))


def test_channels_of_the_output_and_of_excluded_layers_stay() -> None:
    example = torch.zeros(1, 3, 8, 8)
    assert list(channel_groups(ConvNet(), example)) == ["conv1", "conv2"]
    assert list(channel_groups(ConvNet(), example, exclude=["conv1"])) == ["conv2"]
    assert list(channel_groups(ResidualNet(), example, exclude=["right"])) == ["left"]  # one that shares the stream
    inside = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1))
    assert list(channel_groups(inside, example, exclude=["0"])) == ["1"]


@pytest.mark.parametrize(("exclude", "message"), [(["conv9"], "'conv9'"), ("conv1", "single string 'conv1'")])
def test_unknown_names_in_exclude_are_refused(exclude: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"`exclude` .*{message}"):
        channel_groups(ConvNet(), torch.zeros(1, 3, 8, 8), exclude=exclude)


# --- the model as it was found


def test_the_model_is_left_as_it_was() -> None:
    net = decomposed(traceable_net("concat"), include=["conv1"])
    net.norm1.train()
    net.stem.weight.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    calls: list[int] = []
    handle = net.register_forward_hook(lambda module, inputs, output: calls.append(1) if module is net else None)
    before, flags = snapshot(net), [(m.training, len(m._forward_hooks)) for m in net.modules()]
    wants = {name: p.requires_grad for name, p in net.named_parameters()}
    random = torch.random.get_rng_state()
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = channel_groups(net, example)
        plan_removal(net, example, groups, random_units(groups))
    handle.remove()
    assert_same_state(net, before)
    assert flags[1:] == [(m.training, len(m._forward_hooks)) for m in net.modules()][1:]
    assert wants == {name: p.requires_grad for name, p in net.named_parameters()}
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not calls
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions_and_no_gradients_outside(dtype: torch.dtype) -> None:
    net = make_net("conv", dtype=dtype)
    with torch.no_grad():
        groups = channel_groups(net, make_input("conv", batch=1, dtype=dtype))
        assert list(groups) == ["conv1", "conv2"]
        assert not torch.is_grad_enabled()


# --- models that cannot be traced


def shufflenet() -> nn.Module:
    from torchvision.models import shufflenet_v2_x0_5

    return shufflenet_v2_x0_5(weights=None)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda: CifarResNet(1, num_classes=3, shortcut="pad"), (3, 8, 8), "layers are at fault: conv1"),
        (shufflenet, (3, 32, 32), "ZeroDivisionError"),
        (CircularPadNet, (2, 10), "its dependencies go round in a circle"),
        (SharedNet, (6, 8, 8), "layers are at fault: first"),
        (TokenNet, (5, 10), "layers are at fault: down"),
        (lambda: RecurrentNet().double(), (5, 4), "list index out of range"),
        (lambda: nn.Sequential(nn.Linear(3, 2)), (3,), "no channel can be removed without changing the output"),
    ],
    ids=["pad", "shufflenet", "circle", "shared", "tokens", "lstm", "head only"],
)
def test_untraceable_models_are_refused_with_the_way_out(
    make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    net = make()
    example = torch.zeros(1, *shape, dtype=next(net.parameters()).dtype)
    with pytest.raises(UntraceableError, match=f"the channels of {type(net).__name__} cannot be pruned: .*") as error:
        channel_groups(net, example)
    assert reason in str(error.value)
    assert "Prune bases instead (`IterativeBasisPruning`), which needs no graph" in str(error.value)


@pytest.mark.parametrize(
    ("net", "shape", "exclude", "left"),
    [
        (CifarResNet(1, num_classes=3, shortcut="pad"), (3, 8, 8), ["conv1"], ["layer1.0.conv1", "layer2.0.conv1"]),
        (TokenNet(), (5, 10), ["down"], ["up"]),
        (AttentionNet(), (5, 6), ["embed", "attention", "down"], ["up"]),
        (RecurrentNet(), (5, 4), [], ["hidden"]),
    ],
    ids=["pad", "tokens", "attention", "lstm"],
)
def test_excluding_the_layers_at_fault_makes_them_work(
    net: nn.Module, shape: tuple[int, ...], exclude: list[str], left: list[str]
) -> None:
    net, batch = copy.deepcopy(net).double().eval(), torch.randn(3, *shape, dtype=torch.float64)
    if isinstance(net, RecurrentNet):  # the library reads its graph in single precision only
        net, batch = net.float(), batch.float()
    groups = channel_groups(net, batch[:1], exclude=exclude)
    assert set(left) <= groups.keys()
    remove = random_units(groups)
    expected = ignoring(net, groups, remove)(batch)
    remove_channels(net, plan_removal(net, batch[:1], groups, remove))
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-6 if batch.dtype == torch.float32 else 1e-12)


def test_channels_between_convolutions_of_other_groups_go_in_multiples_of_both() -> None:
    layers = [nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=2), nn.Conv2d(12, 12, 1, groups=3)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    groups = channel_groups(net, batch[:1])
    assert {name: tuple(group.units.shape) for name, group in groups.items()} == {"0": (6, 2), "1": (2, 6), "2": (4, 3)}
    remove = {name: torch.tensor([0]) for name in groups}
    expected = ignoring(net, groups, remove)(batch)
    remove_channels(net, plan_removal(net, batch[:1], groups, remove))
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)


class TiedNet(nn.Module):
    """Two convolutions share their weight: side by side, or one behind the other."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
        self.beside = beside

    def forward(self, images: Tensor) -> Tensor:
        first = self.stem(images).relu()
        second = self.one(first) + self.two(-first) if self.beside else self.two(self.one(first).relu())
        return self.head(self.last(second.relu()).mean((2, 3)))


def test_a_shared_weight_is_cut_once_or_refused() -> None:
    batch = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    net = TiedNet(beside=True).double()
    groups = channel_groups(net, batch[:1])
    remove = random_units(groups)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(batch).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    expected = ignoring(net, groups, remove)(batch)
    remove_channels(net, plan_removal(net, batch[:1], groups, remove), optimizers=[optimizer])
    assert net.one.weight is net.two.weight and net.one.weight.shape[0] < 8
    torch.testing.assert_close(net(batch), expected, rtol=0, atol=1e-12)
    net(batch).sum().backward()
    optimizer.step()

    chain = TiedNet(beside=False).double()
    with pytest.raises(UntraceableError, match=r"one and two share a parameter; .* at fault: stem, one, two"):
        channel_groups(chain, batch[:1])
    assert list(channel_groups(chain, batch[:1], exclude=["stem", "one", "two"])) == ["last"]


def test_the_search_for_layers_at_fault_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_check, "_BLAME_SECONDS", 0.0)
    with pytest.raises(UntraceableError, match=r"fails \(") as error:
        channel_groups(TokenNet(), torch.zeros(1, 5, 10))
    assert "at fault:" not in str(error.value)


def test_a_wrong_graph_is_noticed_by_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = channel_graph._read_groups

    def shifted(*arguments: object) -> dict[str, ChannelGroup]:
        groups = read(*arguments)  # type: ignore[arg-type]
        reader = groups["conv1"].members[-1]
        object.__setattr__(reader, "index", reader.index.roll(1, 0))
        return groups

    monkeypatch.setattr(channel_graph, "_read_groups", shifted)
    with pytest.raises(UntraceableError, match="connects the wrong channels"):
        channel_groups(make_net("conv"), make_input("conv", batch=1))
    assert channel_groups(make_net("conv"), make_input("conv", batch=1), check=False)


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return self.head(torch.relu(self.one(one) + self.two(two)))

    net, inputs = Two(), (torch.randn(1, 3), torch.randn(1, 4))
    groups = channel_groups(net, inputs)
    assert {(m.layer, m.side) for m in groups["one"].members} == {("one", "out"), ("two", "out"), ("head", "in")}


def test_without_torch_pruning_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'bsdp\[channels\]'.*Basis pruning needs it not"):
        channel_groups(ConvNet(), torch.zeros(1, 3, 8, 8))


def test_a_compiled_model_is_traced_as_the_plain_one() -> None:
    net = make_net("conv")
    net.compile(backend="eager")
    example = make_input("conv", batch=1)
    net(example)
    assert list(channel_groups(net, example)) == ["conv1", "conv2"]
    bsdp.compiling.forget_graphs()
