"""Iterative basis pruning; training loops and the Lightning callback only call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from bsdp._checks import check_choice, check_share, check_whole
from bsdp.basis_stage import BasisStage
from bsdp.cost import BASIS_KINDS, ModelCost
from bsdp.feature_statistics import FeatureStatistics
from bsdp.importance import DATA_FREE, IMPORTANCES, Importance, ScoreAccumulator
from bsdp.layers import named_pairs
from bsdp.rebasing import BasisRoundPruner, check_rebase_settings
from bsdp.round_settings import RoundSettings, out_of_rounds
from bsdp.score_average import check_momentum
from bsdp.selection import RANKINGS, least_rank, reachable_rank
from bsdp.sparsifiers import check_sparsifier
from bsdp.stats import limit_pairs


@dataclass(frozen=True)
class PruningSettings(RoundSettings):
    """Settings of iterative basis pruning; checked when made.

    Attributes:
        target: Share of the original model to remove, in (0, 1).
        target_kind: What `target` counts: ``"params"``, ``"macs"``, ``"bases"`` or, with a latency table in the cost,
            ``"latency"``.
        rounds: Number of cuts.
        schedule: How the removal is spread over the rounds, see `kept_share`.
        warmup_epochs: Epochs before the first cut.
        epochs_per_round: Epochs of training after each cut.
        importance: Score, see `ScoreAccumulator`.
        score_momentum: Weight of the scores of earlier rounds, in [0, 1), see `ScoreAverage`.
        ranking: How scores of different layers compare, see `select`.
        tolerance: Largest allowed fall of the monitored value below the reference; None for no limit.
        mode: ``"max"`` if a higher value is better, else ``"min"``.
        patience_rounds: Rounds in a row that may end below the tolerance before pruning stops: 1 stops at the first.
        distillation: Weight, in [0, 1], of what the unpruned model says against the labels, see `Distiller`; 0: none.
        distillation_temperature: See `distillation_loss`.
        distillation_module: Name of the module that returns the class scores; None for the network.
        rebase: When bases are chosen anew: ``"never"``; ``"warmup"``, at the start of the last warm-up epoch, when head
            and batch norms were trained; ``"every_round"``, at the start of the last epoch before every cut. That epoch
            gives the scores, which belong to the new bases.
        metric: By what they are chosen then, see `bsdp.rebase`.
        centred: See `bsdp.rebase`.
        shrinkage: See `bsdp.rebase`.
        sparsifier: ``"l1"``: until the last cut, a penalty of `sparsity_weight` times the sum of the absolute scaling
            factors, see `bsdp.sparsifiers`. Scores do not see it.
        sparsity_weight: Weight of the penalty.
        mean_to_bias: Move the mean output of removed bases into the bias.
        min_rank: Rank per group that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one cut may remove.
        rank_multiple: Ranks that layers are cut to are multiples of it, see `select`; 1 for any rank.
    """

    kinds: ClassVar[Sequence[str]] = BASIS_KINDS

    importance: Importance = "mean_square"
    score_momentum: float = 0.0
    ranking: Literal["importance", "per_cost", "hull", "local", "isomorphic"] = "per_cost"
    rebase: Literal["never", "warmup", "every_round"] = "never"
    metric: Literal["euclidean", "activation", "kfac"] = "activation"
    centred: bool = False
    shrinkage: float | None = None
    sparsifier: Literal["none", "l1"] = "none"
    sparsity_weight: float = 0.0
    mean_to_bias: bool = True
    min_rank: int = 1
    max_layer_ratio: float = 0.95
    rank_multiple: int = 1

    def __post_init__(self) -> None:
        check_sparsifier(self.sparsifier, self.sparsity_weight)
        check_share("max_layer_ratio", self.max_layer_ratio)
        check_choice("importance", self.importance, IMPORTANCES)
        check_momentum(self.score_momentum)
        check_choice("ranking", self.ranking, RANKINGS)
        check_whole("min_rank", self.min_rank, 1)
        check_whole("rank_multiple", self.rank_multiple, 1)
        super().__post_init__()
        check_rebase_settings(self)

    @property
    def needs_scores(self) -> bool:
        """Whether a cut needs scores of an epoch of training."""
        return self.importance not in DATA_FREE


def largest_removable_share(
    cost: ModelCost, settings: Any, ranks: Mapping[str, int] | None = None, *, rounds: int | None = None
) -> float:
    """What would be gone with the least rank in every layer: no target beyond it can be met.

    Below it a target may still be missed: a round stops at its own budget, and the ratio then bounds the last one.

    Args:
        cost: The network's cost.
        settings: With the fields of `PruningSettings` that bound ranks.
        ranks: Ranks now; None for full ones.
        rounds: Cuts in which to get there, each bounded by ``max_layer_ratio``; None for no such bound.
    """
    kind = settings.target_kind
    return 1.0 - cost.deployed(reachable_ranks(cost, settings, ranks, rounds=rounds), kind) / cost.original(kind)


def reachable_ranks(
    cost: ModelCost, settings: Any, ranks: Mapping[str, int] | None = None, *, rounds: int | None = None
) -> dict[str, int]:
    """The rank of every layer at which it costs least after so many cuts, see `largest_removable_share`."""
    limits: dict[str, Any] = {"min_rank": settings.min_rank, "rank_multiple": settings.rank_multiple}
    limits |= {"rounds": rounds, "max_layer_ratio": settings.max_layer_ratio}
    found = {}
    for name, layer in cost.layers.items():
        now = layer.full_rank if ranks is None else ranks[name]
        if rounds is None:
            least = min(now, layer.smallest_rank(least_rank(settings.min_rank, settings.rank_multiple)))
        else:
            least = reachable_rank(now, **limits) if layer.cuttable else now
        # Where cutting does not pay, a layer that stays whole is cheaper than one that got a bias.
        options: dict[str, Any] = {"kind": settings.target_kind, "new_bias": cost.new_bias}
        found[name] = min(least, now, key=lambda rank, layer=layer: float(layer.deployed(rank, **options)))  # type: ignore[misc]
    return found


def refuse_unreachable(
    cost: ModelCost, settings: PruningSettings, ranks: Mapping[str, int] | None = None, *, rounds: int | None = None
) -> None:
    """Refuse a target beyond `largest_removable_share`."""
    most, in_rounds = (largest_removable_share(cost, settings, ranks, rounds=n) for n in (None, rounds))
    least = least_rank(settings.min_rank, settings.rank_multiple)
    timed = settings.target_kind == "latency" or not any(layer.cuttable for layer in cost.layers.values())
    if settings.target > most and most < 0.0005 and cost.knows("latency") and timed:
        raise ValueError(
            f"`target={settings.target}` is out of reach: by the latency table no decomposed layer is (noticeably) "
            f"faster as a pair of rank {least} than as one layer, on this machine and at this batch size. Choose "
            "another `target_kind` ('params', 'macs') and no latency table, or measure one where the network is to "
            "run (`bsdp latency`)."
        )
    if settings.target > most:
        raise ValueError(
            f"`target={settings.target}` is out of reach: with rank {least} in every decomposed layer, {most:.1%} of "
            f"the {settings.target_kind} would be gone (head, batch norms and layers that are not "
            f"decomposed stay). Choose a target below {most:.3f}, or decompose more layers."
        )
    if rounds is not None and settings.target > in_rounds:
        bound = f"`max_layer_ratio={settings.max_layer_ratio}` of a layer"
        raise ValueError(out_of_rounds(settings, in_rounds, bound))


class IterativePruner(BasisRoundPruner):
    """Prunes the bases of a decomposed model round by round while somebody trains it.

    See `RoundPruner` for the calls that a training loop makes.

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        cost: Cost of the network, from `measure_cost`.
        network: Dotted name of the decomposed network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = bsdp.decompose(model)
        >>> settings = bsdp.PruningSettings(target=0.4, rounds=2, tolerance=None)
        >>> pruner = bsdp.IterativePruner(model, settings, bsdp.measure_cost(model))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(settings.epochs):
        ...     if pruner.cut_due(epoch):
        ...         _ = pruner.cut(epoch, optimizers=[optimizer])
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().sum().backward()
        ...     pruner.update()
        ...     optimizer.step()
        >>> pruner.record.rounds[-1].params <= 0.6 * pruner.record.cost.original()
        True
    """

    def __init__(
        self,
        model: nn.Module,
        settings: PruningSettings,
        cost: ModelCost,
        *,
        network: str = "",
        monitor: str = "accuracy",
    ) -> None:
        part = model.get_submodule(network) if network else model
        if not named_pairs(part):
            raise ValueError("`model` has no decomposed layer: call `bsdp.decompose` first.")
        stages = {"basis": self.new_stage(part, settings)}
        super().__init__(model, settings, cost, stages, network=network, monitor=monitor)
        self._timed = cost
        limit_pairs(part, cost)
        if self.original_known:
            self.check_target()
        self.record.rounds.append(self._round_record(0, 0))

    def new_stage(self, network: nn.Module, settings: PruningSettings) -> BasisStage:
        """Make what scores and removes the bases."""
        return BasisStage(network, settings, kind=settings.target_kind)

    def check_target(self) -> None:
        """Refuse a target beyond `largest_removable_share` in the rounds there are."""
        refuse_unreachable(self.cost, self.settings, self.ranks, rounds=self.settings.known_rounds)

    def set_cost(self, cost: ModelCost) -> None:
        """Replace the cost; measured times stay."""
        super().set_cost(cost.with_times_of(self._timed))

    def measured_cost(self) -> ModelCost:
        """The cost, with the measured times of the run that goes on, or else with those that this one began with."""
        cost = self.cost.with_times_of(self._timed)
        if not self.record.cost.knows("latency"):
            self.record.cost = cost
        limit_pairs(self.network, cost)
        return cost

    @property
    def scores(self) -> ScoreAccumulator:
        """Scores since the last cut."""
        return self.basis.scores

    @property
    def statistics(self) -> FeatureStatistics:
        """Feature statistics since the last cut."""
        return self.basis.statistics
