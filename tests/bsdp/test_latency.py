"""Latency tables: what they tell, their files, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.cost import LayerCost
from bsdp.latency_measuring import rank_grid, rising
from tests.helpers.latencies import table_of
from tests.helpers.nets import ConvNet, make_input, make_net


def decomposed(name: str = "conv") -> nn.Module:
    model = make_net(name, dtype=torch.float32)
    bsdp.decompose(model)
    return model


def test_times_between_measured_ranks_are_linear_and_outside_constant() -> None:
    layer = bsdp.LayerLatency(9, 8, 1, fused_ns=100, ranks=(2, 6), pair_ns=(40, 120))
    assert [layer.pair(rank) for rank in (1, 2, 3, 5, 6, 9)] == [40, 40, 60, 100, 120, 120]
    assert layer.pair_limit == 4  # at 5 both take as long


def test_a_layer_without_timed_pairs_stays_fused() -> None:
    layer = bsdp.LayerLatency(9, 8, 1, fused_ns=100)
    assert layer.pair_limit == 0
    with pytest.raises(ValueError, match="no pair was timed"):
        layer.pair(3)


def test_the_table_survives_its_file(tmp_path: Path) -> None:
    table = table_of(decomposed(), slow=("conv1",))
    path = table.save(tmp_path / "new" / "table.json")
    assert bsdp.LatencyTable.load(path) == table
    assert json.loads(path.read_text())["layers"]["conv1"]["fused_ns"] == 8 * 27
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_file_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    table, path = table_of(decomposed()), tmp_path / "table.json"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists: choose another name"):
        table.save(path)
    assert path.read_text() == "mine"
    table.save(path, force=True)
    assert bsdp.LatencyTable.load(path) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, not 1"),
        ({"fixed_ns": -1}, "negative `fixed_ns`"),
        ({"fixed_ns": 1.5}, "`fixed_ns` must be of type int"),
        ({"layers": []}, "no table `layers`"),
        ({"device": None}, "`device` must be of type str"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    values = table_of(decomposed()).to_values() | change
    with pytest.raises(ValueError, match=message):
        bsdp.LatencyTable.from_values(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": [5, 1]}, "ascending ranks"),
        ({"ranks": [0, 5]}, "ascending ranks"),
        ({"ranks": [1]}, "as many times"),
        ({"pair_ns": [5, 4]}, "times that fall"),
        ({"pair_ns": [-5, 4]}, "negative ones"),
        ({"pair_ns": [5, None]}, "lists `ranks` and `pair_ns`"),
        ({"fused_ns": None}, "lacks a whole number"),
    ],
)
def test_entries_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    values = table_of(decomposed()).to_values()
    values["layers"]["conv2"].update(change)
    with pytest.raises(ValueError, match=f"layer 'conv2' .*{message}"):
        bsdp.LatencyTable.from_values(values)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(FileNotFoundError, match="`latency_table`: no such file"):
        bsdp.LatencyTable.load(path)
    for content, message in ((b"\xff\xfe", "not text"), (b"{", "not JSON"), (b"[]", "version None")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            bsdp.LatencyTable.load(path)


def test_a_table_of_another_network_is_refused() -> None:
    model, table = decomposed(), table_of(decomposed())
    with pytest.raises(ValueError, match=r"only the network has 'left'|only the table has 'conv1'"):
        bsdp.measure_cost(decomposed("residual"), latency=table)
    wider = ConvNet()
    wider.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
    bsdp.decompose(wider)
    with pytest.raises(ValueError, match=r"layer 'conv2' has .* \(72, 16, 1\) in the network and \(72, 12, 1\)"):
        bsdp.measure_cost(wider, latency=table)
    assert bsdp.measure_cost(model, latency=table).fixed_latency == 1000


def test_other_inputs_are_named() -> None:
    table = replace(table_of(decomposed()), input_shapes=((1, 3, 8, 8),))
    assert table.other_inputs([[1, 3, 8, 8]]) == table.other_inputs([(4, 3, 8, 8)]) == ""
    assert "[3, 8, 8]" in table.other_inputs([[1, 3, 64, 64]]) and "[3, 64, 64]" in table.other_inputs([[1, 3, 64, 64]])
    assert table.other_inputs([[1, 3, 8, 8], [1, 2]])
    assert replace(table, input_shapes=()).other_inputs([[1, 3, 64, 64]]) == ""  # it does not say


def test_a_cost_at_another_size_warns() -> None:
    model = decomposed()
    with pytest.warns(UserWarning, match=r"measured on inputs of \[3, 8, 8\], but the network gets \[3, 12, 12\]"):
        table = replace(table_of(model), input_shapes=((1, 3, 8, 8),))
        bsdp.measure_cost(model, torch.randn(1, 3, 12, 12), latency=table)


def test_times_are_made_to_rise() -> None:
    assert rising([1, 3, 2, 2, 9]) == [1, 2, 2, 2, 9]
    assert rising([5, 4, 3]) == [4, 4, 4]
    assert rising([]) == []


@pytest.mark.parametrize(("multiple", "points", "expected"), [(8, 9, (1, 8, 16, 24, 30)), (8, 4, (1, 8, 24, 30))])
def test_ranks_to_time_are_multiples_between_one_and_the_break_even(
    multiple: int, points: int, expected: tuple[int, ...]
) -> None:
    cost = LayerCost(fan_in=1000, out_channels=32, groups=1, full_rank=32, bias=False)
    assert cost.largest_useful_rank == 31
    cost = LayerCost(fan_in=500, out_channels=32, groups=1, full_rank=32, bias=False)
    assert cost.largest_useful_rank == 30
    assert rank_grid(cost, multiple=multiple, points=points) == expected


def test_a_layer_that_cannot_pay_is_not_timed_as_a_pair() -> None:
    cost = LayerCost(fan_in=9, out_channels=8, groups=8, full_rank=1, bias=False)
    assert rank_grid(cost, multiple=8, points=4) == ()


@pytest.mark.parametrize("name", ["conv", "shared", "grouped", "tokens", "signal"])
def test_measuring_leaves_the_model_as_it_was(name: str) -> None:
    model = decomposed(name).train()
    example = make_input(name, batch=1, dtype=torch.float32)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    outputs = model.eval()(example)
    model.train()
    table = bsdp.measure_latency_table(model, example, batch_size=2, multiple=2, points=3, repeats=2, warmup=1)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(example), outputs)
    assert table.layers.keys() == bsdp.measure_cost(model, example).layers.keys()
    for layer in table.layers.values():
        assert layer.fused_ns > 0 and 1 <= len(layer.ranks) <= 3
        assert list(layer.pair_ns) == sorted(layer.pair_ns) and layer.pair_ns[0] > 0
    assert (table.batch_size, table.input_shapes) == (2, (tuple(example.shape),))
    bsdp.LatencyTable.from_values(table.to_values()).check(bsdp.measure_cost(model, example).layers)


def test_present_ranks_do_not_matter_for_what_is_timed() -> None:
    model, example = decomposed(), make_input("conv", batch=1, dtype=torch.float32)
    full = bsdp.measure_latency_table(model, example, repeats=1, warmup=0)
    for pair in bsdp.named_pairs(model).values():
        pair.keep(torch.tensor([0]))
    cut = bsdp.measure_latency_table(model, example, repeats=1, warmup=0)
    assert {name: layer.ranks for name, layer in cut.layers.items()} == {n: x.ranks for n, x in full.layers.items()}
    cut.check(bsdp.measure_cost(model, example).layers)


def test_a_layer_that_the_model_reads_has_no_time_of_its_own() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.linear(inputs, self.read.weight))  # type: ignore[no-any-return]

    model, example = Reader(), torch.zeros(1, 8)
    bsdp.decompose(model)
    table = bsdp.measure_latency_table(model, example, repeats=1)
    assert table.layers["read"] == bsdp.LayerLatency(8, 8, 1, fused_ns=0)
    cost = bsdp.measure_cost(model, example, latency=table)
    assert not cost.layers["read"].cuttable and cost.smallest("latency") == cost.original("latency") == table.fixed_ns


def test_a_layer_that_is_called_with_more_than_its_input_is_left_alone() -> None:
    class Grower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 2, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.up(images, output_size=(9, 9)))  # type: ignore[no-any-return]

    model, example = Grower(), torch.zeros(1, 8, 4, 4)
    bsdp.decompose(model)
    table = bsdp.measure_latency_table(model, example, repeats=1)
    assert table.layers["up"].fused_ns == 0 and table.fixed_ns > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"multiple": 0}, "`multiple` must be at least 1"),
        ({"points": 1}, "`points` must be at least 2"),
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"threads": 0}, "`threads` must be between"),
    ],
)
def test_measuring_refuses(options: dict[str, int], message: str) -> None:
    model, example = decomposed(), make_input("conv", batch=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        bsdp.measure_latency_table(model, example, **options)
    with pytest.raises(ValueError, match="no decomposed layer"):
        bsdp.measure_latency_table(make_net("conv"), example)
