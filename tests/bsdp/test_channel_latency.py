"""Times by width: what a table tells, its files, how it is measured, and what budgets of it do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp import channel_latency_measuring as measuring
from bsdp.channel_latency_measuring import width_grid
from bsdp.channel_scales import add_scales
from bsdp.channel_selection import ChannelCost
from bsdp.plain_layers import layer_inputs, layer_outputs
from bsdp.scale_hooks import scales_of
from tests.helpers.channel_removal import TRACEABLE, cut, random_units, traceable_batch, traceable_net
from tests.helpers.compare import assert_same_state, snapshot
from tests.helpers.latencies import table_of, widths_of
from tests.helpers.nets import ConvNet

EXAMPLE = torch.zeros(1, 3, 8, 8)
LAYER = bsdp.LayerWidths((2, 6), (1, 5), ((10, 50), (30, 110)))


# --- what a table tells


def test_times_between_measured_widths_are_linear_on_both_sides_and_outside_constant() -> None:
    assert [LAYER.at(inputs, 5) for inputs in (1, 2, 3, 6, 9)] == [50, 50, 65, 110, 110]
    assert [LAYER.at(6, outputs) for outputs in (1, 2, 5, 7)] == [30, 50, 110, 110]
    assert LAYER.at(4, 3) == 50  # the middle of 10, 50, 30 and 110
    assert LAYER.original_ns == 110


def test_outputs_that_follow_the_inputs_do_not_count() -> None:
    layer = bsdp.LayerWidths((1, 5), (), ((10,), (50,)))
    assert [layer.at(3, outputs) for outputs in (1, 3, 5)] == [30, 30, 30]


# Reference: the network itself, with its channels removed
@pytest.mark.parametrize("name", TRACEABLE)
def test_the_reckoning_is_the_time_of_the_widths_that_a_removal_leaves(name: str) -> None:
    net, example = traceable_net(name), traceable_batch(name, batch=1)
    table, groups = widths_of(net, example), bsdp.channel_groups(net, example)
    cost = ChannelCost(net, groups, total=table.of(net), kind="latency", latency=table)
    assert cost.total == table.original_ns == 1000 + sum(layer.original_ns for layer in table.layers.values())
    remove = random_units(groups)
    for group, units in remove.items():
        before, saved = cost.total, cost.saved(group, len(units))
        cost.remove(group, len(units))
        assert cost.total == before - saved < before
    cut(net, example, remove)
    assert cost.total == table.of(net)


def test_a_budget_of_latency_needs_times() -> None:
    with pytest.raises(ValueError, match="measure_channel_latency_table"):
        ChannelCost(ConvNet(), bsdp.channel_groups(ConvNet(), EXAMPLE), kind="latency")


def test_per_cost_counts_what_all_channels_of_a_group_save() -> None:
    """The first channels of a group may save nothing, for so many fill one vector of the hardware."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 2, 1))
    groups = bsdp.channel_groups(net, EXAMPLE)
    steps = bsdp.LayerWidths((3,), (1, 8, 12, 16), ((0, 0, 1000, 1000),))
    flat = bsdp.LayerWidths((16,), (1, 8), ((0, 80),))
    end = bsdp.LayerWidths((8,), (2,), ((5,),))
    table = bsdp.ChannelLatencyTable({"0": steps, "1": flat, "2": end}, 0)
    cost = ChannelCost(net, groups, total=table.of(net), kind="latency", latency=table)
    assert (cost.saved("0"), cost.rate("0", 15), cost.rate("1", 7)) == (0, 1000 / 15, 80 / 7)
    scores = {name: torch.ones(group.size) for name, group in groups.items()}
    plan = bsdp.select_channels(scores, cost, budget=200, ranking="per_cost", max_group_ratio=0.99)
    assert {name: len(units) for name, units in plan.remove.items()} == {"0": 8, "1": 0}
    assert plan.reached and plan.cost == table.original_ns - 1000


# --- files


def test_the_table_survives_its_file(tmp_path: Path) -> None:
    table = replace(widths_of(ConvNet(), EXAMPLE), multiple=4, threads=2)
    assert bsdp.ChannelLatencyTable.load(table.save(tmp_path / "table.json")) == table
    assert bsdp.ChannelLatencyTable.from_values(table.to_values()) == table


