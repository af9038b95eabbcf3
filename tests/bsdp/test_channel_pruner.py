"""Channel pruning in rounds, without any trainer."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.channel_group import UntraceableError
from bsdp.channel_pruner import ChannelPruner
from bsdp.channel_settings import ALL_CRITERIA, ChannelPruningSettings
from bsdp.cifar_nets import CifarResNet
from bsdp.scale_hooks import scales_of
from bsdp.structure import set_shape, shape_of, structure_of
from bsdp.widths import widths_of
from tests.helpers.compare import assert_same_state, snapshot
from tests.helpers.nets import ConvNet

EXAMPLE = torch.zeros(1, 3, 8, 8)


def make(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, ChannelPruner]:
    model = ConvNet() if model is None else model
    settings = ChannelPruningSettings(**{"target": 0.4, "rounds": 2, "tolerance": None, **options})
    return model, ChannelPruner(model, settings, EXAMPLE)


def train(model: nn.Module, pruner: ChannelPruner, optimizer: torch.optim.Optimizer, *, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        with pruner.collecting():
            loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 8, 8, generator=generator)), torch.arange(8) % 3)
            loss.backward()
        pruner.update(optimizer)
        optimizer.step()


def run(model: nn.Module, pruner: ChannelPruner, values: list[float], *, lr: float = 0.01) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    epoch = 0
    for epoch, value in enumerate(values):
        if pruner.cut_due(epoch):
            pruner.cut(epoch, optimizers=[optimizer])
        pruner.start_epoch()
        train(model, pruner, optimizer)
        pruner.observe(value)
        if pruner.should_stop(epoch):
            break
    pruner.restore(optimizers=[optimizer])
    return epoch


@pytest.mark.parametrize("criterion", ALL_CRITERIA)
def test_a_plain_loop_ends_at_the_budget(criterion: str) -> None:
    options = {"theta": 0.4} if criterion == "activation_cumsum" else {}
    model, pruner = make(criterion=criterion, **options)
    run(model, pruner, [0.9, 0.9, 0.9])
    folded, record = bsdp.fold(model), pruner.record
    assert [entry.round for entry in record.rounds] == [0, 1, 2]
    params = [sum(p.numel() for p in m.parameters()) for m in (ConvNet(), folded)]
    assert params[1] <= 0.6 * params[0]
    assert (record.rounds[0].params, record.rounds[2].params) == tuple(params)
    assert record.rounds[2].channels == {"conv1": folded.conv1.out_channels, "conv2": folded.conv2.out_channels}
    model.eval()
    torch.testing.assert_close(folded.eval()(EXAMPLE + 1), model(EXAMPLE + 1))


@pytest.mark.parametrize(
    ("kind", "criterion", "usual", "other"),
    [
        ("params", "l2", "global", "per_cost"),
        ("channels", "taylor_2019", "global", "local"),
        ("macs", "l2", "per_cost", "global"),
        ("macs", "activation_cumsum", "priority", "per_cost"),
    ],
)
def test_the_ranking_goes_with_the_budget_and_the_criterion(kind: str, criterion: str, usual: str, other: str) -> None:
    chosen, network = {}, ConvNet()
    for ranking in (None, usual, other):
        model = copy.deepcopy(network)
        model, pruner = make(model, criterion=criterion, target_kind=kind, channel_ranking=ranking, theta=0.4)
        train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.01))
        plan = pruner.stage.plan(0.6 * pruner.original(kind), pruner.cost)
        chosen[ranking] = {name: units.tolist() for name, units in plan.remove.items()}
    assert chosen[None] == chosen[usual] != chosen[other]


@pytest.mark.parametrize("kind", ["macs", "channels"])
def test_other_budgets(kind: str) -> None:
    model, pruner = make(target_kind=kind, criterion="l1")
    before = bsdp.measure_cost(model, EXAMPLE).original("macs") if kind == "macs" else 20
    run(model, pruner, [0.9, 0.9, 0.9])
    after = (
        bsdp.measure_cost(model, EXAMPLE).original("macs") if kind == "macs" else sum(pruner.stage.channels().values())
    )
    assert after <= 0.6 * before


def test_a_decomposed_model() -> None:
    model = ConvNet()
    bsdp.decompose(model)
    model, pruner = make(model, criterion="taylor_2019")
    run(model, pruner, [0.9, 0.9, 0.9])
    assert sum(p.numel() for p in bsdp.fold(model).parameters()) <= 0.6 * pruner.record.rounds[0].params
    assert structure_of(model).keys() == {"version", "pairs", "widths"}


def test_the_smallest_tolerated_structure_comes_back() -> None:
    model, pruner = make(tolerance=0.01, rounds=3)
    last = run(model, pruner, [0.9, 0.95, 0.891, 0.2])
    assert last == 3
    assert pruner.record.chosen == 2
    assert pruner.stage.channels() == pruner.record.rounds[2].channels != pruner.record.rounds[3].channels
    assert model.conv1.out_channels == pruner.record.rounds[2].channels["conv1"]
    model(EXAMPLE)


def test_nothing_tolerated_gives_the_original_back() -> None:
    model, pruner = make(tolerance=0.01)
    reference = {}

    def keep(value: float) -> None:
        type(pruner).observe(pruner, value)
        reference.setdefault("state", snapshot(model))

    pruner.observe = keep  # type: ignore[method-assign]
    run(model, pruner, [0.9, 0.2])
    assert pruner.record.chosen == 0
    assert widths_of(model) == {}
    assert_same_state(model, reference["state"])


@pytest.mark.parametrize(
    "criterion", ["taylor_2019", "taylor_2016", "activation_cumsum", "transtailor", "channel_scaling"]
)
def test_a_state_round_trip_gives_the_same_next_cut(criterion: str) -> None:
    model, pruner = make(criterion=criterion, rounds=3, target=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(2):
        if pruner.cut_due(epoch):
            pruner.cut(epoch, optimizers=[optimizer])
        train(model, pruner, optimizer)
        pruner.observe(0.9)
    state, weights = copy.deepcopy(pruner.state_dict()), snapshot(model)
    twin = ConvNet()
    set_shape(twin, shape_of(model))
    twin.load_state_dict(weights)
    twin, other = make(twin, criterion=criterion, rounds=3, target=0.5)
    other.load_state_dict(state)
    assert other.record.original("params") == pruner.record.original("params")
    for one in (pruner, other):
        assert one.cut(2)
    assert_same_state(twin, snapshot(model))
    assert widths_of(twin) == widths_of(model)
    assert other.record.rounds == pruner.record.rounds


# --- what cannot be


def test_a_target_out_of_reach_is_refused_with_the_number() -> None:
    model, pruner = make(target=0.5)
    most = pruner.largest_share()
    with pytest.raises(ValueError, match=rf"`target=0\.999` is out of reach: .*{most:.1%}.*below {most:.3f}"):
        make(target=0.999)
    with pytest.raises(ValueError, match=r"`target=0\.5` is out of reach: with 7 channel\(s\) left in every group"):
        make(target=0.5, min_channels=7)
    run(model, pruner, [0.9])


def test_the_ceiling_is_what_one_channel_everywhere_leaves() -> None:
    _, pruner = make()
    small = nn.ModuleList([nn.Conv2d(3, 1, 3, bias=False), nn.Conv2d(1, 1, 3, bias=False), nn.Linear(1, 4)])
    left = sum(p.numel() for p in small.parameters()) + 4
    assert pruner.largest_share() == pytest.approx(1 - left / pruner.record.rounds[0].params)


def test_untraceable_models_are_refused_and_exclude_helps() -> None:
    pad = CifarResNet(1, num_classes=3, shortcut="pad")
    before = snapshot(pad)
    with pytest.raises(UntraceableError, match=r"of CifarResNet cannot be pruned: .*conv1\).*Prune bases instead"):
        make(copy.deepcopy(pad))
    assert_same_state(pad, before)
    model, pruner = make(pad, exclude=("conv1",), criterion="l1", target=0.3)
    run(model, pruner, [0.9, 0.9, 0.9])
    assert sum(p.numel() for p in model.parameters()) <= 0.7 * pruner.record.rounds[0].params


def test_bn_scale_needs_batch_norm() -> None:
    with pytest.raises(ValueError, match="`criterion='bn_scale'` needs batch norm"):
        make(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 3)), criterion="bn_scale")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.6, "rounds": 1, "max_group_ratio": 0.2}, r"in `rounds=1`, each of which .*`max_group_ratio=0.2`"),
        ({"target": 0.9, "rounds": 9, "round_to": 8}, r"in every group that has scores, .* would be gone"),
    ],
)
def test_a_target_that_the_bounds_forbid_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"`target={options['target']}` is out of reach.*{message}"):
        make(criterion="l2", **options)


def test_an_unreachable_round_says_what_stood_in_the_way() -> None:
    model, pruner = make(target=0.6, rounds=9, max_group_ratio=0.2, criterion="l2")
    pruner.scheduled = 8
    with pytest.warns(UserWarning, match="the last round did not reach the budget"):
        run(model, pruner, [0.9, 0.9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "taylor"}, "`criterion`"),
        ({"channel_ranking": "best"}, "`channel_ranking`"),
        ({"target_kind": "bases"}, "`target_kind`"),
        ({"max_group_ratio": 1.0}, "`max_group_ratio`"),
        ({"theta": 1.5}, "`theta`"),
        ({"min_channels": 0}, "`min_channels`"),
        ({"round_to": 0}, "`round_to`"),
        ({"threshold": -1.0}, "`threshold`"),
        ({"macs_penalty": -1.0}, "`macs_penalty`"),
        ({"l1": -1.0}, "`l1`"),
        (
            {"l1": 0.1},
            "`l1=0.1` is a penalty on batch-norm weights or channel factors, which `criterion='taylor_2019'`",
        ),
        ({"channel_ranking": "priority"}, "goes with `criterion='activation_cumsum'`, not 'taylor_2019'"),
        ({"warmup_epochs": 0}, "`warmup_epochs` must be at least 1.*`criterion='l1', 'l2', 'fpgm' or 'random'`"),
    ],
)
def test_settings_that_do_not_go_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruningSettings(**{"tolerance": None, **options})


# --- penalties


def test_without_a_penalty_gradients_are_those_of_the_loss() -> None:
    model, pruner = make(criterion="channel_scaling")
    weight = scales_of(model).weight
    weight.grad = torch.full_like(weight, 0.5)
    pruner.update()
    assert torch.equal(weight.grad, torch.full_like(weight, 0.5))


def test_a_large_penalty_drives_all_factors_to_the_floor() -> None:
    model, pruner = make(criterion="channel_scaling", l1=10.0, threshold=0.05, target=0.8, rounds=1)
    optimizer = torch.optim.SGD([scales_of(model).weight], lr=0.002)
    train(model, pruner, optimizer, steps=60)
    assert scales_of(model).weight.abs().max() < 0.05
    assert pruner.cut(1, optimizers=[optimizer])
    plain, other = make(criterion="channel_scaling", threshold=0.05, target=0.8, rounds=1)
    with pytest.warns(UserWarning, match="did not reach the budget"):  # every factor is still 1
        other.cut(1)
    assert sum(p.numel() for p in plain.parameters()) > sum(p.numel() for p in model.parameters())
    assert widths_of(plain) == {}


def test_the_penalty_on_batch_norm_is_its_sign() -> None:
    model, pruner = make(criterion="bn_scale", l1=0.25)
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1.0, -1, 0, 2, 3, 4, 5, 6]))
    for norm in (model.bn1, model.bn2):
        norm.weight.grad = torch.zeros_like(norm.weight)
    pruner.update()
    assert torch.equal(model.bn1.weight.grad, 0.25 * model.bn1.weight.detach().sign())
    assert torch.equal(model.bn2.weight.grad, torch.full((12,), 0.25))
    assert model.conv1.weight.grad is None


@pytest.mark.parametrize("head_first", [False, True])
def test_a_penalty_comes_once_with_the_optimizer_that_holds_the_weight(head_first: bool) -> None:
    model, pruner = make(criterion="bn_scale", l1=0.25)
    head = list(model.head.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in ((head, body) if head_first else (body, head))]
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    before = model.bn1.weight.grad.clone()
    for optimizer in optimizers:
        pruner.update(optimizer)
    torch.testing.assert_close(model.bn1.weight.grad - before, torch.full((8,), 0.25))


def test_a_penalty_on_macs_spares_the_cheap_layers() -> None:
    removed = {}
    for penalty in (0.0, 1e3):
        torch.manual_seed(0)
        model, pruner = make(criterion="l2", normalize="mean", macs_penalty=penalty, target=0.25, rounds=1)
        pruner.cut(1)
        removed[penalty] = (8 - model.conv1.out_channels) / 8
    assert removed[1e3] > removed[0.0]  # a channel of the first layer is read and written at four times the positions


# --- as it was found


def test_the_model_is_left_as_it_was() -> None:
    model = ConvNet()
    model.bn1.eval()
    before, random = snapshot(model), torch.random.get_rng_state()
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    make(model)
    assert_same_state(model, before)
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_network_inside_of_a_model_and_another_precision() -> None:
    model = nn.ModuleDict({"network": ConvNet().double(), "other": nn.Linear(2, 2)})
    settings = ChannelPruningSettings(target=0.4, rounds=1, tolerance=None, criterion="fpgm")
    pruner = ChannelPruner(model, settings, EXAMPLE.double(), network="network")
    pruner.cut(1)
    pruner.observe(0.5)
    pruner.restore()
    assert set(widths_of(model)) == {"network.conv1", "network.bn1", "network.conv2", "network.bn2", "network.head"}
    assert model["network"](EXAMPLE.double()).dtype == torch.float64


def test_channels_of_a_grouped_layer_count_when_there_is_one_per_group() -> None:
    """It passes channels on one by one then, and its group is that of the layer before it."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    options = {"criterion": "l2", "target_kind": "channels", "tolerance": None, "warmup_epochs": 0, "rounds": 2}
    settings = ChannelPruningSettings(target=0.5, schedule="constant", channel_ranking="local", **options)
    pruner = ChannelPruner(model, settings, torch.zeros(1, 1, 8, 8))
    for epoch in range(2):
        pruner.cut(epoch)
        made = model[0].out_channels + model[2].out_channels
        assert sum(pruner.record.rounds[-1].channels.values()) == made
        assert pruner.stage.cost(pruner.cost).total == made
    assert model[2].out_channels == model[2].groups == 4 and made == 8
    again = ChannelPruner(copy.deepcopy(model), settings, torch.zeros(1, 1, 8, 8))
    again.load_state_dict(pruner.state_dict())
    assert again.stage.channels() == pruner.stage.channels()


