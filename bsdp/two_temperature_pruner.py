"""Pruning bases to a structure that two-temperature gates found, or that a file of an earlier run gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp._checks import check_at_least, check_whole
from bsdp.basis_stage import BasisStage
from bsdp.cost import COST_KINDS, ModelCost
from bsdp.importance import NoScoresError
from bsdp.pruner import IterativePruner, PruningSettings, refuse_unreachable
from bsdp.rank_patterns import RankPattern
from bsdp.selection import PruningPlan, select, select_ranks
from bsdp.two_temperature import TwoTemperatureGates, check_temperatures


@dataclass(frozen=True)
class TwoTemperatureSettings(PruningSettings):
    """Settings of a search with one cut; checked when made.

    Attributes:
        search_epochs: Epochs with gates; the last ones of `warmup_epochs`, which counts all epochs before the cut. 0
            when a structure is given.
        hard: Temperature of the forward pass.
        soft: Temperature of the gates' gradient.
        penalty: lambda; None to adapt it to the target.
        learning_rate: Step of the gates.
        interval: Steps of the weights for one of the gates.
        start: Initial theta.
    """

    kinds: ClassVar[Sequence[str]] = COST_KINDS

    search_epochs: int = 5
    hard: float = 20.0
    soft: float = 1.0
    penalty: float | None = None
    learning_rate: float = 0.1
    interval: int = 2
    start: float = 0.5

    def __post_init__(self) -> None:
        check_temperatures(self.hard, self.soft)
        check_whole("interval", self.interval, 1)
        check_at_least("search_epochs", self.search_epochs, 0)
        if self.penalty is not None:
            check_at_least("penalty", self.penalty, 0.0)
        if self.tolerance is not None and self.warmup_epochs == self.search_epochs:
            raise ValueError(
                "`warmup_epochs` must be at least 1 with a `tolerance`: the epochs before the search give the "
                "reference. 0 goes only with `tolerance=None`."
            )
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be above 0 and finite, got {self.learning_rate!r}.")
        if not 0.0 < self.start < float("inf"):
            raise ValueError(f"`start` must be above 0, where gates are open, and finite, got {self.start!r}.")
        super().__post_init__()


class TwoTemperatureStage(BasisStage):
    """Removes the bases whose gates are weakest, or the lowest scores down to a given structure.

    Args:
        network: A decomposed network.
        settings: What to do.
        pattern: The structure; None to search one.
    """

    settings: TwoTemperatureSettings

    def __init__(self, network: nn.Module, settings: TwoTemperatureSettings, *, pattern: RankPattern | None) -> None:
        super().__init__(network, settings, kind=settings.target_kind)
        self.pattern = pattern
        self.gates: TwoTemperatureGates | None = None
        self.average: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""
        return self.pattern is None or super().needs_gradients

    def start(self, cost: ModelCost) -> TwoTemperatureGates:
        """The gates, made on the first call."""
        if self.gates is None:
            s = self.settings
            self.gates = TwoTemperatureGates(
                self.pairs,
                cost,
                kind=self.kind,
                hard=s.hard,
                soft=s.soft,
                penalty=s.penalty,
                budget=1.0 - s.target,
                learning_rate=s.learning_rate,
                interval=s.interval,
                start=s.start,
                average=self.average,
            )
        return self.gates

    def update(self, optimizer: Optimizer | None = None, optimizers: Sequence[Optimizer] = ()) -> None:
        """Let the gates learn from the gradients that stand now, or add scores."""
        if self.pattern is not None:
            super().update()
        elif self.gates is not None:
            self.gates.update()

    def rebind(self) -> None:
        """Follow the ranks after a cut."""
        self.gates = None
        super().rebind()

    def collecting(self, scale: float, parts: int = 1, *, scores: bool = True, statistics: bool = True) -> Any:
        """Watch the features for means, and for scores where a structure is given."""
        if self.pattern is None and not self.settings.mean_to_bias:
            return None
        return super().collecting(scale, parts, scores=scores, statistics=statistics)

    def plan(self, budget: float, cost: ModelCost) -> PruningPlan:
        """Plan the cut; a given structure has a budget of its own."""
        if self.pattern is not None:
            return select_ranks(self.scores.compute(self.statistics), cost, self.pattern.ranks)
        if self.gates is None:
            raise NoScoresError("the search has not begun.")
        return select(
            self.gates.scores(),
            cost,
            budget=budget,
            kind=self.kind,
            ranking="importance",  # what a basis costs is in its gate already
            min_rank=self.settings.min_rank,
            max_layer_ratio=_ALL,
            rank_multiple=self.settings.rank_multiple,
        )

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores, statistics and waiting gradients over processes."""
        super().reduce(reduce)
        if self.gates is not None:
            self.gates.reduce(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return super().state_dict() | {"gates": None if self.gates is None else self.gates.state_dict()}


class TwoTemperaturePruner(IterativePruner):
    """Searches a structure with gates while somebody trains the model, then cuts it in one go.

    See `RoundPruner` for the calls that a training loop makes; in addition, training and validation of an epoch for
    which `searching` holds have to run under `gated`, `observe` included.

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        cost: Cost of the network, from `measure_cost`.
        network: Dotted name of the decomposed network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.
        pattern: A structure to cut to, in place of a search.
    """

    @property
    def basis(self) -> TwoTemperatureStage:
        """What searches the ranks, and cuts to them."""
        return cast(TwoTemperatureStage, self.stages["basis"])

    def __init__(
        self,
        model: nn.Module,
        settings: TwoTemperatureSettings,
        cost: ModelCost,
        *,
        network: str = "",
        monitor: str = "accuracy",
        pattern: RankPattern | None = None,
    ) -> None:
        self.pattern = pattern
        self._gated = False
        super().__init__(model, settings, cost, network=network, monitor=monitor)

    def new_stage(self, network: nn.Module, settings: PruningSettings) -> TwoTemperatureStage:
        """Make what scores and removes the bases."""
        assert isinstance(settings, TwoTemperatureSettings)
        return TwoTemperatureStage(network, settings, pattern=self.pattern)

    def check_target(self) -> None:
        """Refuse a target that is out of reach; a given structure is the target."""
        if self.pattern is None:
            refuse_unreachable(self.cost, self.settings)  # its one cut takes layers to any rank

    @property
    def first_search_epoch(self) -> int:
        """The first epoch with gates."""
        return int(self.first_epoch + self.settings.warmup_epochs - self.settings.search_epochs)

    def searching(self, epoch: int) -> bool:
        """Whether an epoch belongs to the search."""
        return self.pattern is None and self.warming_up and not self.stopped and epoch >= self.first_search_epoch

    @contextmanager
    def gated(self, epoch: int, scale: float = 1.0) -> Iterator[None]:
        """Run steps of training or validation inside the ``with`` block under the gates.

        Args:
            epoch: The epoch that trains.
            scale: What the loss is multiplied with, under mixed precision.
        """
        gates = self.basis.start(self.cost)
        if gates.budget is not None:
            # Half of the search leads to the target, so that the network is never left with next to nothing at once.
            progress = (epoch - self.first_search_epoch + 1) / self.settings.search_epochs
            gates.budget = 1.0 - self.settings.target * min(1.0, 2.0 * progress)
        self._gated = True
        try:
            with gates.applied(scale):
                yield
        finally:
            self._gated = False

    def observe(self, value: float) -> None:
        """Take the monitored value of a validation; one under gates says nothing of the whole network."""
        if not self._gated:
            super().observe(value)
        elif math.isfinite(value):
            self._last_value = float(value)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the model must have the structure of then."""
        super().load_state_dict(state)
        gates = state["stages"]["basis"].get("gates")
        if gates is not None and self.warming_up:
            self.basis.start(self.cost).load_state_dict(gates)


_ALL = 1.0 - 1e-9  # one cut takes it all
