"""The filters on features whose right answer is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bsdp.datamodules.source_selection import (
    classifier_scores,
    cluster_scores,
    highest,
    low_resolution_features,
    random_scores,
)

Filter = Callable[[Tensor, Tensor], Tensor]
FILTERS: dict[str, Filter] = {
    "nearest": partial(cluster_scores, clusters=3),
    "mean": partial(cluster_scores, clusters=3, distance="mean"),
    "classifier": classifier_scores,
}
every_filter = pytest.mark.parametrize("score", FILTERS.values(), ids=FILTERS.keys())


def domain(count: int, *, centre: float, seed: int) -> Tensor:
    """Rows of 12 features around a centre."""
    return centre + torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


@every_filter
def test_of_two_domains_that_of_the_target_is_picked(score: Filter) -> None:
    like, unlike = domain(40, centre=2.0, seed=0), domain(40, centre=-2.0, seed=1)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    scores = score(torch.cat([like, unlike])[order], domain(30, centre=2.0, seed=3))
    assert (order[highest(scores, count=40)] < 40).all()
    assert not (order[highest(-scores, count=40)] < 40).any()  # and the scores of the other domain are the lowest


@every_filter
def test_scores_do_not_depend_on_any_order(score: Filter) -> None:
    source, target = domain(50, centre=0.0, seed=0), domain(20, centre=0.5, seed=1)
    source[7] = source[3]
    expected = score(source, target)
    for seed in (2, 3):
        mixed, other = (
            torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)) for rows in (source, target)
        )
        torch.testing.assert_close(score(source[mixed], target[other]), expected[mixed], rtol=0, atol=1e-12)
    assert expected.shape == (50,)
    assert len(expected.unique()) > 40


def test_nearest_counts_one_centre_and_mean_all_of_them() -> None:
    target = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    source = torch.tensor([[0.0], [5.0], [7.0]])
    near = cluster_scores(source, target, clusters=2)
    mean = cluster_scores(source, target, clusters=2, distance="mean")
    torch.testing.assert_close(near, torch.tensor([0.0, -5.0, -3.0]).double())
    torch.testing.assert_close(mean, torch.tensor([-5.0, -5.0, -5.0]).double())


def test_one_cluster_is_the_distance_to_the_mean() -> None:
    source, target = domain(9, centre=0.0, seed=0), domain(5, centre=1.0, seed=1)
    expected = -(source.double() - target.double().mean(0)).norm(dim=1)
    torch.testing.assert_close(cluster_scores(source, target, clusters=1), expected, rtol=1e-9, atol=1e-9)


def test_classifier_weighs_both_sides_alike_and_bears_a_feature_that_never_changes() -> None:
    source = domain(6, centre=0.0, seed=0)
    source[:, 0] = 1.0
    scores = classifier_scores(source, source.repeat(10, 1))
    torch.testing.assert_close(scores, torch.zeros(6).double(), rtol=0, atol=1e-3)  # log-odds of one half


@every_filter
def test_seed_alone_decides(score: Filter) -> None:
    source, target = domain(50, centre=0.0, seed=0), domain(20, centre=0.5, seed=1)
    torch.manual_seed(5)
    first, state = score(source, target), torch.get_rng_state()
    torch.manual_seed(6)
    assert torch.equal(score(source, target), first)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_scores_are_seeded_and_never_equal() -> None:
    assert torch.equal(random_scores(99, seed=1), random_scores(99, seed=1))
    assert not torch.equal(random_scores(99, seed=1), random_scores(99, seed=2))
    assert len(random_scores(99).unique()) == 99


def test_highest_keeps_the_order_and_the_first_of_equals() -> None:
    assert highest(torch.tensor([1.0, 3.0, 3.0, 3.0, 5.0]), count=3).tolist() == [1, 2, 4]
    assert highest(torch.tensor([1.0, 2.0]), count=2).tolist() == [0, 1]


def test_low_resolution_features_are_the_means_of_squares() -> None:
    images = torch.arange(32.0).view(1, 2, 4, 4)
    features = low_resolution_features(images, size=2)
    assert features.tolist() == [[2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]]
    assert torch.equal(low_resolution_features(images, size=4), images.flatten(1))


ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "clusters": (lambda: cluster_scores(ROWS, ROWS, clusters=7), "`clusters` must be .* at most 6, .* got 7. Lower it"),
    "equal rows": (lambda: cluster_scores(ROWS, ROWS[:1].repeat(4, 1), clusters=2), "`clusters` must be .* at most 1"),
    "no cluster": (lambda: cluster_scores(ROWS, ROWS, clusters=0), "`clusters` must be at least 1"),
    "distance": (lambda: cluster_scores(ROWS, ROWS, clusters=1, distance="far"), "`distance` must .* got 'far'"),  # type: ignore[arg-type]
    "width": (lambda: classifier_scores(ROWS, ROWS[:, :2]), "the same features, got 3 and 2: give both sets the same"),
    "empty": (lambda: classifier_scores(ROWS, ROWS[:0]), r"`target` must be .* at least 1 image, got \[0, 3\]"),
    "NaN": (lambda: classifier_scores(ROWS * torch.nan, ROWS), "`source` holds features that are NaN"),
    "count": (lambda: highest(ROWS[:, 0], count=7), "`count` must be .* at most 6, the number of scores, got 7"),
    "no count": (lambda: highest(ROWS[:, 0], count=0), "`count` must be at least 1"),
    "NaN score": (lambda: highest(ROWS[:, 0] * torch.nan, count=1), "`scores` holds NaN"),
    "size": (lambda: low_resolution_features(torch.zeros(1, 3, 8, 6), size=7), "`size` must be .* 7 for .* 8x6"),
    "no batch": (lambda: low_resolution_features(torch.zeros(3, 8, 8), size=2), r"`images` must be .* \[3, 8, 8\]"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
