"""Choosing the source images that are most useful for a target: conditional filtering, as functions of features.

Source of the idea: Chakraborty, Uzkent, Ayush, Tanmay, Sheehan, Ermon: "Efficient Conditional Pre-training for Transfer
Learning", arXiv 2011.10231. No code of the authors is public.

- PUBLISHED (abstract): the pretraining set is filtered for the target before the pretraining, which is done at a lower
  resolution; the cost falls a lot, and a network that is already pretrained gains 1 to 3 % when it is tuned on the
  filtered images.
- RECALLED, not checked against the text: two filters. Clustering: k-means on the target's features, and a source image
  counts by its (nearest or mean) distance to the centres. Domain classifier: a light binary classifier, target against
  a random part of the source; the highest probabilities stay. Features come from a small network; about 6 and 12 % of
  the source are kept.
- RECONSTRUCTION, ours: pixels at a low resolution where no network is given, logistic regression on standardised
  features as the classifier, with as many source as target images, log-odds instead of probabilities (the same order,
  without ties at 1), ties kept in the order of the source.

Everywhere features are ``[n, d]``, scores ``[n]`` in float64, higher for a more useful image, and the score of an image
does not depend on where it, or any other, stands in its set.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Distance = Literal["nearest", "mean"]


def low_resolution_features(images: Tensor, *, size: int) -> Tensor:
    """Describe images by their pixels, averaged to a low resolution.

    Args:
        images: ``[n, channels, height, width]``.
        size: Height and width to average to, at most those of the images.

    Returns:
        ``[n, channels * size * size]``, float32.

    Example:
        >>> low_resolution_features(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]), size=1)
        tensor([[4.]])
    """
    if images.ndim != 4:
        raise ValueError(f"`images` must be [n, channels, height, width], got the shape {list(images.shape)}.")
    if not 1 <= size <= min(images.shape[-2:]):
        raise ValueError(
            f"`size` must be at least 1 and at most the height and width of the images, got {size} for images of "
            f"{images.shape[-2]}x{images.shape[-1]}. Lower it, or give larger images."
        )
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), size).flatten(1)


def cluster_scores(
    source: Tensor, target: Tensor, *, clusters: int, distance: Distance = "nearest", seed: int = 0
) -> Tensor:
    """Score source images by their closeness to the clusters of the target.

    Args:
        source: Features of the source images, ``[n, d]``.
        target: Features of the target images, ``[m, d]``.
        clusters: Centres of the k-means on `target`, at most its number of distinct rows.
        distance: What counts: the distance to the ``nearest`` centre, or the ``mean`` distance to all of them.
        seed: Seed of the first centres.

    Returns:
        The negative euclidean distances, ``[n]``.

    Raises:
        ValueError: If features do not fit each other or are not finite, or `clusters` is too high.

    Example:
        >>> target = torch.tensor([[0.0], [0.2], [9.8], [10.0]])
        >>> cluster_scores(torch.tensor([[5.0], [9.9]]), target, clusters=2).round(decimals=1)
        tensor([-4.9, -0.0], dtype=torch.float64)
    """
    from sklearn.cluster import KMeans

    if distance not in ("nearest", "mean"):
        raise ValueError(f"`distance` must be 'nearest' or 'mean', got {distance!r}.")
    rows, order, wanted = _arrays(source, target)
    distinct = len(np.unique(wanted, axis=0))
    if not 1 <= clusters <= distinct:
        raise ValueError(
            f"`clusters` must be at least 1 and at most {distinct}, the distinct images of the target, got {clusters}. "
            "Lower it, or give more target images."
        )
    centres = KMeans(clusters, n_init=4, random_state=seed).fit(wanted)
    distances = centres.transform(rows)
    return _in_given_order(-(distances.min(1) if distance == "nearest" else distances.mean(1)), order)


def classifier_scores(source: Tensor, target: Tensor, *, seed: int = 0) -> Tensor:
    """Score source images by how much a classifier takes them for target images.

    The classifier learns to tell all target images from as many source images, chosen at random (all, if there are
    fewer; the two sides always weigh the same).

    Args:
        source: Features of the source images, ``[n, d]``.
        target: Features of the target images, ``[m, d]``.
        seed: Seed of the choice.

    Returns:
        Log-odds of being a target image, ``[n]``.

    Raises:
        ValueError: If features do not fit each other or are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    rows, order, wanted = _arrays(source, target)
    sample = np.random.default_rng(seed).permutation(len(rows))[: len(wanted)]
    examples = np.concatenate([rows[np.sort(sample)], wanted])
    is_target = np.arange(len(examples)) >= len(sample)
    mean, std = examples.mean(0), examples.std(0)
    std[std == 0.0] = 1.0
    classifier = LogisticRegression(max_iter=5000, class_weight="balanced")
    classifier.fit((examples - mean) / std, is_target)
    return _in_given_order(classifier.decision_function((rows - mean) / std), order)


def random_scores(count: int, *, seed: int = 0) -> Tensor:
    """Score images at random: the control that every filter must beat.

    Args:
        count: Number of images.
        seed: Seed of the scores.
    """
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def highest(scores: Tensor, *, count: int) -> Tensor:
    """Give the places of the highest scores; of equal ones the first.

    Args:
        scores: ``[n]``.
        count: How many, at most `n`.

    Returns:
        Ascending indices, ``[count]``.

    Raises:
        ValueError: If there are fewer scores, or one is NaN.

    Example:
        >>> highest(torch.tensor([0.1, 0.9, 0.5, 0.5]), count=2)
        tensor([1, 2])
    """
    if not 1 <= count <= len(scores):
        raise ValueError(f"`count` must be at least 1 and at most {len(scores)}, the number of scores, got {count}.")
    if scores.isnan().any():
        raise ValueError("`scores` holds NaN: images without a score cannot be ranked.")
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _arrays(source: Tensor, target: Tensor) -> tuple[Any, Any, Any]:
    """Check the features, and sort both sets by their values, so that the order they came in is forgotten.

    Returns:
        The source's rows, their places in `source`, and the target's rows.
    """
    for name, features in (("source", source), ("target", target)):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"`{name}` must be [images, features] with at least 1 image, got {list(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError(f"`{name}` holds features that are NaN or infinite; check the images and the network.")
    if source.shape[1] != target.shape[1]:
        raise ValueError(
            f"`source` and `target` must have the same features, got {source.shape[1]} and {target.shape[1]}: give "
            "both sets the same number of channels, and features of the same kind and resolution."
        )
    rows, wanted = (features.detach().cpu().double().numpy() for features in (source, target))
    order = _canonical_order(rows)
    return rows[order], order, wanted[_canonical_order(wanted)]


def _canonical_order(rows: Any) -> Any:
    """Sort rows by their bytes; any fixed order does, and this one takes no time."""
    whole = np.ascontiguousarray(rows)
    return whole.view(f"V{whole.shape[1] * whole.itemsize}").ravel().argsort(kind="stable")


def _in_given_order(values: Any, order: Any) -> Tensor:
    scores = torch.empty(len(order), dtype=torch.float64)
    scores[torch.from_numpy(order)] = torch.from_numpy(np.asarray(values, dtype=np.float64))
    return scores
