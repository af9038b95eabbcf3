"""Cutting a scored network to one share after another, and the smallest cut that some measure tolerates."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.calibration_data import CalibrationData
from bsdp.compression_choice import Candidate, CandidateChoice, Progress
from bsdp.compression_steps import Batches, shorten, truncate
from bsdp.cost import ModelCost
from bsdp.folding import fold
from bsdp.joint_moments import Survey
from bsdp.layers import named_pairs
from bsdp.probing import evaluating
from bsdp.selection import PruningPlan, select

Evaluate = Callable[[nn.Module], float]
_LAYER_RATIO = 1.0 - 1e-9  # a layer may lose all bases but one
_RESOLUTION = 0.02  # of the original's cost: the search ends within so much of the largest share


@dataclass(frozen=True)
class CompressionTrial:
    """A cut that was tried.

    Attributes:
        removed: Share of the original that went.
        value: What the cut network was worth; None for one that was not fit for use, or worth no finite number.
        tolerated: Whether that was enough.
    """

    removed: float
    value: float | None
    tolerated: bool


@dataclass(frozen=True)
class Cutter:
    """A scored network, and how to cut copies of it.

    Attributes:
        original: The network before, which gives the targets.
        work: Its decomposed copy, with the bases that were scored; it is left as it is.
        cost: Its cost by rank.
        survey: From `basis_scores`.
        scores: From `basis_scores`.
        full: What the original costs, in units of `kind`.
        kind: What shares are of: ``"params"``, ``"macs"`` or ``"latency"``.
        ranking: See `select`.
        min_rank: Rank per group that every layer keeps at least.
        metric: How bases are chosen.
        compensate: As in `compress`.
        recalibrate: As in `compress`.
        passes: As in `compress`.
        batches: Gives the examples that decide.
        wanted: The outputs of the original on held-out examples.
        found: The examples.
        batch_size: Examples in a forward pass.
        device: That of the network.
        say: Told what is done.
    """

    original: nn.Module
    work: nn.Module
    cost: ModelCost
    survey: Survey
    scores: dict[str, Tensor]
    full: float
    kind: str
    ranking: str
    min_rank: int
    metric: str
    compensate: bool | str
    recalibrate: bool | str
    passes: int
    batches: Batches
    wanted: Tensor
    found: CalibrationData
    batch_size: int
    device: torch.device
    say: Progress

    @property
    def gone(self) -> float:
        """Share of the original that is gone already."""
        return 1.0 - cost_now(self.work, self.cost, self.kind) / self.full

    @property
    def most(self) -> float:
        """Share of the original that is gone with the least rank in every layer."""
        return 1.0 - self.cost.smallest(self.kind, min_rank=self.min_rank) / self.full

    def plan(self, target: float) -> PruningPlan:
        """What to remove for a share of the original to be gone."""
        return select(
            self.scores,
            self.cost,
            budget=(1.0 - target) * self.full,
            kind=self.kind,
            ranking=self.ranking,
            min_rank=self.min_rank,
            max_layer_ratio=_LAYER_RATIO,
        )

    def warn_of_miss(self, plan: PruningPlan, target: float) -> None:
        """Warn where the ranking stops short of a target."""
        kept = self.cost.deployed(plan.ranks, self.kind) / self.full
        if kept > (1.0 - target) * (1.0 + 1e-9):
            way = "a smaller target" if self.ranking == "hull" else "`ranking='hull'` or a smaller target"
            warnings.warn(
                f"`ranking={self.ranking!r}` leaves {kept:.2%} of the {self.kind}, more than `target={target}` allows: "
                f"choose {way}.",
                stacklevel=3,
            )

    def cut(self, plan: PruningPlan) -> Candidate:
        """Cut a copy: of the networks with and without fitted layers, the closest to the original.

        Raises:
            ValueError: If none of them is fit for use.
        """
        choice = CandidateChoice(self.wanted, self.found, self.batch_size, self.device, self.recalibrate, self.say)
        if self.compensate is not True:
            with choice.leaving_out():
                network = copy.deepcopy(self.work)
                truncate(network, plan, self.batches)
                choice.networks[False] = network
        if self.compensate:
            with choice.leaving_out():
                network = copy.deepcopy(self.work)
                options: dict[str, Any] = {"metric": self.metric, "passes": self.passes, "say": self.say}
                shorten(self.original, network, plan, self.survey, self.batches, **options)
                choice.networks[True] = network
        self.say("comparing the outputs")
        return choice.best()


@dataclass
class ToleranceSearch:
    """Bisects for the largest cut whose worth stays within a tolerance of the original's.

    Attributes:
        cutter: Makes the cuts.
        evaluate: What a network is worth: higher is better.
        tolerance: Largest fall.
        reference: What the original is worth.
        trials: What was tried, in this order.
        chosen: The trial of `best`.
        best: The smallest network that is tolerated so far.
    """

    cutter: Cutter
    evaluate: Evaluate
    tolerance: float
    reference: float
    trials: list[CompressionTrial] = field(default_factory=list)
    chosen: CompressionTrial | None = None
    best: Candidate | None = None
    _known: list[tuple[dict[str, int], bool]] = field(default_factory=list)  # ranks, and whether they are tolerated
    _reason: str = ""

    def run(self, target: float | None) -> Candidate:
        """Find the cut.

        Args:
            target: Share that is enough, which is tried first; None to go as far as it gets.

        Raises:
            ValueError: If no cut is tolerated.
        """
        low, high = self.cutter.gone, self.cutter.most if target is None else target
        if target is not None or high - low <= _RESOLUTION:
            plan = self.cutter.plan(high)
            if self._tolerates(plan):
                low = high
                if target is not None:
                    self.cutter.warn_of_miss(plan, target)
        while high - low > _RESOLUTION:
            middle = (low + high) / 2.0
            if self._tolerates(self.cutter.plan(middle)):
                low = middle
            else:
                high = middle
        if self.best is None:
            least = min(self.trials, key=lambda trial: trial.removed)
            worth_now = f"worth {least.value:.4g}" if least.value is not None else f"not fit for use ({self._reason})"
            raise ValueError(
                f"`tolerance={self.tolerance}`: no cut is tolerated; with {least.removed:.1%} of the "
                f"{self.cutter.kind} gone, the network is {worth_now}, and the original worth {self.reference:.4g}. "
                "Choose a larger tolerance, or give more images to decide by (`images`)."
            )
        return self.best

    def _tolerates(self, plan: PruningPlan) -> bool:
        """Whether the cut of a plan is tolerated; it is made once, for a ranking may leap over several targets."""
        for ranks, verdict in self._known:
            if ranks == plan.ranks:
                return verdict
        cutter, value, found = self.cutter, None, None
        try:
            found = cutter.cut(plan)
        except ValueError as error:
            self._reason = str(error).rstrip(".")
        else:
            value = worth(self.evaluate, found.network)
            if not math.isfinite(value):
                value, self._reason = None, f"`evaluate` gave {value}"
        slack = 1e-6 * max(1.0, abs(self.reference))  # of an accuracy in float32, say
        tolerated = value is not None and value >= self.reference - self.tolerance - slack
        removed = 1.0 - cutter.cost.deployed(plan.ranks, cutter.kind) / cutter.full
        trial = CompressionTrial(removed, value, tolerated)
        self.trials.append(trial)
        self._known.append((plan.ranks, tolerated))
        if tolerated and (self.chosen is None or removed > self.chosen.removed):
            self.chosen, self.best = trial, found
        outcome = f"not fit for use: {self._reason}" if value is None else f"{value:.4g} of {self.reference:.4g}"
        cutter.say(f"{removed:.1%} of the {cutter.kind} gone: {outcome}, {'tolerated' if tolerated else 'too much'}")
        return tolerated


def cost_now(model: nn.Module, cost: ModelCost, kind: str) -> int:
    """What a decomposed model costs with the ranks that it has."""
    return cost.deployed({name: pair.rank for name, pair in named_pairs(model).items()}, kind)


def worth(evaluate: Evaluate, network: nn.Module) -> float:
    """What a network is worth when it is folded, in eval mode and without gradients.

    Raises:
        TypeError: If that is no number.
    """
    folded = fold(network)
    with evaluating(folded):
        value: Any = evaluate(folded)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`evaluate` must give a number, higher for a better network, got {type(value).__name__}."
        ) from error
