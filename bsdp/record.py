"""The history of one pruning run, as plain values that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bsdp.cost import LayerCost, ModelCost
from bsdp.latency import LayerLatency


@dataclass(frozen=True)
class RoundRecord:
    """One structure the model had, round 0 being the unpruned decomposed model.

    Attributes:
        round: 0 for the unpruned model, then 1, 2, ...
        epoch: First epoch that trained with this structure.
        ranks: Rank per group and layer.
        bases: Live bases of all layers.
        params: Parameters of the whole folded model.
        macs: Multiply-adds of the whole folded model for one example; None when not measured.
        accuracy_before: The monitored value at the last validation before the cut; None for round 0.
        accuracy_after: The monitored value at the first validation after the cut.
        accuracy_best: Best monitored value of this structure.
        channels: Output channels of every layer whose channels can be pruned; empty where only bases are.
        layers: One row per layer as in a summary, where the cost of the record cannot tell because channels went.
        stage: What the cut removed, where there is a choice.
        latency: Nanoseconds of a pass of the whole folded model by the latency table; None without one.
    """

    round: int
    epoch: int
    ranks: dict[str, int]
    bases: int
    params: int
    macs: int | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_best: float | None = None
    channels: dict[str, int] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    stage: str = ""
    latency: int | None = None


@dataclass
class PruningRecord:
    """What a pruning run did so far; the pruning callback fills it, reports read it.

    Attributes:
        monitor: Name of the validation metric.
        mode: ``"max"`` or ``"min"``.
        target: Share to remove.
        target_kind: ``"params"``, ``"macs"``, ``"bases"`` or ``"latency"``.
        tolerance: Largest allowed fall of the metric below the reference; None for no limit.
        network: Dotted name of the plain network inside the module ("" for the module itself); what is exported.
        cost: Cost of the model as a function of its ranks.
        input_shapes: Shapes of the network's inputs for one example, batch axis first; empty when never seen.
        rounds: The structures in order.
        reference: Best monitored value of the unpruned model in the warm-up.
        chosen: Index in `rounds` of the structure the run ended with; None while it runs.
        reference_state: Values of the whole module at the reference, see `bsdp.snapshots`; not part of a report.
        reference_shape: Widths and scales of the module at the reference, see `bsdp.structure.shape_of`.
    """

    monitor: str = "val_accuracy"
    mode: str = "max"
    target: float = 0.0
    target_kind: str = "params"
    tolerance: float | None = None
    network: str = ""
    cost: ModelCost = field(default_factory=ModelCost)
    input_shapes: list[list[int]] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    reference: float | None = None
    chosen: int | None = None
    reference_state: dict[str, Any] | None = None
    reference_shape: dict[str, Any] = field(default_factory=dict)

    def update_last(self, **changes: Any) -> None:
        """Change fields of the newest round."""
        self.rounds[-1] = replace(self.rounds[-1], **changes)

    def original(self, kind: str) -> int:
        """Params, macs, bases, latency or channels of the original network."""
        return sum(self.rounds[0].channels.values()) if kind == "channels" else self.cost.original(kind)

    def kept(self, record: RoundRecord, kind: str) -> float | None:
        """Share of the original params, macs, bases, latency or channels a round keeps; None when there are none."""
        value = sum(record.channels.values()) if kind == "channels" else getattr(record, kind)
        return None if value is None or not self.original(kind) else value / self.original(kind)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        state = {key: value for key, value in vars(self).items() if key not in ("cost", "rounds")}
        state["rounds"] = [asdict(r) for r in self.rounds]
        state["cost"] = {
            "layers": {name: asdict(layer) for name, layer in self.cost.layers.items()},
            "fixed_params": self.cost.fixed_params,
            "fixed_macs": self.cost.fixed_macs,
            "new_bias": self.cost.new_bias,
            "fixed_latency": self.cost.fixed_latency,
        }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for key, value in state.items():
            if key not in ("cost", "rounds"):
                setattr(self, key, value)
        self.rounds = [RoundRecord(**r) for r in state["rounds"]]
        cost = dict(state["cost"])
        layers = {name: _layer_cost(layer) for name, layer in cost.pop("layers").items()}
        self.cost = ModelCost(layers=layers, **cost)


def _layer_cost(values: Mapping[str, Any]) -> LayerCost:
    times = values.get("latency")
    return LayerCost(**{**values, "latency": None if times is None else LayerLatency(**times)})
