"""Class-stratified choices of training images.

Everywhere ``labels`` is ``[n]`` (int64) and an index tensor is ascending, so that a choice depends on the seed alone.
"""

import torch
from torch import Tensor


def stratified_split(labels: Tensor, *, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut a share of every class off.

    Args:
        labels: Class indices, shape ``[n]``.
        fraction: Share of each class to cut off, in (0, 1). A class of two or more images keeps at least one image
            on both sides; a class of one image stays whole.
        seed: Seed of the choice; the same seed always gives the same two parts.

    Returns:
        The indices that stay and the indices that were cut off, both ascending.

    Example:
        >>> stay, cut = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), fraction=0.5, seed=0)
        >>> len(stay), len(cut)
        (3, 3)
    """
    cut = []
    for members in _shuffled_classes(labels, seed=seed):
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        cut.append(members[:count])
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.cat(cut)] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def take_per_class(labels: Tensor, *, count: int, seed: int) -> Tensor:
    """Choose the same number of images of every class.

    Args:
        labels: Class indices, shape ``[n]``.
        count: Images to take of each class that occurs in `labels`.
        seed: Seed of the choice. The choice for a smaller count is part of the choice for a larger one.

    Returns:
        Ascending indices, ``count`` for each class.

    Raises:
        ValueError: If a class holds fewer than `count` images.

    Example:
        >>> take_per_class(torch.tensor([0, 0, 1, 1, 1]), count=2, seed=0).shape
        torch.Size([4])
    """
    classes = _shuffled_classes(labels, seed=seed)
    smallest = min(len(members) for members in classes)
    if count > smallest:
        raise ValueError(
            f"`samples_per_class` must be at most {smallest}, the training images of the smallest class after the "
            f"validation cut, got {count}. Lower it, or lower `val_fraction`."
        )
    return torch.cat([members[:count] for members in classes]).sort().values


def _shuffled_classes(labels: Tensor, *, seed: int) -> list[Tensor]:
    """Give the indices of each class in a seeded random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return [order[labels[order] == label] for label in sorted(set(labels.tolist()))]
