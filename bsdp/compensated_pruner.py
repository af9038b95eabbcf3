"""Pruning with compensation and without training (Xie et al. 2021, CaP, arXiv 2108.13728): one call, or one round.

PUBLISHED (abstract): pruned channels are compensated for with statistics of a fraction of the data, the structure is
found by a binary search with a step constraint, nothing is trained. CODE (ZhouyangXie/pseudopruner, formulas only): see
`bsdp.compensation`, `bsdp.channel_compensation` and `bsdp.structural_search`. OURS: a target beside or in place of the
tolerance, for which channels are chosen by what cannot be reconstructed, without labels; removal in earnest at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_whole
from bsdp.channel_compensation import Compensation, collect_input_moments, unfit_groups
from bsdp.channel_pruner import ChannelPruner, ChannelStage
from bsdp.channel_selection import CHANNEL_KINDS, ChannelCost, ChannelPlan
from bsdp.channel_settings import ChannelPruningSettings
from bsdp.compensation import RIDGE
from bsdp.cost import ModelCost
from bsdp.folding import refuse_pairs
from bsdp.importance import NoScoresError
from bsdp.input_moments import Moments
from bsdp.probing import as_inputs
from bsdp.rounds import RoundPruner
from bsdp.stats import measure_cost
from bsdp.structural_search import SearchResult, binary_search_with_step_constraint
from bsdp.widths import widths_of


@dataclass(frozen=True)
class CompensationSettings(ChannelPruningSettings):
    """Settings of pruning with compensation. Those not listed are as in `ChannelPruningSettings`.

    Attributes:
        max_group_ratio: Largest share of a group that may go.
        max_positions: See `InputMoments`.
        restore_variance: See `compensate`.
        ridge: See `compensate`.
        budgeted: Whether `target` limits what goes; false: the tolerance alone does.
    """

    kinds: ClassVar[Sequence[str]] = CHANNEL_KINDS

    criterion: str = "l1"  # nothing that needs scores
    rounds: int = 1
    mean_to_bias: bool = False  # the compensation has it
    max_positions: int | None = 64
    restore_variance: bool = True
    ridge: float = RIDGE
    budgeted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("ridge", self.ridge, 0)
        if self.max_positions is not None:
            check_whole("max_positions", self.max_positions, 1)
        if self.tolerance is None and not self.budgeted:
            raise ValueError("`tolerance=None` prunes to a target without evaluating anything: give a `target`, too.")


@dataclass(frozen=True)
class CompensatedResult:
    """What pruning with compensation did.

    Attributes:
        kept: Units left and units there were, per group of channels.
        skipped: Groups that were left alone, and why.
        losses: Share of the output variance that each layer which reads pruned channels does not reproduce.
        reference: The value before; None where nothing was evaluated.
        value: The value afterwards, by the last evaluation.
        evaluations: How often something was evaluated.
    """

    kept: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    losses: dict[str, float]
    reference: float | None = None
    value: float | None = None
    evaluations: int = 0


class CompensationStage(ChannelStage):
    """Finds out which channels can go, and makes the others do their work; set the attributes before `plan`.

    Attributes:
        moments: Of what `readers` read, see `collect_input_moments`.
        evaluate: Gives the value of the network as it is; None where there is no tolerance.
        tolerance: How far below its value at first the search may go.
        result: What the newest plan did.
    """

    moments: Mapping[str, Moments] | None = None
    evaluate: Callable[[], float] | None = None
    tolerance: float = 0.0
    result: CompensatedResult | None = None

    def readers(self) -> dict[str, nn.Module]:
        """The layers whose inputs are to be watched.

        Raises:
            ValueError: If no group of channels can be compensated.
        """
        skipped = unfit_groups(self.network, self.groups)
        if len(skipped) == len(self.groups):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
            raise ValueError(
                f"no channels of {type(self.network).__name__} can be compensated ({reasons}). Use `ChannelPruning`, "
                "which trains instead, or basis pruning."
            )
        groups = [group for name, group in self.groups.items() if name not in skipped]
        names = dict.fromkeys(member.layer for group in groups for member in group.sides("in"))
        return {name: self.network.get_submodule(name) for name in names}

    def plan(self, budget: float, cost: ModelCost) -> ChannelPlan:
        """Search the channels to remove; the network is left with these at zero and the others compensating.

        Raises:
            NoScoresError: If there are no moments.
        """
        if not self.moments:
            raise NoScoresError("no data was seen that compensation could be computed from.")
        settings = self.settings
        options = {"restore_variance": settings.restore_variance, "ridge": settings.ridge}
        work = Compensation(self.network, self.groups, self.example, self.moments, **options)
        limits = {name: self.most(group.size) for name, group in work.groups.items()}
        with work.undone_on_error():
            if settings.budgeted:
                limits = _allocate(work, limits, lambda: self.cost(cost), budget)
            reference, found = None, None
            if self.evaluate is not None:
                reference = self.evaluate()
                found = self._search(work, limits, reference)
            work.apply(limits if found is None else found.removed)
        self.result = _result(work, reference, found)
        remove = {name: torch.arange(0) if name in work.skipped else work.units(name).cpu() for name in self.groups}
        left = self.cost(cost)
        for name, units in remove.items():
            left.remove(name, len(units))
        # A target that the tolerance does not allow is no fault of the cut; the report says what was reached.
        return ChannelPlan(remove, reached=True, cost=left.total)

    def most(self, size: int) -> int:
        """Units that a group of some size may lose."""
        ratio: float = self.settings.max_group_ratio
        return max(0, min(int(ratio * size), size - 1))

    def _search(self, work: Compensation, limits: Mapping[str, int], reference: float) -> SearchResult:
        assert self.evaluate is not None
        evaluate = self.evaluate

        def trial(removed: Mapping[str, int]) -> float:
            work.apply(removed)
            return evaluate()

        options: dict[str, Any] = {"reference": reference, "tolerance": self.tolerance, "mode": self.settings.mode}
        return binary_search_with_step_constraint(trial, limits, **options)


def _allocate(
    work: Compensation, limits: Mapping[str, int], reckoning: Callable[[], ChannelCost], budget: float
) -> dict[str, int]:
    """Remove from every group what can be reconstructed up to the same loss, the lowest that meets the budget."""
    # The loss with so many units gone; rising, for the order is that of `Selection`.
    losses = {name: work.selection(name).losses.flip(0)[: most + 1].tolist() for name, most in limits.items()}
    levels = sorted({loss for values in losses.values() for loss in values})

    def removed(level: int) -> dict[str, int]:
        return {name: sum(loss <= levels[level] for loss in values) - 1 for name, values in losses.items()}

    def meets(level: int) -> bool:
        left = reckoning()
        for name, count in removed(level).items():
            left.remove(name, max(0, count))
        return left.total <= budget

    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle + 1, high)
    return {name: max(0, count) for name, count in removed(low).items()}


def _result(work: Compensation, reference: float | None, found: SearchResult | None) -> CompensatedResult:
    kept = {name: (group.size - work.removed.get(name, 0), group.size) for name, group in work.groups.items()}
    value, evaluations = (None, 0) if found is None else (found.value, found.evaluations + 1)
    return CompensatedResult(kept, dict(work.skipped), work.losses(), reference, value, evaluations)


class CompensatedPruner(ChannelPruner):
    """One round of pruning with compensation, after training.

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        example: Example inputs of the network, batch size 1.
        cost: Cost of the network; None to measure it.
        network: Dotted name of the network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.
    """

    stage: CompensationStage

    def __init__(
        self,
        model: nn.Module,
        settings: CompensationSettings,
        example: Tensor | tuple[Tensor, ...],
        *,
        cost: ModelCost | None = None,
        network: str = "",
        monitor: str = "accuracy",
    ) -> None:
        part = model.get_submodule(network) if network else model
        refuse_pairs(part)
        cost = measure_cost(part, as_inputs(example), new_bias=False) if cost is None else cost
        self.stage = CompensationStage(part, example, settings, kind=settings.target_kind)
        self.stage.readers()  # refuses a network in which nothing can be compensated
        RoundPruner.__init__(self, model, settings, cost, {"channel": self.stage}, network=network, monitor=monitor)
        if not widths_of(part):  # else the original's cost is not known before the state is loaded
            self.check_target()
        self.record.rounds.append(self._round_record(0, 0))

    def cut_due(self, epoch: int) -> bool:
        """Never: the cut comes after training."""
        return False

    def check_target(self) -> None:
        """Refuse a target beyond what may go."""
        if self.settings.budgeted:
            _check_reachable(self.stage, self.cost, self.original(self.settings.target_kind))


def _check_reachable(stage: CompensationStage, cost: ModelCost, original: float) -> None:
    left, skipped = stage.cost(cost), unfit_groups(stage.network, stage.groups)
    for name, group in stage.groups.items():
        if name not in skipped:
            left.remove(name, stage.most(group.size))
    most = 1.0 - left.total / original
    if stage.settings.target > most:
        settings = stage.settings
        raise ValueError(
            f"`target={settings.target}` is out of reach: with `max_ratio={settings.max_group_ratio}` of the channels "
            f"of every group that can be compensated, {most:.1%} of the {settings.target_kind} would be gone. Choose a "
            f"target below {most:.3f}, or a higher `max_ratio`."
        )


@torch.no_grad()
def compensated_prune(
    model: nn.Module,
    batches: Iterable[Any],
    example: Tensor | tuple[Tensor, ...],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    tolerance: float = 0.01,
    target: float | None = None,
    target_kind: str = "params",
    max_ratio: float = 0.9,
    mode: str = "max",
    exclude: Iterable[str] = (),
    restore_variance: bool = True,
    max_positions: int | None = None,
) -> CompensatedResult:
    """Prune the channels of a trained network in place, without training it.

    With `evaluate`, group after group loses as many channels as its share of the tolerance allows. With `target` alone,
    every group loses what can be reconstructed up to the same loss, and no labels are needed. With both, the search
    removes at most what the target alone would.

    Args:
        model: A trained plain network.
        batches: Inputs from the training data, some thousand images: tensors, or tuples of arguments. No labels.
        example: Example inputs, batch size 1.
        evaluate: Gives the value of the model, such as the accuracy on validation data (not on test data).
        tolerance: How far that value may fall; 0.01 is a point of accuracy.
        target: Share to remove, in (0, 1).
        target_kind: What `target` counts: ``"params"``, ``"macs"`` or ``"channels"``.
        max_ratio: Largest share of a group of channels that may go, in (0, 1).
        mode: ``"max"`` if a higher value is better, else ``"min"``.
        exclude: Names of layers whose channels must stay.
        restore_variance: Scale outputs that go into a batch norm to the variance they had.
        max_positions: Output positions per example that count in the moments; None for all of them.

    Returns:
        What was removed.

    Raises:
        ValueError: If neither `evaluate` nor `target` is given, the target is out of reach, or no channels can be
            compensated.
        UntraceableError: If the dependencies between channels cannot be found.
    """
    if evaluate is None and target is None:
        raise ValueError("`compensated_prune` needs `evaluate`, `target` or both, to know when to stop.")
    settings = CompensationSettings(
        target=max_ratio if target is None else target,
        target_kind="channels" if target is None else target_kind,
        budgeted=target is not None,
        tolerance=None if evaluate is None else tolerance,
        mode=mode,
        max_group_ratio=max_ratio,
        exclude=tuple(exclude),
        restore_variance=restore_variance,
        max_positions=max_positions,
    )
    pruner = CompensatedPruner(model, settings, example)
    stage = pruner.stage
    stage.moments = collect_input_moments(model, batches, stage.readers(), max_positions=max_positions)
    if evaluate is not None:
        stage.evaluate, stage.tolerance = lambda: float(evaluate(model)), tolerance
    budget = (1.0 - settings.target) * pruner.original(settings.target_kind)
    stage.apply(stage.plan(budget, pruner.cost), ())
    assert stage.result is not None
    return stage.result