def test_tables_by_rank_and_by_width_are_told_apart(tmp_path: Path) -> None:
    net = ConvNet()
    widths, by_rank = widths_of(net, EXAMPLE).save(tmp_path / "widths"), tmp_path / "ranks"
    bsdp.decompose(net)
    table_of(net).save(by_rank)
    with pytest.raises(ValueError, match=r"times by 'widths', which goes with `ChannelPruning`; .* times by ranks"):
        bsdp.LatencyTable.load(widths)
    with pytest.raises(ValueError, match=r"by 'ranks', which goes with `Iter.* needs times by widths.*--by widths"):
        bsdp.ChannelLatencyTable.load(by_rank)
    for by in (3, "days", None):
        with pytest.raises(ValueError, match=rf"times by {by!r}, which goes with nothing here"):
            bsdp.LatencyTable.from_values(table_of(net).to_values() | {"by": by})
    old = table_of(net).to_values()
    del old["by"]  # files of before there were widths
    assert bsdp.LatencyTable.from_values(old) == table_of(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "ascending whole numbers"),
        ({"inputs": [8, 1]}, "ascending whole numbers"),
        ({"inputs": [0, 8]}, "ascending whole numbers"),
        ({"outputs": [1, 1]}, "ascending whole numbers"),
        ({"outputs": None}, "ascending whole numbers"),
        ({"outputs": [1, 2.5]}, "ascending whole numbers"),
        ({"inputs": [1, 4, 8]}, "as many rows `ns`"),
        ({"ns": None}, "as many rows `ns`"),
        ({"ns": [[1, 2, 3], [1, 2, 3]]}, "as many whole numbers"),
        ({"ns": [[1, 2], [3, None]]}, "as many whole numbers"),
        ({"ns": [[-1, 2], [3, 4]]}, "as many whole numbers"),
        ({"ns": [[2, 1], [3, 4]]}, "times that fall"),
        ({"ns": [[1, 5], [3, 4]]}, "times that fall"),
    ],
)
def test_entries_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    values = widths_of(ConvNet(), EXAMPLE).to_values()
    assert (len(values["layers"]["conv2"]["inputs"]), len(values["layers"]["conv2"]["outputs"])) == (2, 2)
    values["layers"]["conv2"].update(change)
    with pytest.raises(ValueError, match=f"layer 'conv2' .*{message}"):
        bsdp.ChannelLatencyTable.from_values(values)
    values["layers"]["conv2"] = 3
    with pytest.raises(ValueError, match="layer 'conv2' is no table"):
        bsdp.ChannelLatencyTable.from_values(values)


def test_a_table_of_another_network_is_refused() -> None:
    net, table = ConvNet(), widths_of(ConvNet(), EXAMPLE)
    names = list(table.layers)
    table.check(net, names)
    cut(net, EXAMPLE, random_units(bsdp.channel_groups(net, EXAMPLE)))
    table.check(net, names)  # it lost channels since
    with pytest.raises(ValueError, match="only the network has 'conv1'"):
        replace(table, layers={}).check(net, names)
    with pytest.raises(ValueError, match=r"only the table has 'conv9'.*--by widths"):
        replace(table, layers={**table.layers, "conv9": LAYER}).check(net, names)
    with pytest.raises(ValueError, match=r"'conv1' has inputs and outputs of \(3, 8\) in the network and \(6, 5\)"):
        replace(table, layers={**table.layers, "conv1": LAYER}).check(net, names)
    net.conv1 = nn.Sequential(net.conv1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"'conv1' is a Sequential in the network"):
        table.check(net, ())


def test_a_table_of_the_present_sizes_is_that_of_the_network() -> None:
    net = ConvNet()
    cut(net, EXAMPLE, random_units(bsdp.channel_groups(net, EXAMPLE)))
    table = widths_of(net, EXAMPLE)
    table.check(net, list(table.layers))
    assert table.of(net) == table.original_ns


