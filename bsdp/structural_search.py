"""How much can be removed from each layer, found by evaluating and nothing else (Xie et al., arXiv 2108.13728)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bsdp._checks import check_at_least, check_choice


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        removed: Units to remove per layer.
        value: The value with these removed.
        evaluations: How often something was evaluated.
    """

    removed: dict[str, int]
    value: float
    evaluations: int


def binary_search_with_step_constraint(
    evaluate: Callable[[Mapping[str, int]], float],
    layers: Mapping[str, int],
    *,
    reference: float,
    tolerance: float,
    mode: str = "max",
) -> SearchResult:
    """Search, layer by layer, the largest removal that a layer's share of the tolerance allows.

    CODE (ZhouyangXie/pseudopruner): the tolerance is divided equally over the layers; in the order of the network,
    layer i of n may bring the value down to ``reference - tolerance * i / n``, with everything before it already
    removed; a binary search finds the highest sparsity that stays there. What a layer leaves of its share is the next
    one's.
    OURS: sparsities are whole numbers of units, and the highest one is tried first. Nothing here knows what a unit is:
    with ``{layer: full_rank - 1}`` it allocates ranks without any training.

    Args:
        evaluate: Gives the value of the model with so many units removed per layer; layers not named lose none.
        layers: Units that each may lose at most, in the order of the network.
        reference: The value with nothing removed.
        tolerance: How far below it the value may end.
        mode: ``"max"`` if a higher value is better, else ``"min"``.

    Returns:
        The removal that was found; nothing where no trial was good enough.

    Example:
        >>> accuracy = lambda removed: 0.9 - 0.01 * removed["a"] - 0.002 * removed["b"]
        >>> found = binary_search_with_step_constraint(accuracy, {"a": 8, "b": 8}, reference=0.9, tolerance=0.03)
        >>> found.removed
        {'a': 1, 'b': 8}
    """
    check_at_least("tolerance", tolerance, 0)
    check_choice("mode", mode, ("max", "min"))
    sign = 1.0 if mode == "max" else -1.0
    removed: dict[str, int] = dict.fromkeys(layers, 0)
    value, evaluations = reference, 0
    for i, (name, most) in enumerate(layers.items(), start=1):
        limit = sign * reference - tolerance * i / len(layers) - 1e-12
        good, bad, trial = 0, most + 1, most
        while bad - good > 1:
            result = evaluate({**removed, name: trial})
            evaluations += 1
            if sign * result >= limit:
                good, value = trial, result
            else:
                bad = trial
            trial = (good + bad) // 2
        removed[name] = good
    return SearchResult(removed, value, evaluations)
