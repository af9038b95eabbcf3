"""Selection against slow references, and the rules a plan must keep."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bsdp
from bsdp.cost import COST_KINDS, LayerCost, ModelCost
from bsdp.selection import RANKINGS, PruningPlan, select
from tests.helpers.compare import decomposed
from tests.helpers.nets import make_net
from tests.helpers.reference import floor_of, slow_select

CAPS = {0.95: Fraction(95, 100), 0.5: Fraction(1, 2), 0.3: Fraction(3, 10), 0.9: Fraction(9, 10)}


def layer(
    inputs: int, outputs: int, *, groups: int = 1, bias: bool = True, positions: int = 1, rank: int = 0
) -> LayerCost:
    """A pointwise layer's cost."""
    full = min(inputs // groups, outputs // groups)
    return LayerCost(inputs // groups, outputs, groups, rank or full, bias, positions)


def check_plan(plan: PruningPlan, importance: Mapping[str, Tensor], cost: ModelCost) -> None:
    """What holds for every plan."""
    assert plan.keep.keys() == plan.ranks.keys() == plan.ranks_before.keys() == importance.keys()
    for name, keep in plan.keep.items():
        groups, rank = cost.layers[name].groups, plan.ranks_before[name]
        assert rank * groups == len(importance[name])
        assert len(keep) == groups * plan.ranks[name] >= groups
        per_group = keep.view(groups, -1)
        assert torch.equal(per_group // rank, torch.arange(groups)[:, None].expand_as(per_group))
        assert (keep.diff() > 0).all()
    assert plan.removed == sum(plan.ranks_before.values()) - sum(plan.ranks.values())


@dataclass(frozen=True)
class Problem:
    """Some small layers at any rank, with integer scores full of ties, and the other arguments."""

    importance: dict[str, Tensor]
    cost: ModelCost
    kind: str
    budget: int
    min_rank: int
    cap: float


def make_problem(seed: int) -> Problem:
    """Drawn evenly: strategies that prefer simple values would almost never cut anything."""
    rng = random.Random(seed)
    layers, importance = {}, {}
    for name in ("a", "b", "c")[: rng.randint(1, 3)]:
        groups, fan_in, out = rng.choice([1, 1, 2]), rng.randint(1, 8), rng.randint(1, 8)
        full = min(fan_in, out)
        layers[name] = LayerCost(fan_in, groups * out, groups, full, rng.random() < 0.5, rng.randint(0, 9))
        rank = rng.randint(1, full)
        importance[name] = torch.tensor([float(rng.randint(0, 9)) for _ in range(groups * rank)], dtype=torch.float64)
    cost = ModelCost(layers, rng.randint(0, 30), rng.randint(0, 100), rng.random() < 0.5)
    kind = rng.choice(COST_KINDS)
    now = cost.deployed({n: len(v) // layers[n].groups for n, v in importance.items()}, kind)
    least = cost.deployed(dict.fromkeys(layers, 1), kind)
    budget = rng.randint(max(0, min(least, now) - 5), max(least, now))
    return Problem(importance, cost, kind, budget, rng.choice([1, 1, 2]), rng.choice(sorted(CAPS)))


PROBLEMS = st.integers(0, 10**9).map(make_problem)


@settings(max_examples=300)
@given(PROBLEMS, st.sampled_from(RANKINGS))
def test_selection_equals_the_slow_reference(problem: Problem, ranking: str) -> None:
    importance, cost, kind, budget = problem.importance, problem.cost, problem.kind, problem.budget
    plan = select(
        importance,
        cost,
        budget=budget,
        kind=kind,
        ranking=ranking,
        min_rank=problem.min_rank,
        max_layer_ratio=problem.cap,
    )
    check_plan(plan, importance, cost)
    ranks, keep, reached = slow_select(
        importance,
        cost,
        budget=budget,
        kind=kind,
        ranking=ranking,
        min_rank=problem.min_rank,
        cap=CAPS[problem.cap],
    )
    assert plan.ranks == ranks
    assert {name: kept.tolist() for name, kept in plan.keep.items()} == keep
    assert plan.reached is reached is (cost.deployed(plan.ranks, kind) <= budget)


def test_the_problems_are_hard_enough() -> None:
    problems = [make_problem(seed) for seed in range(200)]
    plans = [select(p.importance, p.cost, budget=p.budget, kind=p.kind) for p in problems]
    assert sum(plan.reached and plan.removed > 1 for plan in plans) > 50
    assert sum(not plan.reached for plan in plans) > 10
    assert sum(plan.removed == 0 for plan in plans) > 5


@given(PROBLEMS, st.sampled_from(("importance", "per_cost")))
def test_the_budget_is_undershot_by_less_than_the_last_unit_saved(problem: Problem, ranking: str) -> None:
    cost, kind, budget = problem.cost, problem.kind, problem.budget
    plan = select(problem.importance, cost, budget=budget, kind=kind, ranking=ranking)
    if plan.reached and plan.removed:
        # Giving back the last unit of one of the layers breaks the budget again.
        back = [{**plan.ranks, n: r + 1} for n, r in plan.ranks.items() if r < plan.ranks_before[n]]
        assert any(cost.deployed(ranks, kind) > budget for ranks in back)


@given(PROBLEMS, st.sampled_from(RANKINGS), st.floats(0.01, 0.99))
def test_a_ratio_removes_that_share_of_the_units_rounded_up(problem: Problem, ranking: str, ratio: float) -> None:
    plan = select(problem.importance, problem.cost, ratio=ratio, ranking=ranking)
    check_plan(plan, problem.importance, problem.cost)
    units = sum(plan.ranks_before.values())
    if plan.reached:
        assert units * ratio - 1e-6 <= plan.removed < units * ratio + 1
    else:
        for name, rank in plan.ranks_before.items():
            assert plan.ranks[name] == floor_of(rank, 1, CAPS[0.95], problem.cost.layers[name])


def test_a_ratio_is_not_thrown_off_by_rounding() -> None:
    cost = ModelCost({"a": layer(100, 100), "b": layer(100, 100)})
    importance = {"a": torch.rand(100), "b": torch.rand(100)}
    for percent in range(1, 91):
        assert select(importance, cost, ratio=percent / 100).removed == 2 * percent


def test_ranking_is_global_and_keeps_the_strongest() -> None:
    cost = ModelCost({"a": layer(4, 4), "b": layer(4, 4)})
    importance = {"a": torch.tensor([9.0, 1.0, 8.0, 7.0]), "b": torch.tensor([2.0, 3.0, 6.0, 4.0])}
    plan = select(importance, cost, ratio=0.5)
    assert {n: k.tolist() for n, k in plan.keep.items()} == {"a": [0, 2, 3], "b": [2]}
    assert (plan.ranks, plan.ranks_before, plan.removed, plan.reached) == ({"a": 3, "b": 1}, {"a": 4, "b": 4}, 4, True)


def test_per_cost_prefers_the_unit_that_costs_more() -> None:
    cost = ModelCost({"cheap": layer(8, 8, positions=1), "dear": layer(8, 8, positions=100)}, fixed_macs=0)
    importance = {"cheap": torch.full((8,), 1.0), "dear": torch.full((8,), 2.0)}
    budget = cost.original("macs") * 0.6
    assert select(importance, cost, budget=budget, kind="macs").ranks == {"cheap": 1, "dear": 2}
    assert select(importance, cost, budget=budget, kind="macs", ranking="per_cost").ranks == {"cheap": 8, "dear": 2}


def test_per_cost_takes_the_price_below_break_even_also_in_a_layer_of_rank_two() -> None:
    # Rank 2 of "narrow" is deployed fused: the price of a unit is still that of the pair.
    layers = {"narrow": LayerCost(2, 3, 1, 2, False), "wide": LayerCost(30, 30, 1, 30, False)}
    cost = ModelCost(layers, new_bias=False)
    importance = {"narrow": torch.tensor([3.0, 3.0]), "wide": torch.full((30,), 100.0)}
    plan = select(importance, cost, budget=cost.original() - 1, ranking="per_cost")
    assert plan.ranks == {"narrow": 1, "wide": 30}  # 3 / 5 is less than 100 / 60


def test_hull_leaves_a_layer_whole_or_cuts_it_below_break_even() -> None:
    cost = ModelCost({"a": layer(64, 64), "b": layer(64, 64)})  # break-even at 32
    importance = {"a": torch.arange(64.0), "b": torch.arange(64.0) * 1.5 + 1}
    plan = select(importance, cost, budget=cost.original() - 500, ranking="hull")
    assert plan.ranks["a"] < 32
    assert plan.ranks["b"] == 64
    wasteful = select(importance, cost, budget=cost.original() - 500, ranking="importance")
    assert 32 <= wasteful.ranks["b"] < 64  # cut, and still fused: lost for nothing


def test_local_takes_the_same_share_of_every_layer() -> None:
    cost = ModelCost({"a": layer(20, 20), "b": layer(8, 8), "c": layer(8, 8, groups=2)})
    importance = {"a": torch.zeros(20), "b": torch.ones(8), "c": torch.full((8,), 9.0)}
    plan = select(importance, cost, ratio=0.5, ranking="local")
    assert plan.ranks == {"a": 10, "b": 4, "c": 2}


def test_isomorphic_compares_layers_of_the_same_shape_only() -> None:
    layers = {"a": layer(10, 10), "b": layer(10, 10), "odd": layer(10, 5), "whole": replace(layer(10, 10), whole=True)}
    importance = {"a": torch.arange(10.0), "b": 10 + torch.arange(10.0), "odd": 1e6 + torch.arange(5.0)}
    plan = select({**importance, "whole": torch.zeros(10)}, ModelCost(layers), ratio=0.2, ranking="isomorphic")
    assert plan.ranks == {"a": 4, "b": 10, "odd": 4, "whole": 10}  # 6 of 20, 1 of 5: 7 of 35 units
    assert select({**importance, "whole": torch.zeros(10)}, ModelCost(layers), ratio=0.2).ranks["odd"] == 5


def test_hull_does_not_merge_ties_into_one_large_step() -> None:
    cost = ModelCost({"a": layer(64, 64)})
    plan = select({"a": torch.zeros(64)}, cost, budget=31 * 128 + 64, ranking="hull")
    assert plan.ranks == {"a": 31}


def test_ties_go_to_the_first_layer_and_the_first_basis() -> None:
    cost = ModelCost({"a": layer(4, 4), "b": layer(4, 4)})
    importance = {"a": torch.ones(4), "b": torch.ones(4)}
    plan = select(importance, cost, ratio=0.25)
    assert {n: k.tolist() for n, k in plan.keep.items()} == {"a": [2, 3], "b": [0, 1, 2, 3]}


def test_groups_lose_their_weakest_together_ranked_by_their_sum() -> None:
    cost = ModelCost({"g": layer(8, 8, groups=2), "p": layer(4, 4)})
    importance = {
        "g": torch.tensor([5.0, 0.0, 3.0, 9.0, 1.0, 8.0, 2.0, 7.0]),  # units: 0+1, 3+2, 5+7, 9+8
        "p": torch.tensor([4.0, 6.0, 20.0, 30.0]),
    }
    plan = select(importance, cost, ratio=0.5)  # of 8 units: 1, 4, 5, 6 go
    assert plan.keep["g"].tolist() == [0, 3, 5, 7]
    assert plan.keep["p"].tolist() == [2, 3]
    check_plan(plan, importance, cost)


def test_min_rank_and_cap_hold_and_an_unmet_budget_is_reported() -> None:
    cost = ModelCost({"a": layer(20, 20), "b": layer(4, 4)})
    importance = {"a": torch.rand(20), "b": torch.rand(4)}
    plan = select(importance, cost, budget=0, kind="bases")
    assert plan.ranks == {"a": 1, "b": 1}  # 95 % of 20 is 19, and one always stays
    assert not plan.reached
    assert select(importance, cost, budget=0, kind="bases", min_rank=6).ranks == {"a": 6, "b": 4}
    assert select(importance, cost, budget=0, kind="bases", max_layer_ratio=0.25).ranks == {"a": 15, "b": 3}
    assert select(importance, cost, budget=2, kind="bases").reached


@pytest.mark.parametrize("rank", [1, 2, 3, 19, 20, 21, 40, 60, 100])
def test_the_cap_is_not_thrown_off_by_rounding(rank: int) -> None:
    cost = ModelCost({"a": layer(rank, rank)})
    for percent in (5, 30, 50, 70, 90, 95):
        plan = select({"a": torch.rand(rank)}, cost, budget=0, kind="bases", max_layer_ratio=percent / 100)
        assert plan.removed == min(rank * percent // 100, rank - 1)


def test_a_budget_already_met_gives_the_empty_plan() -> None:
    cost = ModelCost({"a": layer(4, 4)}, fixed_params=7)
    for ranking in RANKINGS:
        plan = select({"a": torch.rand(4)}, cost, budget=cost.original(), ranking=ranking)
        assert plan.removed == 0
        assert plan.reached
        assert plan.keep["a"].tolist() == [0, 1, 2, 3]


def test_the_fixed_part_counts_against_the_budget() -> None:
    cost = ModelCost({"a": layer(64, 64)}, fixed_params=10_000)
    plan = select({"a": torch.rand(64)}, cost, budget=10_000 + 64 + 128 * 20)
    assert plan.ranks == {"a": 20}
    assert not select({"a": torch.rand(64)}, cost, budget=9_999).reached


def test_a_layer_that_is_never_called_loses_nothing_for_macs_per_cost() -> None:
    cost = ModelCost({"idle": layer(8, 8, positions=0), "used": layer(8, 8, positions=4)}, fixed_macs=0)
    importance = {"idle": torch.full((8,), 0.1), "used": torch.ones(8)}
    plan = select(importance, cost, budget=4 * 16 * 2, kind="macs", ranking="per_cost")
    assert plan.ranks == {"idle": 8, "used": 2}


def test_scores_of_a_pruned_model_are_selected_again_at_its_present_ranks() -> None:
    net = decomposed(make_net("grouped"))
    cost = bsdp.measure_cost(net)
    for target in (0.9, 0.7, 0.5):
        importance = bsdp.ScoreAccumulator(bsdp.named_pairs(net), importance="magnitude").compute()
        plan = select(importance, cost, budget=target * cost.original("bases"), kind="bases")
        bsdp.prune(net, plan)
        assert {n: p.rank for n, p in bsdp.named_pairs(net).items()} == plan.ranks
        assert cost.deployed(plan.ranks, "bases") <= target * cost.original("bases")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "budget": 3}, "either `ratio` or `budget`"),
        ({}, "either `ratio` or `budget`"),
        ({"ratio": 1.0}, "`ratio` is a share"),
        ({"ratio": 0}, "`ratio` is a share"),
        ({"budget": -1}, "`budget` must be at least 0"),
        ({"budget": float("nan")}, "`budget` must be at least 0"),
        ({"budget": 1, "kind": "flops"}, "`kind` must be one of"),
        ({"ratio": 0.5, "kind": "flops"}, "`kind` must be one of"),
        ({"budget": 1, "kind": "macs"}, "MACs were not measured"),
        ({"ratio": 0.5, "ranking": "sum"}, "`ranking` must be one of 'importance', 'per_cost', .*, got 'sum'"),
        ({"ratio": 0.5, "min_rank": 0}, "`min_rank` must be at least 1"),
        ({"ratio": 0.5, "max_layer_ratio": 1.5}, "`max_layer_ratio` is a share"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(options: dict[str, object], message: str) -> None:
    cost = ModelCost({"a": LayerCost(4, 4, 1, 4, True)})
    with pytest.raises(ValueError, match=message):
        select({"a": torch.rand(4)}, cost, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), "layer 'a' must be finite and non-negative"),
        (torch.tensor([1.0, float("inf"), 1.0, 1.0]), "layer 'a' must be finite and non-negative"),
        (torch.tensor([1.0, -1e-9, 1.0, 1.0]), "layer 'a' must be finite and non-negative"),
        (torch.rand(3), r"layer 'a' must be a vector of 2 groups .* rank of at most 2, got the shape \(3,\)"),
        (torch.rand(6), "layer 'a' must be a vector"),
        (torch.rand(0), "layer 'a' must be a vector"),
        (torch.rand(2, 2), "layer 'a' must be a vector"),
    ],
    ids=["nan", "inf", "negative", "odd", "beyond_full_rank", "empty", "matrix"],
)
def test_scores_that_are_not_allowed_are_refused(scores: Tensor, message: str) -> None:
    cost = ModelCost({"a": layer(4, 4, groups=2)})
    with pytest.raises(ValueError, match=message):
        select({"a": scores}, cost, ratio=0.5)


def test_scores_and_cost_must_be_of_the_same_layers() -> None:
    cost = ModelCost({"a": layer(4, 4), "b": layer(4, 4)})
    with pytest.raises(ValueError, match="of the same layers; only one of them has 'b'"):
        select({"a": torch.rand(4)}, cost, ratio=0.5)
    with pytest.raises(ValueError, match="of the same layers; only one of them has 'c'"):
        select({"a": torch.rand(4), "b": torch.rand(4), "c": torch.rand(4)}, cost, ratio=0.5)


def test_layers_that_are_never_called_keep_all_their_bases() -> None:
    called = LayerCost(fan_in=16, out_channels=16, groups=1, full_rank=16, bias=False, positions=4)
    read = replace(called, positions=0)
    cost = ModelCost({"called": called, "read": read}, fixed_params=0, fixed_macs=0)
    plan = select({"called": torch.rand(16), "read": torch.zeros(16)}, cost, ratio=0.4)
    assert plan.ranks["read"] == 16
    assert plan.ranks["called"] < 16