def test_a_depthwise_layer_is_no_dense_one() -> None:
    table = widths_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1)), EXAMPLE)
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match="'1' is a depthwise convolution in the table and none in the network"):
        table.check(dense, ())


# --- measuring


@pytest.mark.parametrize(
    ("size", "step", "expected"),
    [
        (64, 1, (1, 16, 32, 48, 64)),
        (20, 1, (1, 8, 16, 20)),
        (5, 1, (1, 5)),
        (1, 1, (1,)),
        (64, 32, (32, 64)),
        (6, 6, (6,)),
    ],
)
def test_widths_to_time_are_multiples_between_the_smallest_and_the_original(
    size: int, step: int, expected: tuple[int, ...]
) -> None:
    assert width_grid(size, step=step, multiple=8, points=5) == expected


@pytest.mark.parametrize("name", TRACEABLE)
def test_every_layer_whose_channels_can_go_is_timed(name: str) -> None:
    net, example = traceable_net(name), traceable_batch(name, batch=1)
    before, modes = snapshot(net), [module.training for module in net.modules()]
    state = torch.get_rng_state()
    table = bsdp.measure_channel_latency_table(net, example, batch_size=2, multiple=2, points=3, repeats=1, warmup=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(net, before)
    assert [module.training for module in net.modules()] == modes
    assert not any("forward" in vars(module) for module in net.modules())
    table.check(net, list(widths_of(net, example).layers))
    assert table.layers.keys() == widths_of(net, example).layers.keys()
    assert (table.batch_size, table.multiple, table.input_shapes) == (2, 2, (tuple(example.shape),))
    assert bsdp.ChannelLatencyTable.from_values(table.to_values()) == table  # nothing falls as a width rises
    assert all(layer.original_ns > 0 for layer in table.layers.values())


def fake_times(monkeypatch: pytest.MonkeyPatch, *, plain: float = 0.0003) -> None:
    """By itself a layer takes a millisecond per input and output, or per input where outputs follow.

    Args:
        monkeypatch: The fixture.
        plain: Milliseconds of a pass without stopwatches.
    """

    def times(calls: Mapping[Hashable, Callable[[], object]], **options: Any) -> dict[Hashable, list[float]]:
        for call in calls.values():
            call()
        if "plain" in calls:
            return {"plain": [plain]}
        return {widths: [float(widths[0] * max(1, widths[1]))] for widths in calls}  # type: ignore[index]

    monkeypatch.setattr(measuring, "time_in_turn", times)


class Watch:
    """A stopwatch that takes 100 ns per call."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.synchronize, self.spent = synchronize, 0

    def time(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.spent += 100
        return call(*arguments, **named)

    def take(self) -> int:
        spent, self.spent = self.spent, 0
        return spent


def test_times_of_a_layer_alone_are_scaled_to_those_inside_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)
    monkeypatch.setattr(measuring, "Stopwatch", Watch)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1))
    table = bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=4, repeats=1, warmup=0)
    assert table.layers["0"] == bsdp.LayerWidths((1, 3), (1, 4, 8), ((4, 17, 33), (12, 50, 100)))
    assert table.layers["1"] == bsdp.LayerWidths((1, 4, 8), (), ((12,), (50,), (100,)))
    assert table.layers["2"].original_ns == 100
    fake_times(monkeypatch, plain=0.00015)  # looking at the stopwatches took half of the time
    half = bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=4, repeats=1, warmup=0)
    assert half.layers["0"] == bsdp.LayerWidths((1, 3), (1, 4, 8), ((2, 8, 17), (6, 25, 50)))
    assert half.original_ns == 150


def test_what_goes_with_the_channels_of_the_rest_is_added_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_run", run_of(rest=1000, half=200, plain=1600))
    fake_times(monkeypatch)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    table = bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=4, repeats=1, warmup=0)
    # By the layers alone half of the channels saves 300 of 600 ns. The rest took 800 ns less, but of 12 channels'
    # outputs a third went, and so a third of it counts.
    assert table.fixed_ns == 0
    assert table.original_ns == 1600
    halved = measuring._halved(net, (EXAMPLE,), multiple=4, exclude=())
    assert [layer_outputs(layer) for layer in halved if isinstance(layer, nn.Conv2d)] == [4, 4]
    assert table.of(halved) == pytest.approx(1300 - 333, abs=2)  # each layer is rounded
    same = bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=16, repeats=1, warmup=0)
    assert same.fixed_ns == 1000  # groups of fewer channels lose none, and nothing is known
    monkeypatch.setattr(measuring, "_run", run_of(rest=1000, half=880, plain=1600))
    less = bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=4, repeats=1, warmup=0)
    assert less.of(halved) == pytest.approx(1300 - 120, abs=2)
    monkeypatch.setattr(measuring, "_run", run_of(rest=1000, half=1100, plain=1600))
    assert bsdp.measure_channel_latency_table(net, EXAMPLE, multiple=4, repeats=1, warmup=0).fixed_ns == 1000


def run_of(*, rest: float, half: float, plain: float) -> Callable[..., Any]:
    """Passes in which every layer takes 300 ns."""

    def run(network: nn.Module, halved: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, **options: Any) -> Any:
        watched = {name: measuring._Watched(layer, Watch(lambda: None), [300]) for name, layer in layers.items()}  # type: ignore[arg-type]
        for watch in watched.values():
            shape = (1, layer_inputs(watch.layer), 8, 8)
            watch.calls[(shape, torch.float32, torch.contiguous_format)] = 1
            watch.elements = 64.0
        return watched, rest, half, plain

    return run


def measured(net: nn.Module, example: Tensor = EXAMPLE, **options: Any) -> bsdp.ChannelLatencyTable:
    return bsdp.measure_channel_latency_table(net, example, multiple=2, points=3, repeats=1, warmup=0, **options)


def test_factors_of_channels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, run = ConvNet(), measuring._run
    add_scales(net, bsdp.channel_groups(net, EXAMPLE))

    def look(network: nn.Module, *others: Any, **options: Any) -> Any:
        assert scales_of(network) is None
        return run(network, *others, **options)

    monkeypatch.setattr(measuring, "_run", look)
    assert measured(net).layers.keys() == widths_of(ConvNet(), EXAMPLE).layers.keys()
    assert scales_of(net) is not None


def test_outputs_of_a_grouped_layer_with_more_of_them_than_inputs_count() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1))
    layer = measured(net).layers["1"]
    assert (layer.inputs, layer.outputs) == ((4,), (4, 8))


def test_layers_of_a_transformer_are_called() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(5, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.block(self.embed(tokens)).mean(1))

    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        table = measured(Net(), torch.zeros(1, 7, 5))
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        assert table.layers["block.linear1"].original_ns > 0
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("by", ["ranks", "widths"])
def test_what_a_network_keeps_of_a_pass_does_not_hinder_its_training(by: str) -> None:
    class Net(ConvNet):
        kept: Tensor | None = None

        def forward(self, images: Tensor) -> Tensor:
            if self.kept is None or len(self.kept) != len(images):
                self.kept = torch.ones(len(images), 3, 1, 1)
            return super().forward(images * self.kept)

    net = Net()
    if by == "ranks":
        bsdp.decompose(net)
        bsdp.measure_latency_table(net, EXAMPLE, batch_size=2, repeats=1, warmup=0)
    else:
        measured(net, batch_size=2)
    images = torch.zeros(2, 3, 8, 8, requires_grad=True)
    net(images).sum().backward()


def test_layers_that_must_stay_are_left_out() -> None:
    table = measured(ConvNet(), exclude=iter(["conv1"]))
    groups = bsdp.channel_groups(ConvNet(), EXAMPLE, exclude=["conv1"])
    assert table.layers.keys() == {m.layer for group in groups.values() for m in group.members if m.weighted}
    assert table.layers.keys() < measured(ConvNet()).layers.keys()


def test_inputs_may_have_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.end = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.end(self.up(output_size=[9, 9], input=self.conv(images)))

    assert measured(Net()).layers["up"].inputs == (1, 2, 4)


def test_a_layer_that_is_never_called_takes_no_time() -> None:
    net = ConvNet()
    watch = measuring._Watched(net.conv1, Watch(lambda: None), [0])  # type: ignore[arg-type]
    grid = measuring._grid(watch, multiple=8, points=5, repeats=1, warmup=0, cuda=False)
    assert grid == bsdp.LayerWidths((3,), (8,), ((0,),))


def test_layers_keep_their_memory_layout_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    call = measuring._call

    def spy(form: nn.Module, given: list[tuple[Tensor, int]]) -> None:
        assert isinstance(form.weight, Tensor)
        for tensor in (form.weight, given[0][0]):
            if tensor.dim() == 4 and min(tensor.shape[1:]) > 1:
                seen.append((tensor.is_contiguous(memory_format=torch.channels_last), tensor.dtype))
        call(form, given)

    monkeypatch.setattr(measuring, "_call", spy)
    net = copy.deepcopy(ConvNet()).double().to(memory_format=torch.channels_last)
    example = EXAMPLE.double().contiguous(memory_format=torch.channels_last)
    bsdp.measure_channel_latency_table(net, example, repeats=1, warmup=0)
    assert seen and set(seen) == {(True, torch.float64)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"multiple": 0}, "`multiple` must be at least 1"),
        ({"points": 1}, "`points` must be at least 2"),
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"warmup": -1}, "`warmup` must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bsdp.measure_channel_latency_table(ConvNet(), EXAMPLE, **options)  # type: ignore[arg-type]


def test_a_decomposed_network_is_refused() -> None:
    net = ConvNet()
    bsdp.decompose(net)
    with pytest.raises(ValueError, match=r"decomposed .*bsdp\.fold"):
        bsdp.measure_channel_latency_table(net, EXAMPLE)


# --- the pruner


def test_rounds_end_at_budgets_of_the_table() -> None:
    net = ConvNet()
    table = widths_of(net, EXAMPLE, fixed=100)
    settings = bsdp.ChannelPruningSettings(
        target=0.4, target_kind="latency", rounds=2, schedule="constant", tolerance=None, criterion="l1"
    )
    assert settings.ranking_of_channels == "per_cost"
    pruner = bsdp.ChannelPruner(net, settings, EXAMPLE, latency=table)
    for epoch in (1, 2):
        pruner.cut(epoch)
    shares = [pruner.record.kept(entry, "latency") for entry in pruner.record.rounds]
    assert shares[0] == 1.0 and 0.7 < shares[1] <= 0.8 and 0.5 < shares[2] <= 0.6  # type: ignore[operator]
    assert pruner.record.rounds[-1].latency == table.of(net) == pruner.cost.fixed_latency
    assert pruner.largest_share() < 1 - 100 / table.original_ns


def test_what_cannot_be_counted_is_refused() -> None:
    settings = bsdp.ChannelPruningSettings(target=0.4, target_kind="latency", rounds=1, tolerance=None)
    table = widths_of(ConvNet(), EXAMPLE)
    with pytest.raises(ValueError, match="`target_kind='latency'`: latency by width was not measured"):
        bsdp.ChannelPruner(ConvNet(), settings, EXAMPLE)
    with pytest.raises(ValueError, match="only the network has 'conv"):
        bsdp.ChannelPruner(ConvNet(), settings, EXAMPLE, latency=replace(table, layers={}))
    with pytest.raises(ValueError, match=r"`target=0.4` is out of reach: .* of the latency would be gone"):
        bsdp.ChannelPruner(ConvNet(), settings, EXAMPLE, latency=replace(table, fixed_ns=10**6))
    members = widths_of(ConvNet(), EXAMPLE).layers
    reader = list(members)[-1]
    with pytest.raises(ValueError, match=f"only the network has {reader!r}"):
        layers = {name: layer for name, layer in members.items() if name != reader}
        bsdp.ChannelPruner(ConvNet(), settings, EXAMPLE, latency=replace(table, layers=layers))
    net = ConvNet()
    bsdp.decompose(net)
    for kind in ("latency", "params"):
        with pytest.raises(ValueError, match=r"`target_kind: latency` of channels .* leave `BasisDecomposition` out"):
            bsdp.ChannelPruner(net, replace(settings, target_kind=kind), EXAMPLE, latency=table)
