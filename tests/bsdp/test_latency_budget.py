"""Budgets of latency: what a table does to costs, to the selection and to what is deployed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.cost import ModelCost
from tests.helpers.latencies import latency_of, table_of
from tests.helpers.nets import make_input, make_net


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
    bsdp.decompose(model)
    return model


def scores(cost: ModelCost, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(c.groups * c.full_rank, generator=generator) for n, c in cost.layers.items()}


def test_a_layer_is_a_pair_only_where_that_is_faster() -> None:
    model = network()
    plain = bsdp.measure_cost(model).layers["2"]
    table = table_of(model, slow=("0",))
    first, second = bsdp.measure_cost(model, latency=table).layers.values()
    assert (first.pair_limit, first.largest_useful_rank, first.cuttable) == (0, 0, False)
    # 100 ns more than its weights say: 32 * 288 = 9216 against 100 + 320 r
    assert plain.largest_useful_rank == 28 and second.pair_limit == second.largest_useful_rank == 28
    slower = replace(second, latency=latency_of(plain, speed=0.5), pair_limit=14)
    assert [slower.kind(rank) for rank in (14, 15)] == ["pair", "fused"]
    assert slower.deployed(14, kind="latency") < slower.deployed(15, kind="latency") == 9216
    assert slower.deployed(15) == 9216 + 32  # what is deployed is what counts, in every kind
    assert slower.original(kind="latency") == 9216


def test_deployed_latency_never_falls_as_ranks_rise() -> None:
    model = network()
    cost = bsdp.measure_cost(model, latency=table_of(model, speed=0.6))
    for layer in cost.layers.values():
        times = [layer.deployed(rank, kind="latency") for rank in range(1, layer.full_rank + 1)]
        assert times == sorted(times) and times[-1] == layer.original(kind="latency")


def test_a_pair_that_needs_more_weights_is_never_deployed() -> None:
    model = network()
    cost = bsdp.measure_cost(model).layers["2"]
    fast = replace(latency_of(cost, speed=100.0), ranks=(1, cost.full_rank), pair_ns=(1, 2))
    assert fast.pair_limit == cost.full_rank
    assert replace(cost, latency=fast, pair_limit=fast.pair_limit).largest_useful_rank == cost.largest_useful_rank


@pytest.mark.parametrize("ranking", ["importance", "per_cost", "hull"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_the_budget_of_the_table_is_met(ranking: str, share: float) -> None:
    model = network()
    cost = bsdp.measure_cost(model, latency=table_of(model, slow=("0",), fixed=10))
    budget = share * cost.original("latency")
    plan = bsdp.select(scores(cost), cost, budget=budget, kind="latency", ranking=ranking)
    assert plan.reached and cost.deployed(plan.ranks, "latency") <= budget
    assert plan.ranks["0"] == 27  # a cut there would not make it faster


def test_a_layer_that_stays_one_layer_loses_nothing() -> None:
    model = network()
    cost = bsdp.measure_cost(model, latency=table_of(model, speed=0.5))
    limits = {name: layer.pair_limit for name, layer in cost.layers.items()}
    importance = {name: torch.ones(layer.full_rank) for name, layer in cost.layers.items()}
    # Four bases of the first layer are worth nothing, but it is faster fused, and the rest is worth more than others.
    importance["0"] = torch.cat([torch.zeros(4), torch.full((23,), 2.0)])
    for kind in ("latency", "params", "macs"):
        if kind == "macs":
            cost = bsdp.measure_cost(model, torch.zeros(1, 3, 12, 12), latency=table_of(model, speed=0.5))
        plan = bsdp.select(importance, cost, budget=0.7 * cost.original(kind), kind=kind, ranking="importance")
        assert plan.reached
        assert plan.ranks["0"] == 27 and plan.ranks["2"] <= (limits["2"] or 0)
    assert bsdp.select(importance, cost, ratio=0.05).ranks["0"] < 27  # a share of the bases is a share of the bases


def test_latency_needs_a_table() -> None:
    cost = bsdp.measure_cost(network())
    assert not cost.knows("latency") and cost.knows("params")
    for call in (
        lambda: bsdp.select(scores(cost), cost, budget=10, kind="latency"),
        lambda: cost.original("latency"),
        lambda: cost.layers["0"].deployed(1, kind="latency"),
    ):
        with pytest.raises(ValueError, match=r"latency was not measured: .*measure_latency_table"):
            call()


@pytest.mark.parametrize("ranking", ["importance", "per_cost", "hull"])
@pytest.mark.parametrize("kind", ["params", "macs", "bases", "latency"])
def test_ranks_are_multiples(ranking: str, kind: str) -> None:
    model = network()
    cost = bsdp.measure_cost(model, torch.zeros(1, 3, 12, 12), latency=table_of(model))
    budget = 0.55 * cost.original(kind)
    plan = bsdp.select(scores(cost), cost, budget=budget, kind=kind, ranking=ranking, rank_multiple=8)
    assert plan.reached and cost.deployed(plan.ranks, kind) <= budget and plan.removed > 0
    for name, rank in plan.ranks.items():
        assert rank % 8 == 0 or rank == cost.layers[name].full_rank


def test_multiples_bound_what_can_go() -> None:
    model = network()
    cost = bsdp.measure_cost(model)
    plan = bsdp.select(scores(cost), cost, budget=0, rank_multiple=8, max_layer_ratio=0.99)
    assert not plan.reached and plan.ranks == {"0": 8, "2": 8}
    plan = bsdp.select(scores(cost), cost, budget=0, rank_multiple=8, min_rank=9, max_layer_ratio=0.99)
    assert plan.ranks == {"0": 16, "2": 16}
    plan = bsdp.select(scores(cost), cost, ratio=0.5, rank_multiple=30)
    assert plan.ranks == {"0": 27, "2": 30}  # the first layer has less than one multiple
    with pytest.raises(ValueError, match="`rank_multiple` must be at least 1"):
        bsdp.select(scores(cost), cost, ratio=0.5, rank_multiple=0)


def test_the_weakest_go_first_in_multiples_too() -> None:
    model = network()
    cost = bsdp.measure_cost(model)
    importance = {name: torch.arange(1.0, layer.full_rank + 1) for name, layer in cost.layers.items()}
    plan = bsdp.select(importance, cost, ratio=0.3, rank_multiple=8)
    for name, kept in plan.keep.items():
        assert kept.tolist() == list(range(cost.layers[name].full_rank - plan.ranks[name], cost.layers[name].full_rank))


def test_what_is_deployed_is_what_the_table_says(tmp_path: Path) -> None:
    model, image = make_net("conv", dtype=torch.float32), make_input("conv", dtype=torch.float32)
    original = make_net("conv", dtype=torch.float32)
    bsdp.decompose(model)
    bsdp.measure_cost(model, latency=table_of(model, slow=("conv1",)))
    for pair in bsdp.named_pairs(model).values():
        pair.keep(torch.arange(4))
    folded = bsdp.fold(model)
    assert isinstance(folded.conv1, nn.Conv2d) and isinstance(folded.conv2, nn.Sequential)
    torch.testing.assert_close(folded(image), model.eval()(image))
    assert [layer.kind for layer in bsdp.describe(model).layers] == ["fused", "pair", "plain"]
    bsdp.save(model, tmp_path / "net.safetensors")
    loaded = bsdp.load(original, tmp_path / "net.safetensors")
    assert isinstance(loaded.conv1, nn.Conv2d)
    torch.testing.assert_close(loaded(image), folded(image))


def test_a_rebuilt_model_is_deployed_alike() -> None:
    model, again = network(), network()
    bsdp.measure_cost(model, latency=table_of(model, slow=("0",)))
    structure = bsdp.structure_of(model)
    assert structure["pairs"] == {"0": {"rank": 27, "pair_limit": 0}, "2": {"rank": 32, "pair_limit": 28}}
    bsdp.rebuild(again, structure)
    assert [pair.pair_limit for pair in bsdp.named_pairs(again).values()] == [0, 28]
    structure["pairs"]["0"]["pair_limit"] = "x"
    with pytest.raises(ValueError, match="layer '0' the `pair_limit` 'x'"):
        bsdp.rebuild(again, structure)


def settings(**changes: object) -> bsdp.PruningSettings:
    values = {"target": 0.4, "target_kind": "latency", "rounds": 2, "tolerance": None, "importance": "magnitude"}
    return bsdp.PruningSettings(**{**values, "warmup_epochs": 0, **changes})  # type: ignore[arg-type]


def pruned(model: nn.Module, cost: ModelCost, **changes: object) -> bsdp.IterativePruner:
    pruner = bsdp.IterativePruner(model, settings(**changes), cost)
    for epoch in range(2):
        if pruner.cut_due(epoch):
            pruner.cut(epoch)
    return pruner


def test_a_pruner_keeps_a_budget_of_latency() -> None:
    model = network()
    cost = bsdp.measure_cost(model).with_latency(table_of(model, slow=("0",), fixed=100))
    pruner = pruned(model, cost, mean_to_bias=False)
    record = pruner.record
    kept = [record.kept(entry, "latency") for entry in record.rounds]
    assert kept[0] == 1.0 and kept[2] is not None and kept[2] <= 0.6
    assert pruner.ranks["0"] == 27 and bsdp.named_pairs(model)["0"].pair_limit == 0
    summary = bsdp.summarize(record)
    assert summary["latency_kept"] == kept[2] and summary["reached_target"] is True
    assert summary["rounds"][2]["latency_kept"] == kept[2]
    assert summary["layers"][0]["kind"] == "fused"


def test_a_restored_pruner_goes_by_the_table_it_began_with() -> None:
    model, other = network(), network()
    table = table_of(model, slow=("0",), fixed=100)
    first = bsdp.IterativePruner(model, settings(), bsdp.measure_cost(model, latency=table))
    first.cut(0)
    bsdp.rebuild(other, bsdp.structure_of(model), state_dict=model.state_dict())
    other.load_state_dict(model.state_dict())
    second = bsdp.IterativePruner(other, settings(), bsdp.measure_cost(other, latency=table_of(other, speed=1.1)))
    second.load_state_dict(first.state_dict())
    assert second.cost == first.cost and second.cost.fixed_latency == 100
    assert bsdp.named_pairs(other)["0"].pair_limit == 0
    first.cut(1)
    second.cut(1)
    assert second.record.rounds == first.record.rounds


def test_a_table_can_be_added_to_a_run_that_had_none() -> None:
    model = network()
    first = bsdp.IterativePruner(model, settings(target_kind="params"), bsdp.measure_cost(model))
    cost = bsdp.measure_cost(model, latency=table_of(model))
    second = bsdp.IterativePruner(model, settings(), cost)
    second.load_state_dict(first.state_dict())
    assert second.cost == cost == second.record.cost
    second.set_cost(bsdp.measure_cost(model, torch.zeros(1, 3, 12, 12)))
    assert second.cost.fixed_latency == 1000 and second.cost.fixed_macs is not None


def test_a_budget_below_what_any_rank_reaches_is_refused() -> None:
    model = network()
    cost = bsdp.measure_cost(model, latency=table_of(model, fixed=9216))
    most = 1 - cost.smallest("latency") / cost.original("latency")
    with pytest.raises(ValueError, match=rf"out of reach: with rank 1 .* {most:.1%} of the latency would be gone"):
        bsdp.IterativePruner(model, settings(target=0.9), cost)
    fewer = 1 - cost.smallest("latency", min_rank=16) / cost.original("latency")
    with pytest.raises(ValueError, match=rf"with rank 16 .* {fewer:.1%} of the latency"):
        bsdp.IterativePruner(model, settings(target=0.45, rank_multiple=8, min_rank=9), cost)


@pytest.mark.parametrize("kind", ["latency", "params"])
def test_a_network_whose_pairs_are_all_slower_is_refused(kind: str) -> None:
    model = network()
    cost = bsdp.measure_cost(model, latency=table_of(model, slow=("0", "2")))
    with pytest.raises(ValueError, match=r"no decomposed layer is .* faster as a pair .* Choose another `target_kind`"):
        bsdp.IterativePruner(model, settings(target=0.1, target_kind=kind), cost)
