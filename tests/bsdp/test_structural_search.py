"""Binary search with a step constraint, on functions that are known."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bsdp.structural_search import binary_search_with_step_constraint

COSTS = {"a": 0.01, "b": 0.002, "c": 0.0, "d": 0.004}


def accuracy(removed: Mapping[str, int]) -> float:
    return 0.9 - sum(COSTS[name] * count for name, count in removed.items())


def slow(layers: dict[str, int], tolerance: float) -> dict[str, int]:
    """Each layer takes one unit after another while the running threshold holds."""
    removed: dict[str, int] = dict.fromkeys(layers, 0)
    for i, (name, most) in enumerate(layers.items(), start=1):
        floor = 0.9 - tolerance * i / len(layers)
        while removed[name] < most and accuracy({**removed, name: removed[name] + 1}) >= floor - 1e-12:
            removed[name] += 1
    return removed


@pytest.mark.parametrize("tolerance", [0.0, 0.003, 0.02, 0.05, 1.0])
def test_finds_the_most_that_every_step_allows(tolerance: float) -> None:
    layers = {"a": 20, "b": 7, "c": 64, "d": 13}
    found = binary_search_with_step_constraint(accuracy, layers, reference=0.9, tolerance=tolerance)
    assert found.removed == slow(layers, tolerance)
    assert found.value == pytest.approx(accuracy(found.removed))
    assert found.evaluations <= sum(most.bit_length() + 1 for most in layers.values())


def test_what_a_layer_leaves_is_the_next_ones() -> None:
    found = binary_search_with_step_constraint(accuracy, {"c": 5, "a": 9}, reference=0.9, tolerance=0.04)
    assert found.removed == {"c": 5, "a": 4}


def test_lower_is_better() -> None:
    def loss(removed: Mapping[str, int]) -> float:
        return 1.0 - accuracy(removed)

    found = binary_search_with_step_constraint(loss, {"a": 9, "b": 9}, reference=0.1, tolerance=0.02, mode="min")
    assert found.removed == {"a": 1, "b": 5}


def test_layers_that_may_lose_nothing_are_not_evaluated() -> None:
    found = binary_search_with_step_constraint(accuracy, {"a": 0}, reference=0.9, tolerance=1.0)
    assert (found.removed, found.evaluations, found.value) == ({"a": 0}, 0, 0.9)


def test_nothing_is_better_than_too_much() -> None:
    found = binary_search_with_step_constraint(lambda _: float("nan"), {"a": 4}, reference=0.9, tolerance=0.5)
    assert found.removed == {"a": 0}
    assert found.value == 0.9


@pytest.mark.parametrize(("options", "named"), [({"tolerance": -0.1}, "tolerance"), ({"mode": "best"}, "mode")])
def test_refusals(options: dict[str, float | str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        binary_search_with_step_constraint(accuracy, {}, **{"reference": 0.9, "tolerance": 0.1, **options})
