"""Making a trained network smaller in one call: no training, no labels, some hundred images, seconds to a minute.

1. Every layer becomes a pair of basis and scaling layer, whose bases are those of its outputs (`bsdp.factorize`).
2. Bases are scored (`ALLOCATIONS`), ranked over all layers, and cut to the budget (`bsdp.select`).
3. Layers are shortened in the order in which they are called, in a few passes over the data: each gets the bases and
   1x1 weights that reproduce the original's output best from the inputs that the layers shortened before give it
   (`bsdp.least_squares`). Beside it, layers are just truncated.
4. Running statistics of batch norms are recomputed. Of the networks with and without steps 3 and 4, the one whose
   outputs on held-out examples are closest to the original's is returned: in very deep residual networks fitted
   branches can shrink more than their shortcuts, and recomputed statistics of few images can be noise.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_choice, check_whole
from bsdp.calibration_data import collect_examples
from bsdp.compression_choice import Progress, outputs_of
from bsdp.compression_cutting import CompressionTrial, Cutter, Evaluate, ToleranceSearch, cost_now, worth
from bsdp.compression_steps import ALLOCATIONS, basis_scores, warn_of_few_positions
from bsdp.cost import ModelCost
from bsdp.decompose import decompose
from bsdp.folding import fold
from bsdp.latency import LatencyTable
from bsdp.latency_measuring import measure_latency_table
from bsdp.layers import named_pairs
from bsdp.probing import evaluating
from bsdp.pruner import PruningSettings, largest_removable_share, refuse_unreachable
from bsdp.selection import RANKINGS
from bsdp.stats import ModelStats, describe, measure_cost, original_cost


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` did.

    Attributes:
        model: The compressed copy, still with pairs, so that scaling factors can go on to train; `folded` is what to
            deploy.
        stats: Parameters and multiply-adds after and before, by layer.
        cost: The cost of the model by rank, for reports.
        skipped: Layers that were left as they are, and why.
        output_change: How far the outputs on held-out examples are from the original's, see `bsdp.output_change`.
        agreement: Share of the held-out examples with the same highest score as before; None where outputs are no class
            scores.
        compensated: Whether the layers were fitted to the outputs of the original.
        recalibrated: Whether the statistics of the batch norms were recomputed.
        examples: Examples that decided.
        held_out: Examples that were held out; 0 where there were too few, and the same ones measure.
        seconds: Time that it took.
        latency_table: Measured times of the layers that it went by; None without such.
        reference: What `evaluate` gave for the original; None without a tolerance.
        value: What it gave for the compressed network.
        trials: The cuts that were tried; none without a tolerance.
    """

    model: nn.Module = field(repr=False)
    stats: ModelStats = field(repr=False)
    cost: ModelCost = field(repr=False)
    skipped: dict[str, str] = field(repr=False)
    output_change: float
    agreement: float | None
    compensated: bool
    recalibrated: bool
    examples: int
    held_out: int
    seconds: float
    latency_table: LatencyTable | None = field(repr=False, default=None)
    reference: float | None = None
    value: float | None = None
    trials: tuple[CompressionTrial, ...] = ()

    @property
    def latency_kept(self) -> float | None:
        """Share of the time of a pass that is kept, by the latency table; None without one."""
        if self.latency_table is None:
            return None
        return self.cost.deployed(self.ranks, "latency") / self.cost.original("latency")

    @property
    def folded(self) -> nn.Module:
        """The compressed network of plain layers, see `bsdp.fold`."""
        return fold(self.model)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per group of every decomposed layer."""
        return {name: pair.rank for name, pair in named_pairs(self.model).items()}

    def __str__(self) -> str:
        where = (
            f"{self.held_out} held-out examples" if self.held_out else "the examples themselves, too few to hold out"
        )
        same = "" if self.agreement is None else f", the same class for {self.agreement:.1%}"
        fit = "fitted" if self.compensated else "truncated"
        norms = "recomputed" if self.recalibrated else "as they were"
        lines = [str(self.stats)]
        if self.latency_kept is not None:
            lines.append(f"by the latency table {self.latency_kept:.1%} of the time kept")
        if self.value is not None:
            tried = f"the smallest tolerated of {len(self.trials)} tried"
            lines.append(f"worth {self.value:.4g} of {self.reference:.4g}, {tried}")
        lines.append(f"output change {self.output_change:.4g} on {where}{same}")
        lines.append(f"layers {fit}, batch norms {norms}; {self.examples} examples, {self.seconds:.1f} s")
        return "\n".join(lines)


def compress(
    model: nn.Module,
    data: Any,
    *,
    target: float | None = None,
    target_kind: str = "params",
    tolerance: float | None = None,
    evaluate: Evaluate | None = None,
    metric: str = "activation",
    allocation: str = "kl",
    ranking: str = "hull",
    compensate: bool | str = "auto",
    recalibrate: bool | str = "auto",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    images: int = 256,
    passes: int = 6,
    batch_size: int = 32,
    min_rank: int = 1,
    latency_table: LatencyTable | str | os.PathLike[str] | None = None,
    latency_batch_size: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> CompressionResult:
    """Compress a trained network without training it; the given model is left as it is.

    Args:
        model: A trained network, plain or with pairs (those are shortened further).
        data: A few hundred inputs, shuffled: a tensor, or an iterable of batches (a DataLoader, say), each a tensor,
            ``(inputs, labels)`` or a tuple of arguments. Labels are not needed.
        target: Share of the original to remove, in (0, 1). The original of a model that was pruned before is what it
            was then, with all ranks and channels; of a time, with all ranks and the channels that it has. Beside a
            `tolerance` it is the share that is enough; None for as much as is tolerated.
        target_kind: What `target` counts: ``"params"``, ``"macs"`` or ``"latency"``, the time of a pass.
        tolerance: Largest allowed fall of what `evaluate` gives, in its units (0.01 is one point of an accuracy). The
            largest cut within it is searched for, to two hundredths of the original's cost.
        evaluate: Given a network of plain layers, in eval mode, says what it is worth, higher for better ones: its
            accuracy on validation images, say. It is called for the original and for every cut that is tried, some six.
        metric: How bases are chosen, see `decompose`.
        allocation: What decides how much each layer loses: ``"kl"``, the change of the network's own predictions;
            ``"taylor"``, the change of the loss, which needs labels; ``"energy"``, the share of the layer's own output
            variance.
        ranking: How scores of different layers compare, see `select`.
        compensate: Fit every shortened layer to the outputs of the original network: True, False, or ``"auto"``: if
            the network's outputs on held-out examples then are closer to the original's, and finite.
        recalibrate: Recompute the running statistics of batch norms: True, False, or ``"auto"``, likewise.
        include: Layers to decompose, see `decompose`.
        exclude: Layers to leave alone, see `decompose`.
        images: Examples to decide by; half as many more are held out. They are kept in memory.
        passes: Passes over the examples in which layers are shortened, those that are called first in the first one:
            more passes know more of the errors made before, and take longer.
        batch_size: Examples in a forward pass.
        min_rank: Rank per group that every layer keeps at least.
        latency_table: Measured times (see `measure_latency_table`) of this network with the same layers decomposed, or
            the file of such. Default: with ``target_kind="latency"`` they are measured first. With another kind, layers
            that are no faster as a pair are left whole.
        latency_batch_size: Examples in a pass when times are measured: that of later use.
        seed: Of the random signs of ``"kl"``.
        progress: Called with a line of text before every step, such as `print`.

    Raises:
        ValueError: If an argument is not allowed, the data are empty, NaN, of another kind than the network takes, or
            lack labels that are needed, no layer can be decomposed, the target is out of reach, no cut is tolerated,
            the latency table is of another network, or the outputs of the network, or of all networks to choose from,
            hold NaN or infinity.
        TypeError: If `data`, `evaluate` or what it gives, or `latency_table` is of another type.
        FileNotFoundError: If there is no such file of a latency table.

    Warns:
        UserWarning: If the ranking stops short of the target, a layer was seen at few positions, or the latency table
            was measured on inputs of another size.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.LazyLinear(2))
        >>> images = torch.randn(64, 3, 8, 8)
        >>> _ = model(images)
        >>> result = bsdp.compress(model, images, target=0.5)
        >>> result.stats.params_kept <= 0.5
        True
    """
    start = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise ValueError("`compress` needs gradients: call it outside of `torch.inference_mode()`.")
    _check_choices(target_kind, metric, allocation, ranking, compensate, recalibrate)
    for name, value, least in (("images", images, 2), ("passes", passes, 1), ("batch_size", batch_size, 1)):
        check_whole(name, value, least)
    check_whole("latency_batch_size", latency_batch_size, 1)
    if isinstance(latency_table, (str, os.PathLike)):
        latency_table = LatencyTable.load(latency_table)
    if not isinstance(latency_table, LatencyTable | None):
        raise TypeError(f"`latency_table` must be a LatencyTable or a file, got {type(latency_table).__name__}.")
    if latency_table is not None:
        latency_table.check_batch_size(latency_batch_size)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"`evaluate` must be a function of a network, got {type(evaluate).__name__}.")
    if target is None and tolerance is None:
        raise ValueError("give `target`, the share to remove, or `tolerance` with `evaluate`, or all of them.")
    if (tolerance is None) != (evaluate is None):
        raise ValueError("`tolerance` is a fall of what `evaluate` gives: give both or neither.")
    if tolerance is not None:
        check_at_least("tolerance", tolerance, 0)
    settings = None
    if target is not None:
        settings = PruningSettings(target=target, target_kind=target_kind, tolerance=None, min_rank=min_rank)
    check_whole("min_rank", min_rank, 1)
    say = progress or (lambda _line: None)
    found = collect_examples(data, images=images)
    if allocation == "taylor" and found.seen.labels is None:
        raise ValueError(
            "`allocation='taylor'` needs labels: give batches of (inputs, labels), or choose 'kl', which does without."
        )
    work = copy.deepcopy(model)
    device = next((p.device for p in work.parameters()), torch.device("cpu"))
    example = tuple(t.to(device) for t in found.seen.take(torch.arange(1)).inputs)
    _check_inputs(work, example)
    wanted = outputs_of(model, found.held_out, batch_size, device)
    if not wanted.isfinite().all():
        raise ValueError(
            "`model` gives NaN or infinity on `data`: check the weights and how the images are normalised."
        )
    say("decomposing")
    skipped = decompose(work, include=include, exclude=exclude, example_input=example).skipped
    _refuse_undecomposed(work, skipped)
    if target_kind == "latency" and latency_table is None:
        say(f"timing {len(named_pairs(work))} layers")
        latency_table = measure_latency_table(work, example, batch_size=latency_batch_size)
    cost = measure_cost(work, example, latency=latency_table)
    full = original_cost(work, example, cost=cost).with_times_of(cost).original(target_kind)
    if settings is not None:
        _check_budget(work, cost, full, settings)
    else:
        _refuse_nothing_to_cut(work, cost, target_kind, min_rank)
    reference = None if evaluate is None else worth(evaluate, model)
    if reference is not None and not math.isfinite(reference):
        raise ValueError(f"`evaluate` gave {reference} for the original: it must give a finite number.")

    def batches() -> Iterable[tuple[tuple[Tensor, ...], Tensor | None]]:
        return found.seen.batches(batch_size, device)

    say(f"scoring the bases of {len(cost.layers)} layers on {len(found.seen)} examples")
    survey, scores = basis_scores(work, batches, metric=metric, allocation=allocation, seed=seed)
    warn_of_few_positions(named_pairs(work), survey)
    how: dict[str, Any] = {"kind": target_kind, "ranking": ranking, "min_rank": min_rank, "metric": metric}
    how |= {"compensate": compensate, "recalibrate": recalibrate, "passes": passes, "batch_size": batch_size}
    how |= {"batches": batches, "wanted": wanted, "found": found, "device": device, "say": say}
    cutter = Cutter(model, work, cost, survey, scores, full, **how)
    search = None
    if evaluate is None or tolerance is None or reference is None:
        assert target is not None
        plan = cutter.plan(target)
        cutter.warn_of_miss(plan, target)
        best = cutter.cut(plan)
    else:
        search = ToleranceSearch(cutter, evaluate, tolerance, reference)
        best = search.run(target)
    held_out = 0 if found.held_out is found.seen else len(found.held_out)
    return CompressionResult(
        model=best.network,
        stats=describe(best.network, example),
        cost=cost,
        skipped=skipped,
        output_change=best.change,
        agreement=best.agreement,
        compensated=best.compensated,
        recalibrated=best.recalibrated,
        examples=len(found.seen),
        held_out=held_out,
        seconds=time.perf_counter() - start,
        latency_table=latency_table,
        reference=reference,
        value=None if search is None or search.chosen is None else search.chosen.value,
        trials=() if search is None else tuple(search.trials),
    )


def _check_choices(
    target_kind: str,
    metric: str,
    allocation: str,
    ranking: str,
    compensate: bool | str,
    recalibrate: bool | str,
) -> None:
    check_choice("target_kind", target_kind, ("params", "macs", "latency"))
    check_choice("metric", metric, ("euclidean", "activation"))
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("ranking", ranking, RANKINGS)
    for name, value in (("compensate", compensate), ("recalibrate", recalibrate)):
        if value not in (True, False, "auto"):
            raise ValueError(f"`{name}` must be True, False or 'auto', got {value!r}.")


def _check_inputs(work: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuse examples that the network cannot take, before anything else fails on them."""
    try:
        with evaluating(work):
            work(*example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join(f"{list(t.shape)} of {str(t.dtype).removeprefix('torch.')}" for t in example)
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        hint = (
            " The second tensor of a batch was taken for an input, because labels must be whole numbers of shape [N]: "
            "if it holds labels, give such ones, or batches of inputs alone."
        )
        raise ValueError(
            f"`model` cannot take the inputs of `data` ({given} for one example): {reason}. Give the inputs that "
            "it was trained on: images are floats, [batch, channels, height, width], normalised as for the training."
            + (hint if len(example) == 2 else "")
        ) from error


def _refuse_undecomposed(work: nn.Module, skipped: dict[str, str]) -> None:
    if not named_pairs(work):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "it has no layers"
        raise ValueError(f"`model` has no layer that can be decomposed ({reasons}).")


def _check_budget(work: nn.Module, cost: ModelCost, full: float, settings: PruningSettings) -> None:
    """Refuse a target that is met, or out of reach."""
    kind, target = settings.target_kind, settings.target
    now = cost_now(work, cost, kind)
    least = cost.original(kind) * (1.0 - largest_removable_share(cost, settings))
    budget = (1.0 - target) * full
    if now <= budget:
        raise ValueError(
            f"`target={target}` is met already: `model` was pruned before, and {1.0 - now / full:.1%} of the "
            f"original's {kind} are gone, of which the target is a share. Choose a larger one."
        )
    if full == cost.original(kind):
        refuse_unreachable(cost, settings)
    elif budget < least:  # it has lost channels
        most = 1.0 - least / full
        raise ValueError(
            f"`target={target}` is out of reach: with rank {settings.min_rank} in every decomposed layer, {most:.1%} "
            f"of the original's {kind} would be gone. Choose a target below {most:.3f}."
        )


def _refuse_nothing_to_cut(work: nn.Module, cost: ModelCost, kind: str, min_rank: int) -> None:
    """Refuse a network that is as small as it gets, where no target says how small it is to be."""
    if cost.smallest(kind, min_rank=min_rank) < cost_now(work, cost, kind):
        return
    way = "no decomposed layer is faster as a pair by the latency table" if cost.knows("latency") else "none can be cut"
    raise ValueError(
        f"`model` has no {kind} to lose: with rank {min_rank} in every decomposed layer it would cost as much as it "
        f"does ({way}). Choose another `target_kind`, or decompose more layers."
    )
