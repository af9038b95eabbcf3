"""Costs by rank: the pair, the fused layer and the cheaper of the two."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bsdp
from bsdp.cost import COST_KINDS, LayerCost, ModelCost, Positions, layer_cost
from bsdp.layers import BasisPair
from tests.helpers.cases import LAYER_CASES, LayerCase
from tests.helpers.compare import count_parameters


def conv_cost(inputs: int, outputs: int, kernel: int, *, bias: bool = True, positions: int | None = None) -> LayerCost:
    """Cost of an ungrouped square convolution."""
    fan_in = inputs * kernel * kernel
    return LayerCost(fan_in, outputs, 1, min(fan_in, outputs), bias, positions)


@st.composite
def layer_costs(draw: st.DrawFn) -> LayerCost:
    groups = draw(st.integers(1, 4))
    out_per_group = draw(st.integers(1, 40))
    fan_in = draw(st.integers(1, 60))
    bias, positions = draw(st.booleans()), draw(st.integers(1, 100))
    return LayerCost(fan_in, groups * out_per_group, groups, min(fan_in, out_per_group), bias, positions)


# Oracle 7
def test_break_even_of_a_3x3_convolution_the_pair_is_cheaper_from_57_down() -> None:
    cost = conv_cost(64, 64, 3)
    assert cost.break_even_rank == pytest.approx(57.6)
    assert cost.largest_useful_rank == 57
    assert (cost.kind(57), cost.kind(58)) == ("pair", "fused")
    assert cost.deployed(57) == 57 * (576 + 64) + 64
    assert cost.deployed(58) == cost.deployed(64) == 64 * 576 + 64


# Oracle 7
def test_break_even_of_a_1x1_convolution_both_cost_the_same_at_32_and_it_is_fused() -> None:
    cost = conv_cost(64, 64, 1)
    assert cost.break_even_rank == 32.0
    assert 32 * cost.per_rank == cost.fused
    assert (cost.kind(31), cost.kind(32)) == ("pair", "fused")
    assert cost.largest_useful_rank == 31


@given(layer_costs())
def test_the_cheaper_form_is_deployed_at_every_rank(cost: LayerCost) -> None:
    for rank in range(1, cost.full_rank + 1):
        pair, fused = rank * (cost.groups * cost.fan_in + cost.out_channels), cost.out_channels * cost.fan_in
        assert cost.kind(rank) == ("pair" if pair < fused else "fused")
        bias = cost.out_channels if cost.bias else 0
        assert cost.deployed(rank, new_bias=False) == min(pair, fused) + bias
        assert cost.deployed(rank, kind="macs") == min(pair, fused) * (cost.positions or 0)
        assert cost.deployed(rank, kind="bases") == cost.groups * rank


@given(layer_costs(), st.sampled_from(COST_KINDS))
def test_cost_never_rises_as_the_rank_falls_and_full_rank_costs_the_original(cost: LayerCost, kind: str) -> None:
    costs = [cost.deployed(rank, kind=kind, new_bias=False) for rank in range(1, cost.full_rank + 1)]
    assert costs == sorted(costs)
    assert costs[-1] == cost.original(kind=kind)


def test_a_new_bias_counts_below_full_rank_only_and_only_as_parameters() -> None:
    cost = conv_cost(8, 16, 3, bias=False, positions=10)
    assert cost.deployed(16) == cost.original() == 16 * 72
    assert cost.deployed(15) == min(16 * 72, 15 * 88) + 16
    assert cost.deployed(15, new_bias=False) == min(16 * 72, 15 * 88)
    assert cost.deployed(4, kind="macs") == 4 * 88 * 10


def test_macs_without_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="example input"):
        conv_cost(3, 8, 3).deployed(2, kind="macs")


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_cost_of_a_layer_is_that_of_its_pair_and_counts_its_parameters(case: LayerCase) -> None:
    layer = case.build()
    cost = layer_cost(layer, positions=Positions(7, 9))
    assert cost == layer_cost(BasisPair(layer, rank=1), positions=Positions(7, 9))
    assert cost.original() == count_parameters(layer)
    assert (cost.positions, cost.output_positions, cost.full_rank) == (7, 9, BasisPair(layer).rank)


@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_cost_at_a_rank_counts_the_parameters_of_the_folded_pair(case: LayerCase) -> None:
    layer = case.build()
    for rank in range(1, layer_cost(layer).full_rank + 1):
        pair = BasisPair(layer, rank=rank)
        nn.init.zeros_(pair.basis.weight)
        nn.init.zeros_(pair.scaling.weight)
        folded = bsdp.fold_pair(pair)
        assert layer_cost(layer).deployed(rank, new_bias=False) == count_parameters(folded)
        assert layer_cost(layer).kind(rank) == ("pair" if isinstance(folded, nn.Sequential) else "fused")


def test_model_cost_adds_layers_and_the_rest() -> None:
    layers = {"a": conv_cost(8, 16, 3, positions=4), "b": conv_cost(16, 16, 1, bias=False, positions=9)}
    cost = ModelCost(layers, fixed_params=100, fixed_macs=1000)
    assert cost.original() == 100 + 16 * 72 + 16 + 256
    assert cost.original("macs") == 1000 + 4 * 16 * 72 + 9 * 256
    assert cost.original("bases") == 32
    ranks = {"a": 2, "b": 3}
    assert cost.deployed(ranks) == 100 + 2 * 88 + 16 + 3 * 32 + 16
    assert cost.deployed(ranks, "macs") == 1000 + 4 * 2 * 88 + 9 * 3 * 32
    assert cost.deployed(ranks, "bases") == 5
    assert cost.smallest("bases") == 2
    assert cost.smallest() == 100 + 88 + 16 + 32 + 16
    assert cost.smallest(min_rank=2) == 100 + 2 * 88 + 16 + 2 * 32 + 16


def test_a_layer_that_is_never_called_or_must_stay_whole_cannot_get_smaller() -> None:
    free = conv_cost(16, 16, 1, bias=False, positions=4)
    for kept in (replace(free, positions=0), replace(free, whole=True)):
        cost = ModelCost({"free": free, "kept": kept}, fixed_macs=0)
        assert cost.smallest("bases") == 1 + 16
        assert cost.smallest() == 32 + 16 + 256
        assert not kept.cuttable
    assert replace(free, whole=True).kind(1) == "fused"


def test_model_cost_without_new_bias() -> None:
    layers = {"b": conv_cost(16, 16, 1, bias=False)}
    assert ModelCost(layers, new_bias=False).deployed({"b": 3}) == 96
    assert ModelCost(layers, new_bias=True).deployed({"b": 3}) == 112


def test_model_cost_refuses_unmeasured_macs_and_unknown_kinds() -> None:
    cost = ModelCost({"a": conv_cost(8, 16, 3)})
    with pytest.raises(ValueError, match="MACs were not measured"):
        cost.original("macs")
    with pytest.raises(ValueError, match="`kind` must be one of 'params', 'macs', 'bases', 'latency', got 'flops'"):
        cost.original("flops")
