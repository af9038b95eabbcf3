"""Budgets and settings of the selection: less budget never leaves more, and odd settings are refused by name."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsdp.cost import COST_KINDS
from bsdp.pruner import PruningSettings
from bsdp.selection import RANKINGS, select
from tests.bsdp.test_selection import PROBLEMS, Problem, check_plan

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**30, -(10**30), math.nan, math.inf, -math.inf, 1e-300, "3", "params", "hull", ""]),
    st.floats(-0.5, 1.5),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=2),
)


@settings(max_examples=100)
@given(PROBLEMS, st.sampled_from(("importance", "per_cost")), st.integers(1, 40))
def test_a_smaller_budget_keeps_a_subset(problem: Problem, ranking: str, less: int) -> None:
    importance, cost, kind = problem.importance, problem.cost, problem.kind
    larger = select(importance, cost, budget=problem.budget, kind=kind, ranking=ranking)
    smaller = select(importance, cost, budget=max(0, problem.budget - less), kind=kind, ranking=ranking)
    for name, kept in smaller.keep.items():
        assert set(kept.tolist()) <= set(larger.keep[name].tolist())
    assert larger.reached or not smaller.reached


@settings(max_examples=150)
@given(
    PROBLEMS,
    st.sampled_from(("ratio", "budget", "kind", "ranking", "min_rank", "max_layer_ratio")),
    ODD,
)
def test_odd_settings_are_refused_by_name_or_give_a_plan(problem: Problem, name: str, value: Any) -> None:
    options: dict[str, Any] = {"budget": float(problem.budget), "kind": problem.kind, "ranking": "importance"}
    if name == "ratio":
        del options["budget"]
    options[name] = value
    try:
        plan = select(problem.importance, problem.cost, **options)
    except ValueError as error:
        assert f"`{name}`" in str(error)
        return
    allowed = {
        "ratio": lambda v: type(v) in (int, float) and 0 < v < 1,
        "budget": lambda v: type(v) in (int, float) and v >= 0,
        "kind": lambda v: v in COST_KINDS,
        "ranking": lambda v: v in RANKINGS,
        "min_rank": lambda v: type(v) is int and v >= 1,
        "max_layer_ratio": lambda v: type(v) is float and 0 < v < 1,
    }
    assert allowed[name](value), f"{name}={value!r} was accepted"
    check_plan(plan, problem.importance, problem.cost)


@given(PROBLEMS, st.sampled_from([math.nan, math.inf, -1.0, -math.inf]), st.integers(0, 100))
def test_one_odd_score_is_refused(problem: Problem, score: float, place: int) -> None:
    name = sorted(problem.importance)[place % len(problem.importance)]
    scores = {key: value.clone() for key, value in problem.importance.items()}
    scores[name][place % len(scores[name])] = score
    try:
        select(scores, problem.cost, budget=problem.budget, kind=problem.kind)
    except ValueError as error:
        assert f"`importance` of layer {name!r}" in str(error)
    else:
        raise AssertionError("it was accepted")
    assert torch.isfinite(problem.importance[name]).all()


WHOLE = ("rounds", "epochs_per_round", "patience_rounds", "min_rank")


@settings(max_examples=100)
@given(st.sampled_from([*WHOLE, "target", "max_layer_ratio", "schedule", "mode", "importance"]), ODD)
def test_odd_pruning_settings_are_refused_by_name(name: str, value: Any) -> None:
    try:
        PruningSettings(**{name: value})
    except ValueError as error:
        assert f"`{name}`" in str(error)
    else:
        right = type(value) is int and value >= 1 if name in WHOLE else type(value) in (int, float, str)
        assert right, f"{name}={value!r} was accepted"
