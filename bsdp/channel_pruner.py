"""Iterative channel pruning; training loops and the Lightning callback only call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bsdp.channel_check import check_training
from bsdp.channel_criteria import data_free_scores
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_group import ChannelGroup
from bsdp.channel_importance import ChannelScores
from bsdp.channel_latency import ChannelLatencyTable
from bsdp.channel_means import InputMeans, move_means_to_bias
from bsdp.channel_scales import ScaleScores, add_scales, keep_scales
from bsdp.channel_selection import NO_WIDTHS, ChannelCost, ChannelPlan, least_units, makers_of, select_channels
from bsdp.channel_settings import SCALED, ChannelPruningSettings
from bsdp.channel_surgery import remove_channels
from bsdp.cost import ModelCost
from bsdp.layers import named_pairs
from bsdp.optimizers import Turns, held_by, held_parts
from bsdp.plain_layers import layer_groups
from bsdp.probing import as_inputs
from bsdp.record import RoundRecord
from bsdp.round_settings import out_of_rounds
from bsdp.rounds import RoundPruner
from bsdp.scale_hooks import scales_of
from bsdp.sparsifiers import add_l1_gradient
from bsdp.stats import described_layers, layer_rows, measure_cost, measure_positions
from bsdp.widths import widths_of


class ChannelStage:
    """Scores and removes the channels of a network.

    Args:
        network: A plain or decomposed network.
        example: Example inputs, batch size 1.
        settings: With the fields of `ChannelPruningSettings` that concern channels.
        kind: What budgets count.
        new_bias: Whether cuts of bases move means into biases.
        latency: For budgets of latency: the times of the layers by width.

    Raises:
        UntraceableError: If the dependencies between channels cannot be found, or a layer reads them in training only.
        ValueError: If the criterion does not go with the network.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Any,
        settings: Any,
        *,
        kind: str,
        new_bias: bool = False,
        latency: ChannelLatencyTable | None = None,
    ) -> None:
        self.network, self.settings, self.kind, self.new_bias = network, settings, kind, new_bias
        self.latency = latency
        self.example = as_inputs(example)
        self.groups = channel_groups(network, self.example, exclude=settings.exclude)
        check_training(network, self.example, self.groups)
        self.makers = makers_of(self.groups)  # those of the original, so that counts of channels compare
        norms = {m.layer for group in self.groups.values() for m in group.members if m.batch_norm}
        layers = described_layers(network) | {name: network.get_submodule(name) for name in norms}
        self.positions = measure_positions(network, layers, self.example)
        self.means = InputMeans(network, self.groups)
        self._turns = Turns()
        self._computed: dict[str, Tensor] | None = None  # since the last step, so that plans of one cut agree
        self.scores: Any
        if settings.criterion in SCALED:
            if scales_of(network) is None:
                add_scales(network, self.groups)
            self.scores = ScaleScores(network, self.groups, taylor=settings.criterion == "transtailor")
        else:
            options = {"criterion": settings.criterion, "normalize": settings.normalize, "seed": settings.seed}
            self.scores = ChannelScores(network, self.groups, **options)

    @property
    def needs_gradients(self) -> bool:
        """Whether `update` must see gradients."""
        return bool(self.scores.needs_gradients)

    @property
    def needs_hooks(self) -> bool:
        """Whether scores come from `collecting`."""
        return bool(self.scores.needs_hooks)

    @property
    def scored(self) -> set[str]:
        """Groups that can get scores; the others stay whole."""
        if self.settings.criterion == "bn_scale":
            return set(data_free_scores(self.network, self.groups, "bn_scale"))
        return set(self.groups)

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds anything of the network."""
        return not held_by(optimizer).isdisjoint(map(id, self.network.parameters()))

    @torch.no_grad()
    def update(self, optimizer: Optimizer | None = None, optimizers: Sequence[Optimizer] = ()) -> None:
        """Add the scores of the gradients that stand now, those of every group with one of the optimizers."""
        self._computed = None
        ours = [other for other in optimizers if self.holds(other)] if len(optimizers) > 1 else []
        if optimizer is None or len(ours) < 2 or all(other is not optimizer for other in ours):
            self.scores.update()
        elif isinstance(self.scores, ChannelScores):
            self.scores.update(self._turns.of(optimizer, self.scores.parameters(), ours))
        elif all(self._turns.of(optimizer, {"scales": self.penalised()}, ours)):
            self.scores.update()

    def penalise(self, optimizer: Optimizer | None = None) -> None:
        """Add the gradient of the L1 penalty to what the optimizer holds."""
        if self.settings.l1:
            add_l1_gradient(held_parts(self.penalised(), optimizer), self.settings.l1)

    def penalised(self) -> list[Tensor]:
        """What the L1 penalty is on: channel factors, or the batch-norm weights of the groups."""
        scales = scales_of(self.network)
        if scales is not None:
            return [scales.weight]
        names = {m.layer for group in self.groups.values() for m in group.members if m.batch_norm}
        found = (self.network.get_submodule(name).weight for name in sorted(names))
        return [weight for weight in found if isinstance(weight, Tensor)]

    def reset(self) -> None:
        """Forget all scores."""
        self._computed = None
        self._turns.reset()
        self.scores.reset()
        self.means.reset()

    def rebind(self) -> None:
        """Follow the network after a cut of channels, forgetting all scores."""
        self.groups = channel_groups(self.network, self.example, exclude=self.settings.exclude, check=False)
        self._computed = None
        self._turns.reset()
        self.scores.rebind(self.groups)
        self.means.rebind(self.groups)

    def collecting(
        self, scale: float, parts: int = 1, *, scores: bool = True, statistics: bool = True
    ) -> ExitStack | None:
        """Watch what the layers read; terms are those of a whole optimizer step, whatever its parts."""
        stack = ExitStack()
        if scores and self.scores.needs_hooks:
            stack.enter_context(self.scores.collecting(scale))
        if statistics and self.settings.mean_to_bias and self.means.layers:
            stack.enter_context(self.means.collecting())
        return stack

    def cost(self, cost: ModelCost) -> ChannelCost:
        """The cost of the network as a function of its channels, from that of the network now."""
        ranks = {name: pair.rank for name, pair in named_pairs(self.network).items()}
        total = 0 if self.kind == "channels" else cost.deployed(ranks, self.kind)
        options: dict[str, Any] = {"kind": self.kind, "new_bias": self.new_bias}
        return ChannelCost(
            self.network,
            self.groups,
            total=total,
            positions=self.positions,
            makers=self.makers,
            latency=self.latency,
            **options,
        )

    def least(self) -> dict[str, int]:
        """Units that every group keeps at least.

        With one unit a grouped convolution may become a depthwise one, which its factors then pass instead of being
        read by it.
        """
        least = dict.fromkeys(self.groups, int(self.settings.min_channels))
        if scales_of(self.network) is not None:
            for name, group in self.groups.items():
                ends = (m.layer for m in group.members if m.weighted and m.side != "both")
                if any(layer_groups(self.network.get_submodule(layer)) > 1 for layer in ends):
                    least[name] = max(2, least[name])
        return least

    def plan(self, budget: float, cost: ModelCost) -> ChannelPlan:
        """Plan the removal of the weakest channels."""
        settings, reckoning = self.settings, self.cost(cost)
        if self._computed is None:
            self._computed = self.scores.compute()
        scores = self._computed
        if settings.macs_penalty:
            scores = self._penalise_macs(scores)
        return select_channels(
            scores,
            reckoning,
            budget=budget,
            ranking=settings.ranking_of_channels,
            min_channels=self.least(),
            max_group_ratio=settings.max_group_ratio,
            round_to=settings.round_to,
            threshold=settings.threshold,
            theta=settings.theta,
        )

    def _penalise_macs(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``Theta - lambda * Theta_flops`` of Molchanov et al. 2016.

        Ours: MACs are counted as a share of the dearest group's, so that a penalty means the same for all networks.
        """
        reckoning = ChannelCost(self.network, self.groups, kind="macs", positions=self.positions)
        macs = {name: reckoning.saved(name) for name in scores}
        most = max(macs.values(), default=1.0) or 1.0
        lowered = {n: score - self.settings.macs_penalty * macs[n] / most for n, score in scores.items()}
        least = min((float(score.min()) for score in lowered.values()), default=0.0)
        return {name: score - min(least, 0.0) for name, score in lowered.items()}  # the order stays, none is negative

    def apply(self, plan: ChannelPlan, optimizers: Iterable[Optimizer]) -> bool:
        """Remove what the plan names."""
        optimizers = list(optimizers)
        if any(units.numel() for units in plan.remove.values()):
            changes = plan_removal(self.network, self.example, self.groups, plan.remove)
            if self.settings.mean_to_bias and scales_of(self.network) is None:
                move_means_to_bias(self.network, self.groups, plan.remove, self.means.compute())
            remove_channels(self.network, changes, optimizers=optimizers)
            if scales_of(self.network) is not None:
                keep = _kept(self.groups, plan.remove)
                groups = channel_groups(self.network, self.example, exclude=self.settings.exclude, check=False)
                keep_scales(self.network, groups, keep, optimizers)
        return plan.reached

    def channels(self) -> dict[str, int]:
        """Output channels of the layers that made the channels of a group before the first cut."""
        sizes = {name: self.network.get_submodule(name) for name in self.makers}
        return {name: int(getattr(m, "out_channels", getattr(m, "out_features", 0))) for name, m in sizes.items()}

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Average scores over processes."""
        self._computed = None
        self.scores.reduce(reduce)
        if self.settings.mean_to_bias:
            self.means.reduce(reduce)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {"scores": self.scores.state_dict(), "means": self.means.state_dict(), "makers": self.makers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.scores.load_state_dict(state["scores"])
        self.means.load_state_dict(state["means"])
        self.makers = list(state.get("makers", self.makers))  # older files have none


def _kept(groups: Mapping[str, ChannelGroup], remove: Mapping[str, Tensor]) -> Tensor:
    """Positions, among the units of all groups in a row, of those that stay."""
    keep, first = [], 0
    for name, group in groups.items():
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[remove[name]] = False
        keep.append(mask.nonzero().flatten() + first)
        first += group.size
    return torch.cat(keep)


class ChannelPruner(RoundPruner):
    """Prunes the channels of a plain or decomposed model round by round while somebody trains it.

    See `RoundPruner` for the calls that a training loop makes; keep `collecting` open on some batches.

    Args:
        model: The model whose state is kept and restored.
        settings: What to do.
        example: Example inputs of the network, batch size 1.
        cost: Cost of the network; None to measure it.
        network: Dotted name of the network inside `model`; "" for the model itself.
        monitor: Name of the observed value, for reports.
        latency: Times of the layers by width, for ``target_kind="latency"``.

    Raises:
        UntraceableError: If the dependencies between channels cannot be found.
        ValueError: If the target is out of reach, or the table is missing or of another network.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ChannelPruningSettings,
        example: Tensor | tuple[Tensor, ...],
        *,
        cost: ModelCost | None = None,
        network: str = "",
        monitor: str = "accuracy",
        latency: ChannelLatencyTable | None = None,
    ) -> None:
        part = model.get_submodule(network) if network else model
        if settings.target_kind == "latency" or latency is not None:
            check_plain(part)
        if settings.target_kind == "latency" and latency is None:
            raise ValueError(f"`target_kind='latency'`: {NO_WIDTHS}")
        if latency is not None:
            latency.check(part, ())
        cost = measure_cost(part, as_inputs(example), new_bias=False) if cost is None else cost
        self.stage = ChannelStage(part, example, settings, kind=settings.target_kind, latency=latency)
        if latency is not None:
            members = (member for group in self.stage.groups.values() for member in group.members)
            latency.check(part, {member.layer for member in members if member.weighted})
            cost = replace(cost, fixed_latency=latency.of(part))
        super().__init__(model, settings, cost, {"channel": self.stage}, network=network, monitor=monitor)
        if self.original_known:
            self.check_target()
        self.record.rounds.append(self._round_record(0, 0))

    def check_target(self) -> None:
        """Refuse a target beyond what is gone when every group has its least number of channels.

        A smaller one may still be missed: a round stops at its own budget, and the ratio then bounds the last one.
        """
        most, in_rounds = self.largest_share(), self.largest_share(rounds=self.settings.known_rounds)
        if self.settings.target > most:
            least = self.settings.min_channels
            grouped = any(units > least for units in self.stage.least().values())
            but = " (two in each group of a grouped convolution)" if grouped else ""
            raise ValueError(
                f"`target={self.settings.target}` is out of reach: with {least} channel(s) left in "
                f"every group that has scores{but}, {most:.1%} of the {self.settings.target_kind} would be gone (the "
                f"channels of inputs and outputs stay). Choose a target below {most:.3f}, or prune bases, too."
            )
        if self.settings.target > in_rounds:
            raise ValueError(out_of_rounds(self.settings, in_rounds, channels_in_a_round(self.settings)))

    @property
    def original_known(self) -> bool:
        """Whether no layer has lost channels: else the original's cost is not known before the state is loaded."""
        return not widths_of(self.network)

    def largest_share(self, *, rounds: int | None = None) -> float:
        """What would be gone with the least channels in every group: the ceiling of any target.

        Args:
            rounds: Cuts in which to get there, each bounded by ``max_group_ratio``; None for no such bound.
        """
        return 1.0 - smallest_cost(self.stage, self.cost, rounds=rounds) / self.original(self.settings.target_kind)

    def original(self, kind: str) -> float:
        """Cost of the network before the first cut."""
        return float(sum(self.stage.channels().values()) if kind == "channels" else self.cost.original(kind))

    def measured_cost(self) -> ModelCost:
        """Cost of the network as it is now."""
        cost = measure_cost(self.network, self.stage.example, new_bias=self.stage.new_bias)
        table = self.stage.latency
        return cost if table is None else replace(cost, fixed_latency=table.of(self.network))

    def describe(self, record: RoundRecord) -> RoundRecord:
        """Add channels and layers."""
        return describe_channels(record, self.stage)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, be it of a run without times."""
        super().load_state_dict(state)
        table, record = self.stage.latency, self.record
        if table is not None and record.cost.fixed_latency is None:
            record.cost = replace(record.cost, fixed_latency=table.original_ns)
            record.rounds[0] = replace(record.rounds[0], latency=table.original_ns)
            record.update_last(latency=table.of(self.network))


def check_plain(network: nn.Module) -> None:
    """Refuse a budget of latency for a decomposed network, whose times by width nobody measures."""
    if named_pairs(network):
        raise ValueError(
            "`target_kind: latency` of channels counts with times of plain layers, and this network is decomposed: "
            "prune its bases with that budget (`IterativeBasisPruning`), or leave `BasisDecomposition` out."
        )


def smallest_cost(
    stage: ChannelStage, cost: ModelCost, *, rounds: int | None = None, ranks: Mapping[str, int] | None = None
) -> float:
    """What is left with the least number of channels in every group that gets scores.

    Args:
        stage: The channels.
        cost: Cost of the network now.
        rounds: Cuts in which to get there, each bounded by ``max_group_ratio``; None for no such bound.
        ranks: Ranks of the pairs then; None for those they have.
    """
    reckoning, settings, scored = stage.cost(cost), stage.settings, stage.scored
    limits = {"max_group_ratio": settings.max_group_ratio, "round_to": settings.round_to, "rounds": rounds}
    for name, least in stage.least().items():
        if name in scored:
            group = stage.groups[name]
            reckoning.remove(name, group.size - least_units(group, min_channels=least, **limits))
    if ranks is None:
        return float(reckoning.total)
    inside = reckoning.with_ranks(ranks)
    present = {name: pair.rank for name, pair in named_pairs(stage.network).items()}
    others = [name for name in cost.layers if name not in reckoning.layers]  # of no group: their channels stay
    options: dict[str, Any] = {"kind": stage.kind, "new_bias": cost.new_bias}
    layers = cost.layers
    return inside + sum(
        layers[n].deployed(ranks[n], **options) - layers[n].deployed(present[n], **options) for n in others
    )


def channels_in_a_round(settings: Any) -> str:
    """What one round may remove, in words."""
    return f"`max_group_ratio={settings.max_group_ratio}` of a group of channels (`round_to={settings.round_to}`)"


def describe_channels(record: RoundRecord, stage: ChannelStage) -> RoundRecord:
    """Complete a round with the channels and one row per layer."""
    rows = layer_rows(stage.network, stage.positions, new_bias=stage.new_bias)
    return replace(record, channels=stage.channels(), layers=rows)
