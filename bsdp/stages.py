"""What a pruner that works in rounds can cut: the interface that bases and channels share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from bsdp.cost import ModelCost


class Stage(Protocol):
    """One way of making a network smaller: its scores, and the cut they lead to."""

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""

    @property
    def needs_hooks(self) -> bool:
        """Whether scores come from `collecting`, of all batches of a step."""

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether the steps of this optimizer are those to score."""

    def update(self, optimizer: Optimizer | None = None, optimizers: Sequence[Optimizer] = ()) -> None:
        """Add the scores of the gradients that stand now; once per step of every optimizer that it concerns.

        Args:
            optimizer: The one that is about to step; None for all.
            optimizers: All there are, so that every score is taken with just one of them.
        """

    def penalise(self, optimizer: Optimizer | None = None) -> None:
        """Add the gradients of penalties to those that stand now; after `update`, while a cut is still to come.

        Args:
            optimizer: The one that is about to step: only what it holds gets them; None for all.
        """

    def reset(self) -> None:
        """Forget all scores."""

    def rebind(self) -> None:
        """Follow the network after a cut, forgetting all scores."""

    def collecting(
        self, scale: float, parts: int = 1, *, scores: bool = True, statistics: bool = True
    ) -> ExitStack | None:
        """Watch forward and backward passes until it is closed; None if there is nothing to watch.

        Args:
            scale: See `RoundPruner.collecting`, also for the rest.
            parts: Batches of a step.
            scores: Whether to watch for the scores of stages that have `needs_hooks`.
            statistics: Whether to watch the features, for their means and energies.
        """

    def plan(self, budget: float, cost: ModelCost) -> Any:
        """Plan the removal of the weakest units down to a budget.

        Raises:
            NoScoresError: If there is nothing to rank by.
        """

    def apply(self, plan: Any, optimizers: Iterable[Optimizer]) -> bool:
        """Carry out a plan; return whether it reaches its budget."""

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores over processes."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the network must have the structure of then."""
