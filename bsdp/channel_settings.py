"""What iterative channel pruning can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bsdp._checks import check_at_least, check_choice, check_share, check_whole
from bsdp.channel_importance import CRITERIA
from bsdp.channel_selection import CHANNEL_RANKINGS, TIMED_CHANNEL_KINDS
from bsdp.round_settings import RoundSettings

SCALED = ("channel_scaling", "transtailor")  # criteria that train one factor per channel
ALL_CRITERIA = (*CRITERIA, "transtailor")
_UNTRAINED = ("l1", "l2", "fpgm", "random")


@dataclass(frozen=True)
class ChannelPruningSettings(RoundSettings):
    """Settings of iterative channel pruning; checked when made.

    Attributes:
        target: Share of the original model to remove, in (0, 1).
        target_kind: What `target` counts: ``"params"``, ``"macs"``, ``"channels"`` or, by a latency table,
            ``"latency"``.
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
        channel_ranking: How scores of different groups compare, see `select_channels`. None chooses ``"priority"`` for
            ``"activation_cumsum"``, else ``"per_cost"`` for a budget of MACs or latency, else ``"global"``.
        normalize: See `ChannelScores`.
        min_channels: Channels (units) that every group keeps at least.
        max_group_ratio: Largest share of a group that one cut may remove.
        round_to: Groups keep multiples of so many channels.
        threshold: Remove no channel of at least this importance; None for no limit.
        theta: Share of the cumulative sum of activations that the ranking ``"priority"`` keeps.
        macs_penalty: What a channel's importance loses per share of the MACs that it costs (Molchanov et al. 2016).
        l1: L1 penalty on batch-norm weights (``"bn_scale"``) or channel factors (``"channel_scaling"``) until the last
            cut.
        exclude: Names of layers whose channels must stay.
        seed: Of ``"random"``.
        mean_to_bias: Move the mean of removed channels (and bases) into the biases of the layers that read them, where
            these have one.
    """

    kinds: ClassVar[Sequence[str]] = TIMED_CHANNEL_KINDS
    unscored: ClassVar[str] = "criterion='l1', 'l2', 'fpgm' or 'random'"

    criterion: str = "taylor_2019"
    channel_ranking: str | None = None
    normalize: str = "auto"
    min_channels: int = 1
    max_group_ratio: float = 0.95
    round_to: int = 1
    threshold: float | None = None
    theta: float = 0.98
    macs_penalty: float = 0.0
    l1: float = 0.0
    exclude: tuple[str, ...] = ()
    seed: int = 0
    mean_to_bias: bool = True

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, ALL_CRITERIA)
        if self.channel_ranking is not None:
            check_choice("channel_ranking", self.channel_ranking, CHANNEL_RANKINGS)
        check_share("max_group_ratio", self.max_group_ratio)
        check_share("theta", self.theta)
        check_whole("min_channels", self.min_channels, 1)
        check_whole("round_to", self.round_to, 1)
        check_at_least("macs_penalty", self.macs_penalty, 0)
        check_at_least("l1", self.l1, 0)
        if self.threshold is not None:
            check_at_least("threshold", self.threshold, 0)
        if self.l1 and self.criterion not in ("bn_scale", *SCALED):
            raise ValueError(
                f"`l1={self.l1}` is a penalty on batch-norm weights or channel factors, which `criterion="
                f"{self.criterion!r}` does not read: set it to 0, or choose 'bn_scale' or 'channel_scaling'."
            )
        if self.channel_ranking == "priority" and self.criterion != "activation_cumsum":
            raise ValueError(
                "`channel_ranking='priority'` reads the cumulative sum of activations: it goes with "
                f"`criterion='activation_cumsum'`, not {self.criterion!r}."
            )
        super().__post_init__()

    @property
    def needs_scores(self) -> bool:
        """Whether a cut needs scores of an epoch of training."""
        return self.criterion not in _UNTRAINED

    @property
    def ranking_of_channels(self) -> str:
        """The ranking that was chosen, or that goes with the criterion and with what the target counts."""
        if self.channel_ranking is not None:
            return self.channel_ranking
        if self.criterion == "activation_cumsum":
            return "priority"
        return "per_cost" if self.target_kind in ("macs", "latency") else "global"
