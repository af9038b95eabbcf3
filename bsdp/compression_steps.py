"""The steps of `bsdp.compress`: scoring the bases of a decomposed copy, and shortening its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from bsdp.factorize import factorize
from bsdp.feature_statistics import FeatureStatistics
from bsdp.joint_moments import JointMoments, Survey, collect_joint_moments, survey_outputs
from bsdp.layers import BasisPair, column_matrix, named_pairs
from bsdp.least_squares import LowRank, reduced_rank_layer, refitted_layer
from bsdp.output_scores import example_scores
from bsdp.plain_layers import matrix_of
from bsdp.probing import as_inputs, evaluating
from bsdp.pruning import prune
from bsdp.selection import PruningPlan

ALLOCATIONS = ("kl", "taylor", "energy")
Batches = Callable[[], Iterable[tuple[tuple[Tensor, ...], Tensor | None]]]


def basis_scores(
    model: nn.Module, batches: Batches, *, metric: str, allocation: str, seed: int
) -> tuple[Survey, dict[str, Tensor]]:
    """Give the pairs of a model the bases of a metric, in place, and score them.

    Args:
        model: A decomposed model; its function does not change.
        batches: Gives inputs and labels.
        metric: ``"euclidean"`` or ``"activation"``; here the second moment is about the mean, which a bias can hold.
        allocation: One of `ALLOCATIONS`.
        seed: Of random signs.

    Returns:
        The moments of the pairs' outputs, and per pair the scores of its bases, ``[groups * rank]``.
    """
    pairs = named_pairs(model)
    survey = survey_outputs(model, pairs, (inputs for inputs, _ in batches()))
    for name, moments in survey.moments.items():
        try:
            _rebase(pairs[name], metric, moments)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
    if allocation == "energy":
        return survey, {name: _energy(pair, survey.moments.get(name)) for name, pair in pairs.items()}
    labelled = allocation == "taylor"
    given = ((inputs, labels if labelled else None) for inputs, labels in batches())
    return survey, example_scores(model, pairs, given, seed=seed)


def _rebase(pair: BasisPair, metric: str, moments: JointMoments) -> None:
    moment = torch.block_diag(*moments.covariance)  # type: ignore[no-untyped-call]
    factors = factorize(pair.product.detach(), metric=metric, moment=moment)
    rank = pair.rank  # of a pair that was cut before, the product has no more
    parts = (factors.basis[:, :rank], factors.coefficients[:, :, :rank], factors.sigma[:, :rank])
    pair.set_factors(*parts)


def _energy(pair: BasisPair, moments: JointMoments | None) -> Tensor:
    """Share of the variance of the layer's outputs that is lost without a basis."""
    if moments is None:
        return torch.zeros(pair.groups * pair.rank, dtype=torch.float64)
    columns = column_matrix(pair).double()
    read = torch.linalg.pinv(columns)
    variances = (read @ moments.covariance @ read.mT).diagonal(dim1=1, dim2=2).clamp_min(0.0)
    lost = variances * columns.square().sum(1)
    total = moments.covariance.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-300)
    shares: Tensor = (lost / total).flatten()
    return shares


def warn_of_few_positions(pairs: Mapping[str, BasisPair], survey: Survey) -> None:
    """Warn of layers that were seen at fewer positions than they have outputs: the ridge then decides much."""
    few = [name for name, found in survey.moments.items() if found.count < pairs[name].out_per_group]
    if few:
        found = survey.moments[few[0]].count
        warnings.warn(
            f"{len(few)} layers were seen at fewer positions than they have outputs ({few[0]!r}: {found} for "
            f"{pairs[few[0]].out_per_group}), so their old weights count for more than the data: give more images.",
            stacklevel=3,
        )


def truncate(model: nn.Module, plan: PruningPlan, batches: Batches) -> None:
    """Remove what a plan does not keep; only the mean of what goes moves into biases."""
    statistics = FeatureStatistics(named_pairs(model))
    with statistics.collecting(), evaluating(model):
        for inputs, _ in batches():
            model(*as_inputs(inputs))
    prune(model, plan, means=statistics.means())


def shorten(
    original: nn.Module,
    model: nn.Module,
    plan: PruningPlan,
    survey: Survey,
    batches: Batches,
    *,
    metric: str,
    passes: int,
    say: Callable[[str], None],
) -> None:
    """Cut pairs to the ranks of a plan, in place and in the order of their calls, and fit each to the original.

    Args:
        original: The network before, which gives the targets.
        model: Its decomposed copy.
        plan: Ranks and, for ``"euclidean"``, bases to keep.
        survey: From `basis_scores`.
        batches: Gives inputs and labels.
        metric: ``"activation"`` also chooses the bases anew, for the inputs that the layer now gets.
        passes: Groups of layers, one pass over the data each.
        say: Told what is done.
    """
    pairs = named_pairs(model)
    names = list(survey.moments)  # in the order of the calls; the others are never called
    size = -(-len(names) // min(passes, len(names)))
    for first in range(0, len(names), size):
        part = names[first : first + size]
        say(f"shortening layers {first + 1} to {first + len(part)} of {len(names)}")
        inputs = (inputs for inputs, _ in batches())
        moments = collect_joint_moments(original, model, part, inputs, calls=survey.calls)
        for name in part:
            if name in moments:
                _fit(name, pairs[name], moments[name], plan, metric)


def _fit(name: str, pair: BasisPair, moments: JointMoments, plan: PruningPlan, metric: str) -> None:
    left, right = (t.detach().double() for t in (column_matrix(pair), matrix_of(pair.basis)))
    bias = pair.scaling.bias.detach().double()
    if plan.ranks[name] == pair.rank and not pair.needs_bias:
        moments = moments.about_zero  # a bias would be a cost that the plan does not know
    try:
        if metric == "euclidean":
            layer = refitted_layer(left, right, bias, moments, plan.keep[name])
        else:
            layer = reduced_rank_layer(left, right, bias, moments, plan.ranks[name])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    _assign(pair, layer)


@torch.no_grad()
def _assign(pair: BasisPair, layer: LowRank) -> None:
    if layer.basis.shape[1] != pair.rank:
        pair.resize(layer.basis.shape[1])
    pair.set_factors(layer.basis, layer.coefficients, torch.linalg.vector_norm(layer.coefficients, dim=1))
    pair.scaling.bias.copy_(layer.bias)
