"""What a layer costs at a rank: the pair, the re-fused layer, and the cheaper of the two.

With `groups` g, `fan_in` m and `out_channels` o the fused layer has ``o * m`` weights and the pair
``rank * (g * m + o)``; multiply-adds are the same numbers times the output positions. Both break even at
``o * m / (g * m + o)``. A transposed convolution works at the positions of its input, and its 1x1 layer at the
``expansion`` times more positions of the output, so that its multiply-adds break even earlier.

With a table of measured times (`bsdp.LatencyTable`) a layer is a pair only where that is faster on the machine of the
table, for every kind of cost, and the kind ``"latency"`` counts the nanoseconds of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from bsdp._checks import check_choice
from bsdp.latency import LatencyTable, LayerLatency
from bsdp.layers import BasisPair
from bsdp.plain_layers import is_transposed, layer_groups, layer_outputs, weight_of

COST_KINDS = ("params", "macs", "bases")
BASIS_KINDS = (*COST_KINDS, "latency")
_NO_TIMES = (
    "latency was not measured: give a table to the cost (`bsdp.measure_cost(model, example, latency=table)` with "
    "`table = bsdp.measure_latency_table(model, example)` or `bsdp.LatencyTable.load(path)`)."
)


@dataclass(frozen=True)
class Positions:
    """Positions per example at which a layer is computed, summed over all its calls; zeros if it is never called.

    Attributes:
        weights: Where the layer's own weights apply: output positions, or the input's of a transposed convolution.
        outputs: Output positions, where the 1x1 layer of a pair applies.
    """

    weights: int
    outputs: int


@dataclass(frozen=True)
class LayerCost:
    """The cost of one decomposed layer as a function of its rank.

    Attributes:
        fan_in: Inputs of one filter, ``in_channels / groups * kernel positions``.
        out_channels: Output channels or features.
        groups: Groups of the convolution.
        full_rank: Largest rank per group, ``min(fan_in, out_channels / groups)``.
        bias: Whether the original layer has a bias.
        positions: Positions per example of the layer's weights (see `Positions`); None when not measured.
        output_positions: Positions of the 1x1 layer; None: the same.
        expansion: Output positions per position of the weights, as the stride of a transposed convolution says.
        whole: Whether the layer must stay one layer, because other code reads its weight or knows its arguments.
        added_bias: Whether mean-to-bias has given it a bias that the original lacks.
        latency: Measured times; None when not measured.
        pair_limit: The largest rank at which the layer is deployed as a pair; None: as the weights say.
    """

    fan_in: int
    out_channels: int
    groups: int
    full_rank: int
    bias: bool
    positions: int | None = None
    output_positions: int | None = None
    expansion: int = 1
    whole: bool = False
    added_bias: bool = field(default=False, compare=False)
    latency: LayerLatency | None = None
    pair_limit: int | None = None

    @property
    def cuttable(self) -> bool:
        """Whether removing bases can pay: not in a layer that must stay whole, is never called or is faster fused."""
        return not self.whole and self.positions != 0 and self.pair_limit != 0

    def smallest_rank(self, min_rank: int = 1) -> int:
        """The least rank that cuts can leave when every layer keeps `min_rank`."""
        return min(min_rank, self.full_rank) if self.cuttable else self.full_rank

    @property
    def fused(self) -> int:
        """Weights of the original layer, without its bias."""
        return self.out_channels * self.fan_in

    @property
    def per_rank(self) -> int:
        """Weights that one more basis in every group adds to the pair."""
        return self.groups * self.fan_in + self.out_channels

    @property
    def break_even_rank(self) -> float:
        """The rank at which the pair costs as much as the fused layer (multiply-adds, where the two differ)."""
        return self.fused / (self.groups * self.fan_in + self.out_channels * self.expansion)

    @property
    def largest_useful_rank(self) -> int:
        """The largest rank at which the pair is strictly cheaper than the fused layer; 0 if there is none.

        Where times were measured it must be faster, too.
        """
        by_weights = 0 if self.whole else min(self.full_rank, math.ceil(self.break_even_rank) - 1)
        return by_weights if self.pair_limit is None else min(by_weights, self.pair_limit)

    def slope(self, kind: str) -> int:
        """What one more basis in every group adds to the pair.

        Args:
            kind: ``"params"``, ``"macs"``, ``"bases"`` or ``"latency"`` (then the mean over the ranks that pay).
        """
        if kind == "latency":
            times, top = self._times(), self.largest_useful_rank
            return max(1, (times.pair(top) - times.pair(1)) // (top - 1)) if top > 1 else max(1, times.fused_ns)
        if kind == "bases":
            return self.groups
        if kind == "params":
            return self.per_rank
        positions = self._measured()
        outputs = positions if self.output_positions is None else self.output_positions
        return self.groups * self.fan_in * positions + self.out_channels * outputs

    def kind(self, rank: int) -> str:
        """How the layer is deployed at a rank: ``"pair"`` or ``"fused"``; fused when both cost the same."""
        return "pair" if rank <= self.largest_useful_rank else "fused"

    def deployed(self, rank: int, *, kind: str = "params", new_bias: bool = True) -> int:
        """Cost of the deployed layer at a rank.

        Args:
            rank: Basis vectors per group.
            kind: ``"params"`` (biases included), ``"macs"``, ``"bases"`` or ``"latency"`` (nanoseconds by the table).
            new_bias: Whether a cut below full rank gives the layer a bias that the original lacked (mean-to-bias).
        """
        if kind == "bases":
            return self.groups * rank
        pair = self.kind(rank) == "pair"
        if kind == "latency":
            return self._times().pair(rank) if pair else self._times().fused_ns
        if kind == "macs":
            return rank * self.slope(kind) if pair else self.fused * self._measured()
        has_bias = self.bias or self.added_bias or (new_bias and rank < self.full_rank)
        return (rank * self.per_rank if pair else self.fused) + (self.out_channels if has_bias else 0)

    def _times(self) -> LayerLatency:
        if self.latency is None:
            raise ValueError(_NO_TIMES)
        return self.latency

    def _measured(self) -> int:
        if self.positions is None:
            raise ValueError("MACs need the output positions of the layers: measure the cost with an example input.")
        return self.positions

    def original(self, *, kind: str = "params") -> int:
        """Cost of the original layer (for ``"bases"``: all bases at full rank)."""
        return replace(self, added_bias=False).deployed(self.full_rank, kind=kind)


def layer_cost(layer: nn.Module, *, positions: Positions | None = None) -> LayerCost:
    """Read the geometry of a pair, or of a convolution or linear layer, into a `LayerCost`.

    Args:
        layer: A `BasisPair`, or a layer that one can stand in for.
        positions: Where it is computed.
    """
    groups, outputs = layer_groups(layer), layer_outputs(layer)
    if isinstance(layer, BasisPair):
        fan_in, bias, whole, limit = layer.fan_in, layer.had_bias, layer.whole, layer.pair_limit
        added = not bias and not layer.scaling.bias.is_meta and layer.needs_bias
    else:
        fan_in, bias, whole, limit = weight_of(layer).numel() // outputs, layer.bias is not None, False, None
        added = False
    return LayerCost(
        fan_in=fan_in,
        out_channels=outputs,
        groups=groups,
        full_rank=min(fan_in, outputs // groups),
        bias=bias,
        added_bias=added,
        positions=None if positions is None else positions.weights,
        output_positions=None if positions is None else positions.outputs,
        expansion=math.prod(layer.stride) if is_transposed(layer) else 1,  # type: ignore[arg-type]
        whole=whole,
        pair_limit=limit,
    )


@dataclass(frozen=True)
class ModelCost:
    """The cost of a whole model as a function of the ranks of its pairs.

    Attributes:
        layers: The decomposed layers.
        fixed_params: Parameters of everything else, the head included.
        fixed_macs: Multiply-adds of everything else for one example; None when not measured.
        new_bias: Whether cuts move means into biases, which then count.
        fixed_latency: Nanoseconds of everything else in a pass, by a latency table; None without one.
    """

    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    fixed_params: int = 0
    fixed_macs: int | None = None
    new_bias: bool = True
    fixed_latency: int | None = None

    def with_latency(self, table: LatencyTable) -> ModelCost:
        """The same cost with the times of a table, which then decide at which ranks a layer is a pair.

        Raises:
            ValueError: If the table is of another network.
        """
        table.check(self.layers)
        layers = {
            name: replace(layer, latency=table.layers[name], pair_limit=table.layers[name].pair_limit)
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers, fixed_latency=table.fixed_ns)

    def with_times_of(self, other: ModelCost) -> ModelCost:
        """The same cost with the measured times of another one of the same layers, unless it has its own."""
        if self.knows("latency") or not other.knows("latency"):
            return self
        layers = {
            name: replace(layer, latency=other.layers[name].latency, pair_limit=other.layers[name].pair_limit)
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers, fixed_latency=other.fixed_latency)

    def knows(self, kind: str) -> bool:
        """Whether everything that a kind of cost needs was measured."""
        return {"macs": self.fixed_macs, "latency": self.fixed_latency}.get(kind, 0) is not None

    def fixed(self, kind: str) -> int:
        """Cost of what is not decomposed."""
        check_choice("kind", kind, BASIS_KINDS)
        if kind == "bases":
            return 0
        if kind == "latency":
            if self.fixed_latency is None:
                raise ValueError(_NO_TIMES)
            return self.fixed_latency
        if kind == "params":
            return self.fixed_params
        if self.fixed_macs is None:
            raise ValueError("MACs were not measured: measure the cost with an example input.")
        return self.fixed_macs

    def original(self, kind: str = "params") -> int:
        """Cost of the original, undecomposed model."""
        return self.fixed(kind) + sum(layer.original(kind=kind) for layer in self.layers.values())

    def deployed(self, ranks: Mapping[str, int], kind: str = "params") -> int:
        """Cost of the folded model at the given ranks."""
        return self.fixed(kind) + sum(
            layer.deployed(ranks[name], kind=kind, new_bias=self.new_bias) for name, layer in self.layers.items()
        )

    def smallest(self, kind: str = "params", *, min_rank: int = 1) -> int:
        """The least cost that any plan can leave."""
        return self.deployed({name: layer.smallest_rank(min_rank) for name, layer in self.layers.items()}, kind)
