"""Cutting pairs to given ranks, layer after layer in the order of calls, so that later layers see what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_choice, check_whole
from bsdp.calibration import rebase
from bsdp.factorize import METRICS, to_float64
from bsdp.gradient_moments import MetricCollector, inputs_and_labels
from bsdp.layers import BasisPair, column_matrix, named_pairs
from bsdp.moments import LayerMoment
from bsdp.probing import as_inputs, probe


def truncate_sequentially(
    model: nn.Module,
    ranks: Mapping[str, int],
    batches: Iterable[Any],
    *,
    metric: str = "activation",
    centred: bool = True,
    shrinkage: float | None = None,
    passes: int = 4,
    loss: Callable[[Any, Any], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Cut pairs, in place, to their leading bases, chosen anew from the inputs that already cut layers give.

    In every pass the next few layers in the order of calls are measured, given new bases and cut; the mean output of
    what they lose moves into the bias. Memory is bounded by the moments of one pass.

    Args:
        model: A decomposed model.
        ranks: New rank per group by layer name; layers that are not named stay.
        batches: As in `collect_gradient_moments`; read once per pass, so they are kept.
        metric: ``"activation"`` or ``"kfac"``, see `rebase`.
        centred: See `rebase`.
        shrinkage: See `rebase`.
        passes: Groups of layers, 1 to measure all of them before any is cut. More passes are more exact, and slower.
        loss: See `collect_gradient_moments`.
        generator: See there.

    Raises:
        ValueError: If an argument is not allowed, there is no batch, or a layer is unknown or never called.
    """
    check_choice("metric", metric, METRICS[1:])
    check_whole("passes", passes, 1)
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` is empty: truncation needs at least one batch of calibration data.")
    pairs = _checked_pairs(model, ranks)
    order = _call_order(model, pairs, kept[0])
    for names in _chunks(order, passes):
        collector = MetricCollector({n: pairs[n] for n in names}, metric, loss=loss, generator=generator)
        with collector.collecting(model) as take:
            for batch in kept:
                inputs, labels = inputs_and_labels(batch)
                take(model(*as_inputs(inputs)), labels)
        moments, gradients = collector.compute()
        some = {n: pairs[n] for n in names}
        rebase(some, moments, metric=metric, gradients=gradients, centred=centred, shrinkage=shrinkage)
        for name in names:
            _cut(pairs[name], ranks[name], moments[name])


def _checked_pairs(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, BasisPair]:
    pairs = named_pairs(model)
    for name, rank in ranks.items():
        if name not in pairs:
            raise ValueError(f"`ranks` names layer {name!r}, which the model does not have as a pair.")
        if not 1 <= rank <= pairs[name].rank:
            raise ValueError(f"`ranks` asks for rank {rank} of layer {name!r}, which has rank {pairs[name].rank} now.")
    return {name: pairs[name] for name in ranks}


def _call_order(model: nn.Module, pairs: Mapping[str, BasisPair], batch: Any) -> list[str]:
    names = {pair: name for name, pair in pairs.items()}
    called: dict[str, None] = {}
    with probe(model, names, lambda pair, _inputs, _output: called.update({names[pair]: None})):  # type: ignore[index]
        model(*as_inputs(inputs_and_labels(batch)[0]))
    idle = next((name for name in pairs if name not in called), None)
    if idle is not None:
        raise ValueError(f"`ranks` names layer {idle!r}, which is never called on the first batch.")
    return list(called)


def _chunks(names: list[str], passes: int) -> Iterator[list[str]]:
    sizes = torch.arange(len(names)).tensor_split(passes)
    yield from ([names[int(i)] for i in part] for part in sizes if len(part))


@torch.no_grad()
def _cut(pair: BasisPair, rank: int, moment: LayerMoment) -> None:
    if rank == pair.rank:
        return
    columns = to_float64(column_matrix(pair))
    mean = moment.mean.to(columns).view(pair.groups, -1, 1)
    features = torch.linalg.pinv(columns) @ mean
    lost = columns[:, :, rank:] @ features[:, rank:]
    pair.scaling.bias.add_(lost.flatten().to(pair.scaling.bias))
    pair.keep(torch.cat([torch.arange(rank) + group * pair.rank for group in range(pair.groups)]))
