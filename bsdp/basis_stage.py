"""The stage of a pruner that scores and cuts bases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.cost import ModelCost
from bsdp.feature_statistics import FeatureStatistics
from bsdp.importance import ScoreAccumulator
from bsdp.layers import named_pairs
from bsdp.optimizers import held_parts
from bsdp.pruning import prune
from bsdp.score_average import ScoreAverage
from bsdp.selection import PruningPlan, select
from bsdp.sparsifiers import add_l1_gradient


class BasisStage:
    """Scores and removes the bases of a decomposed network.

    Args:
        network: A decomposed network.
        settings: With the fields of `PruningSettings` that concern bases.
        kind: What budgets count.
    """

    def __init__(self, network: nn.Module, settings: Any, *, kind: str) -> None:
        self.network, self.settings, self.kind = network, settings, kind
        self.pairs = named_pairs(network)
        self.scores = ScoreAccumulator(self.pairs, importance=settings.importance, model=network)
        self.score_average = ScoreAverage(settings.score_momentum)
        self.statistics = FeatureStatistics(self.pairs)

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""
        return self.scores.needs_gradients

    @property
    def needs_hooks(self) -> bool:
        """Whether scores come from `collecting`."""
        return self.scores.needs_hooks

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds the scaling factors."""
        delta = next(iter(self.pairs.values())).scaling.delta
        return any(p is delta for group in optimizer.param_groups for p in group["params"])

    def update(self, optimizer: Optimizer | None = None, optimizers: Sequence[Optimizer] = ()) -> None:
        """Add the scores of the gradients that stand now."""
        self.scores.update()

    def penalise(self, optimizer: Optimizer | None = None) -> None:
        """Add the gradient of the L1 penalty on the scaling factors that the optimizer holds."""
        if self.settings.sparsifier == "l1":
            deltas = held_parts((pair.scaling.delta for pair in self.pairs.values()), optimizer)
            add_l1_gradient(deltas, self.settings.sparsity_weight, origin=-1.0)

    def reset(self) -> None:
        """Forget all scores, those of earlier rounds included."""
        self.scores.reset()
        self.score_average.drop()
        self.statistics.reset()

    def rebind(self) -> None:
        """Follow the ranks after a cut; the scores of the bases that are left count in the next one."""
        self.scores.reset()
        self.score_average.advance()
        self.statistics.reset()

    def bases_changed(self) -> None:
        """Forget all scores, because other bases have taken the place of those that they belong to.

        To be called by whatever chooses the bases of a pair anew: a change of metric, or a cut of channels.
        """
        self.reset()

    def collecting(
        self, scale: float, parts: int = 1, *, scores: bool = True, statistics: bool = True
    ) -> ExitStack | None:
        """Watch the features, for energy and the means, and their gradients, for scores of examples."""
        statistics = statistics and (self.settings.mean_to_bias or self.settings.importance == "energy")
        scores = scores and self.scores.needs_hooks
        if not (statistics or scores):
            return None
        stack = ExitStack()
        if statistics:
            stack.enter_context(self.statistics.collecting())
        if scores:
            stack.enter_context(self.scores.collecting(scale, parts))
        return stack

    def plan(self, budget: float, cost: ModelCost) -> PruningPlan:
        """Plan the removal of the weakest bases."""
        return select(
            self.score_average.average(self.scores.compute(self.statistics)),
            cost,
            budget=budget,
            kind=self.kind,
            ranking=self.settings.ranking,
            min_rank=self.settings.min_rank,
            max_layer_ratio=self.settings.max_layer_ratio,
            rank_multiple=self.settings.rank_multiple,
        )

    def apply(self, plan: PruningPlan, optimizers: Iterable[Optimizer]) -> bool:
        """Remove what the plan does not keep."""
        means = self.statistics.means() if self.settings.mean_to_bias else None
        prune(self.network, plan, means=means, optimizers=optimizers)
        self.score_average.gather(plan.keep)
        return plan.reached

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores and statistics over processes."""
        self.scores.reduce(reduce)
        self.statistics.reduce(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {
            "scores": self.scores.state_dict(),
            "average": self.score_average.state_dict(),
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.scores.load_state_dict(state["scores"])
        sizes = {name: pair.scaling.delta.numel() for name, pair in self.pairs.items()}
        self.score_average.load_state_dict(state.get("average", {}), sizes)
        self.statistics.load_state_dict(state["statistics"])
