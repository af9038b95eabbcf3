"""Double pruning: channels on top of bases, the split found on validation data while the model trains.

The paper (Wong et al., arXiv 2108.02893) combines basis pruning with an existing channel pruner; how much each of them
should remove is not published. Here (our choice) every round may be a cut of either kind, or of both, down to the
round's budget, and with ``split="auto"`` they are tried on the spot: the cut that changes the network's outputs on
validation images least is the one that is made. No labels are read for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from bsdp._checks import check_choice
from bsdp.basis_stage import BasisStage
from bsdp.channel_pruner import ChannelStage, channels_in_a_round, describe_channels, smallest_cost
from bsdp.channel_settings import SCALED, ChannelPruningSettings
from bsdp.cost import ModelCost
from bsdp.importance import DATA_FREE, IMPORTANCES, Importance, NoScoresError
from bsdp.layers import named_pairs
from bsdp.probing import as_inputs
from bsdp.pruner import reachable_ranks
from bsdp.rebasing import BasisRoundPruner, check_rebase_settings
from bsdp.record import RoundRecord
from bsdp.round_settings import out_of_rounds
from bsdp.score_average import check_momentum
from bsdp.selection import RANKINGS
from bsdp.snapshots import copy_values, load_values
from bsdp.sparsifiers import check_sparsifier
from bsdp.stages import Stage
from bsdp.stats import measure_cost
from bsdp.structure import set_shape, shape_of
from bsdp.widths import widths_of

CUTS = ("basis", "channel", "basis and channel")
ORDERS = ("basis_then_channel", "channel_then_basis", "alternate")
Outputs = Tensor | tuple[Tensor, ...]
Probe = Callable[[], Outputs]


@dataclass(frozen=True)
class DoublePruningSettings(ChannelPruningSettings):
    """Settings of double pruning; checked when made.

    Attributes:
        target: Share of the original model to remove, in (0, 1).
        target_kind: What `target` counts: ``"params"`` or ``"macs"``.
        rounds: Number of cuts.
        schedule: How the removal is spread over the rounds, see `kept_share`.
        warmup_epochs: Epochs before the first cut.
        epochs_per_round: Epochs of training after each cut.
        tolerance: Largest allowed fall of the monitored value below the reference; None for no limit.
        mode: ``"max"`` if a higher value is better, else ``"min"``.
        patience_rounds: Rounds in a row that may end below the tolerance before pruning stops: 1 stops at the first.
        distillation: Weight, in [0, 1], of what the unpruned model says against the labels, see `Distiller`; 0: none.
        distillation_temperature: See `distillation_loss`.
        distillation_module: Name of the module that returns the class scores; None for the network.
        criterion: Score of a channel, one of `ALL_CRITERIA`.
        channel_ranking: How scores of different groups compare, see `select_channels`.
        normalize: See `ChannelScores`.
        min_channels: Channels (units) that every group keeps at least.
        max_group_ratio: Largest share of a group that one cut may remove.
        round_to: Groups keep multiples of so many channels.
        threshold: Remove no channel of at least this importance; None for no limit.
        theta: Share of the cumulative sum of activations that the ranking ``"priority"`` keeps.
        macs_penalty: What a channel's importance loses per share of the MACs that it costs (Molchanov et al. 2016).
        l1: L1 penalty on batch-norm weights (``"bn_scale"``) or channel factors (``"channel_scaling"``).
        exclude: Names of layers whose channels must stay.
        seed: Of ``"random"``.
        mean_to_bias: Move the mean output of removed bases, and the mean of removed channels, into biases.
        order: ``"basis_then_channel"``, ``"channel_then_basis"`` or ``"alternate"``.
        split: Share of the removal that bases take, in [0, 1], or ``"auto"``: found on validation data.
        importance: Score of bases, see `ScoreAccumulator`.
        score_momentum: Weight of the scores that bases had in earlier rounds, in [0, 1), see `ScoreAverage`.
        ranking: How bases of different layers compare, see `select`.
        rebase: When bases are chosen anew, see `PruningSettings`. A cut of channels puts others in their place, as near
            to them as may be: ``"every_round"`` chooses them again before the next cut.
        metric: By what they are chosen then, see `bsdp.rebase`.
        centred: See `bsdp.rebase`.
        shrinkage: See `bsdp.rebase`.
        sparsifier: ``"l1"``: until the last cut, a penalty of `sparsity_weight` times the sum of the absolute scaling
            factors, see `bsdp.sparsifiers`. Scores do not see it.
        sparsity_weight: Weight of the penalty.
        min_rank: Rank per group that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one cut may remove.
    """

    kinds: ClassVar[tuple[str, ...]] = ("params", "macs")
    unscored: ClassVar[str] = "scores that need no training ('magnitude' and 'l1', 'l2', 'fpgm' or 'random')"
    rank_multiple: ClassVar[int] = 1  # what `BasisStage` asks for

    order: Literal["basis_then_channel", "channel_then_basis", "alternate"] = "basis_then_channel"
    split: float | Literal["auto"] = "auto"
    importance: Importance = "mean_square"
    score_momentum: float = 0.0
    channel_ranking: str | None = "per_cost"
    ranking: Literal["importance", "per_cost", "hull", "local", "isomorphic"] = "per_cost"
    rebase: Literal["never", "warmup", "every_round"] = "never"
    metric: Literal["euclidean", "activation", "kfac"] = "activation"
    centred: bool = False
    shrinkage: float | None = None
    sparsifier: Literal["none", "l1"] = "none"
    sparsity_weight: float = 0.0
    min_rank: int = 1
    max_layer_ratio: float = 0.95

    def __post_init__(self) -> None:
        check_sparsifier(self.sparsifier, self.sparsity_weight)
        check_choice("order", self.order, ORDERS)
        check_choice("importance", self.importance, IMPORTANCES)
        check_momentum(self.score_momentum)
        check_choice("ranking", self.ranking, RANKINGS)
        if self.criterion in SCALED:
            raise ValueError(
                f"`criterion={self.criterion!r}` trains factors of its own, which a decomposed model has already: "
                "choose 'taylor_2019' or another criterion for double pruning."
            )
        if self.split != "auto" and (isinstance(self.split, str) or not 0.0 <= float(self.split) <= 1.0):
            raise ValueError(f"`split` must be 'auto' or a share in [0, 1], got {self.split!r}.")
        super().__post_init__()
        check_rebase_settings(self)

    @property
    def needs_scores(self) -> bool:
        """Whether a cut needs scores of an epoch of training."""
        return super().needs_scores or self.importance not in DATA_FREE


@torch.no_grad()
def output_change(before: Outputs, after: Outputs) -> float:
    """How much a cut changed the outputs of a network.

    Args:
        before: Outputs before the cut. A single one of two axes is taken for class scores, ``[examples, classes]``.
        after: Outputs for the same inputs after it.

    Returns:
        Mean Kullback-Leibler divergence of the class probabilities; for other shapes the squared difference relative to
        the squared outputs. Of several outputs, which may be of any scale, the sum of the relative differences.

    Raises:
        ValueError: If the outputs have other shapes after the cut.
    """
    old, new = (x if isinstance(x, tuple) else (x,) for x in (before, after))
    if [x.shape for x in old] != [x.shape for x in new]:
        raise ValueError(
            "the outputs have other shapes after a cut, so that they cannot be compared: set `split` to a number."
        )
    if len(old) == 1 and old[0].dim() == 2 and old[0].shape[1] > 1:
        logs = [F.log_softmax(x.double(), dim=1) for x in (*old, *new)]
        return float(F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean"))
    return sum(_relative_change(one, other) for one, other in zip(old, new, strict=True))


def _relative_change(before: Tensor, after: Tensor) -> float:
    difference = (before - after).double().square().sum()
    return float(difference / before.double().square().sum().clamp_min(1e-30))


class DoublePruner(BasisRoundPruner):
    """Prunes bases and channels of a decomposed model round by round, to one budget and within one tolerance.

    See `RoundPruner` for the calls that a training loop makes; keep `collecting` open on some batches.

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        example: Example inputs of the network, batch size 1.
        cost: Cost of the network; None to measure it.
        probe: Gives the model's outputs (a tensor or a tuple of tensors) on validation images, always the same; needed
            by ``split="auto"``.
        average: Averages a number over the processes of a distributed run, so that all take the same decision.
        network: Dotted name of the decomposed network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: DoublePruningSettings,
        example: Tensor | tuple[Tensor, ...],
        *,
        cost: ModelCost | None = None,
        probe: Probe | None = None,
        average: Callable[[float], float] = float,
        network: str = "",
        monitor: str = "accuracy",
    ) -> None:
        part = model.get_submodule(network) if network else model
        if not named_pairs(part):
            raise ValueError("`model` has no decomposed layer: call `bsdp.decompose` first.")
        cost = measure_cost(part, as_inputs(example), new_bias=settings.mean_to_bias) if cost is None else cost
        kind = settings.target_kind
        basis = BasisStage(part, settings, kind=kind)
        self.channel = ChannelStage(part, example, settings, kind=kind, new_bias=settings.mean_to_bias)
        stages: dict[str, Stage] = {"basis": basis, "channel": self.channel}
        super().__init__(model, settings, cost, stages, network=network, monitor=monitor)
        self.probe, self.average = probe, average
        self.changes: dict[str, float] = {}  # what the last trial of each kind did to the outputs
        self.stage = "basis" if settings.order == "basis_then_channel" else "channel"
        self._cut_by = ""
        if self.original_known:
            self.check_target()
        self.record.rounds.append(self._round_record(0, 0))

    def check_target(self) -> None:
        """Refuse a target beyond what is gone at the least ranks and the least channels that the rounds can reach.

        A smaller one may still be missed: a round stops at its own budget, and the ratios then bound the last one.
        """
        settings = self.settings
        most, in_rounds = self.largest_share(), self.largest_share(rounds=settings.known_rounds)
        if settings.target > most:
            raise ValueError(
                f"`target={settings.target}` is out of reach: with the least ranks and channels everywhere, "
                f"{most:.1%} of the {settings.target_kind} would be gone. Choose a target below {most:.3f}."
            )
        if settings.target > in_rounds:
            raise ValueError(out_of_rounds(settings, in_rounds, channels_in_a_round(settings)))
        if settings.split == "auto":
            return
        share = float(settings.split)
        parts = {"basis": share * settings.target, "channel": (1.0 - share) * settings.target}
        # Channels go on where bases cannot reach their share in time, so that only their rounds are a bound.
        words = {"basis": f"with `min_rank={settings.min_rank}`", "channel": ""}
        shares = self.largest_shares()
        if settings.known_rounds is not None:
            shares["channel"] = self.largest_shares(rounds=settings.rounds)["channel"]
            words["channel"] = f"in `rounds={settings.rounds}` of {channels_in_a_round(settings)}"
        for name, largest in shares.items():
            if parts[name] > largest:
                raise ValueError(
                    f"`split={settings.split}` of `target={settings.target}` cannot be met: "
                    f"{parts[name]:.1%} of the {settings.target_kind} would have to go by cuts of {name}, which can "
                    f"remove {largest:.1%} at most {words[name]}".rstrip()
                    + ". Use `split='auto'`, another share or a smaller target."
                )

    @property
    def original_known(self) -> bool:
        """Whether no layer has lost channels: else the original's cost is not known before the state is loaded."""
        return not widths_of(self.network)

    def largest_share(self, *, rounds: int | None = None) -> float:
        """What bases and channels together could remove at the very most.

        Args:
            rounds: Cuts in which channels get to their least; None for any number. Ranks are the least ones in either
                case, for they fall with the channels, too.
        """
        ranks = reachable_ranks(self.cost, self.settings, self.ranks)
        left = smallest_cost(self.channel, self.cost, rounds=rounds, ranks=ranks)
        return 1.0 - left / self.cost.original(self.settings.target_kind)

    def largest_shares(self, *, rounds: int | None = None) -> dict[str, float]:
        """What each kind could remove alone; `rounds` bounds channels, as in `largest_share`."""
        kind = self.settings.target_kind
        least = {
            "basis": self.cost.deployed(reachable_ranks(self.cost, self.settings, self.ranks), kind),
            "channel": smallest_cost(self.channel, self.cost, rounds=rounds),
        }
        return {name: 1.0 - cost / self.cost.original(kind) for name, cost in least.items()}

    def measured_cost(self) -> ModelCost:
        """Cost of the network as it is now."""
        return measure_cost(self.network, self.channel.example, new_bias=self.settings.mean_to_bias)

    def describe(self, record: RoundRecord) -> RoundRecord:
        """Add channels, layers and what was cut."""
        return replace(describe_channels(record, self.channel), stage=self._cut_by)

    def remove(self, budget: float, optimizers: Iterable[Optimizer]) -> bool:
        """Cut bases or channels down to a budget, whichever the order and the split say.

        Where bases alone cannot reach the budget, channels go on.
        """
        optimizers = list(optimizers)
        if self.settings.split == "auto":
            how, goal, middle = self._choose(budget), budget, None
        else:
            how, goal, middle = self._by_share(float(self.settings.split), budget)
        self._cut_by = how
        reached = self._cut(how, goal, optimizers, middle)
        if "channel" in self._cut_by:
            self.basis.bases_changed()
        return reached and goal <= budget

    def _cut(self, how: str, budget: float, optimizers: list[Optimizer], middle: float | None = None) -> bool:
        """Make one of the cuts of `CUTS`, bases to `middle` where channels follow; return whether it gets there."""
        if how == "channel":  # after which the pairs have other bases, so their scores are gone
            return self.channel.apply(self.channel.plan(budget, self.cost), optimizers)
        first = budget
        if how == "basis and channel":  # by default half of the way each, on a logarithmic scale
            first = middle or math.sqrt(budget * self.cost.deployed(self.ranks, self.settings.target_kind))
        if self.basis.apply(self.basis.plan(first, self.cost), optimizers) and how == "basis":
            return True
        try:
            plan = self.channel.plan(budget, self.measured_cost())
        except NoScoresError:  # the cut of bases stands
            return False
        self._cut_by = "basis and channel"
        return self.channel.apply(plan, optimizers)

    def _choose(self, budget: float) -> str:
        settings = self.settings
        if settings.order != "alternate" and self.stage == _last(settings.order):
            return self.stage
        self.changes = self.try_cuts(budget)
        better = min(self.changes, key=lambda name: self.changes[name])
        if settings.order == "alternate" or math.isfinite(self.changes[better]):
            self.stage = better
        return self.stage

    def _by_share(self, share: float, budget: float) -> tuple[str, float, float | None]:
        """Follow a given share: the cut to make, how far, and where bases hand over to channels in it."""
        order, kind, target = self.settings.order, self.settings.target_kind, self.settings.target
        original = self.record.original(kind)
        if order == "alternate":
            return self._behind(share, 1.0 - budget / original), budget, None
        border = original * (1.0 - target * (share if order == "basis_then_channel" else 1.0 - share)) * (1 - 1e-9)
        first, second = ("basis", "channel") if order == "basis_then_channel" else ("channel", "basis")
        if budget >= border:
            return first, budget, None
        if self.cost.deployed(self.ranks, kind) <= border * (1 + 1e-6):
            return second, budget, None
        if first == "basis":
            return "basis and channel", budget, border
        return "channel", border, None  # bases have no scores right after it: they go on in the next round

    def _behind(self, share: float, removed: float) -> str:
        """The kind that is further behind its share of what has to be gone after this round."""
        done, before = {"basis": 0.0, "channel": 0.0}, 1.0
        for entry in self.record.rounds[1:]:
            kept = self.record.kept(entry, self.settings.target_kind) or before
            done["channel" if entry.stage == "channel" else "basis"] += before - kept
            before = kept
        return "basis" if done["basis"] - share * removed <= done["channel"] - (1.0 - share) * removed else "channel"

    def try_cuts(self, budget: float) -> dict[str, float]:
        """Make every cut that the order allows for a moment, and see what it does to the outputs on validation images.

        Returns:
            `output_change` by kind of cut; infinity for one that cannot reach the budget, or has no scores.

        Raises:
            ValueError: If there is no probe.
        """
        if self.probe is None:
            raise ValueError("`split='auto'` needs `probe`, a function that gives outputs on validation images.")
        before = self.probe()
        allowed = CUTS if self.settings.order == "alternate" else CUTS[:2]
        return {how: self._try(how, budget, before, self.probe) for how in allowed}

    def _try(self, how: str, budget: float, before: Outputs, probe: Probe) -> float:
        network = self.network
        state, shape = copy_values(network), shape_of(network)
        gradients = {key: p.grad for key, p in network.named_parameters()}
        try:
            change = output_change(before, probe()) if self._cut(how, budget, []) else math.inf
        except NoScoresError:
            change = math.inf
        finally:
            set_shape(network, shape)
            load_values(network, state)
            for key, parameter in network.named_parameters():
                parameter.grad = gradients[key]
        change = self.average(change)
        return math.inf if math.isnan(change) else change

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {**super().state_dict(), "stage": self.stage, "changes": self.changes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state)
        self.stage, self.changes = str(state["stage"]), dict(state["changes"])


def _last(order: str) -> str:
    return "channel" if order == "basis_then_channel" else "basis"