class AuxiliaryHead(nn.Module):
    """Has a second head in training."""

    def __init__(self, *, reads_image: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)
        self.reads_image, self.auxiliary = reads_image, nn.Linear(3 if reads_image else 8, 3)

    def forward(self, images: Tensor) -> Any:
        first = torch.relu(self.conv1(images))
        scores = self.head(torch.relu(self.conv2(first)).mean((2, 3)))
        read = images if self.reads_image else first
        return (scores, self.auxiliary(read.mean((2, 3)))) if self.training else scores


def test_a_head_of_the_train_mode_is_refused_until_its_channels_stay() -> None:
    settings, example = ChannelPruningSettings(criterion="l1", target=0.3, rounds=1), torch.zeros(1, 3, 8, 8)
    with pytest.raises(UntraceableError, match=r"'auxiliary' runs in training, .* make them \(conv1\) in `exclude`"):
        ChannelPruner(AuxiliaryHead(), settings, example)
    net = AuxiliaryHead()
    pruner = ChannelPruner(net, replace(settings, exclude=("conv1",)), example)
    assert pruner.cut(1) and net.conv2.out_channels < 8
    net(torch.randn(2, 3, 8, 8))
    assert ChannelPruner(AuxiliaryHead(reads_image=True), settings, example).stage.groups.keys() == {"conv1", "conv2"}


@pytest.mark.parametrize("criterion", ["channel_scaling", "transtailor"])
def test_factors_leave_grouped_convolutions_two_channels_per_group(criterion: str) -> None:
    layers = [nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 6, 1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"1 channel\(s\) .* \(two in each group of a grouped convolution\)"):
        make(copy.deepcopy(net), criterion=criterion, target=0.98)
    _, pruner = make(net, criterion=criterion, target=0.7, rounds=1)
    train(net, pruner, torch.optim.SGD(net.parameters(), lr=0.01))
    assert pruner.cut(1)
    assert (net[1].in_channels, net[1].out_channels) == (8, 8)
    train(net, pruner, torch.optim.SGD(net.parameters(), lr=0.01))
