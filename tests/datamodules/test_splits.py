import pytest
import torch

from bsdp.datamodules.splits import stratified_split, take_per_class


def labels_of(counts: list[int]) -> torch.Tensor:
    """Give shuffled labels with so many of each class."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize("counts", [[10, 10], [50, 7, 3], [2, 200]])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_parts_are_disjoint_and_complete(counts: list[int], fraction: float) -> None:
    labels = labels_of(counts)
    stay, cut = stratified_split(labels, fraction=fraction, seed=0)
    assert sorted([*stay.tolist(), *cut.tolist()]) == list(range(len(labels)))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_every_class_is_cut_by_the_fraction(fraction: float) -> None:
    labels = labels_of([50, 7, 3])
    _, cut = stratified_split(labels, fraction=fraction, seed=0)
    expected = [min(max(round(n * fraction), 1), n - 1) for n in (50, 7, 3)]
    assert labels[cut].bincount().tolist() == expected


def test_split_depends_on_the_seed_only() -> None:
    labels = labels_of([50, 50])
    first, second, other = (stratified_split(labels, fraction=0.2, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_split_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    stratified_split(labels_of([5, 5]), fraction=0.2, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_class_of_one_image_stays_whole() -> None:
    stay, cut = stratified_split(torch.tensor([0, 1, 1]), fraction=0.5, seed=0)
    assert 0 in stay.tolist()
    assert len(cut) == 1


def test_takes_the_count_of_every_class() -> None:
    labels = labels_of([50, 7, 9])
    taken = take_per_class(labels, count=7, seed=0)
    assert labels[taken].bincount().tolist() == [7, 7, 7]
    assert taken.tolist() == sorted(set(taken.tolist()))


def test_larger_count_holds_the_smaller_choice() -> None:
    labels = labels_of([20, 20])
    few, more = (set(take_per_class(labels, count=count, seed=3).tolist()) for count in (4, 11))
    assert few < more
    assert few != set(take_per_class(labels, count=4, seed=4).tolist())


def test_refuses_more_than_the_smallest_class_has() -> None:
    with pytest.raises(ValueError, match=r"`samples_per_class` must be at most 7.*got 8"):
        take_per_class(labels_of([50, 7]), count=8, seed=0)
