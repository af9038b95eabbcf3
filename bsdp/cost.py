"""What a layer costs at a rank: the pair, the re-fused layer, and the cheaper of the two.

With `groups` g, `fan_in` m and `out_channels` o the fused layer has ``o * m`` weights and the pair
``rank * (g * m + o)``; multiply-adds are the same numbers times the output positions. Both break even at
``o * m / (g * m + o)``. A transposed convolution works at the positions of its input, and its 1x1 layer at the
``expansion`` times more positions of the output, so that its multiply-adds break even earlier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from bsdp._checks import check_choice
from bsdp.layers import BasisPair, is_transposed, layer_groups, layer_outputs, weight_of

COST_KINDS = ("params", "macs", "bases")


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

    @property
    def cuttable(self) -> bool:
        """Whether removing bases can pay: not in a layer that must stay whole or is never called."""
        return not self.whole and self.positions != 0

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
        """The largest rank at which the pair is strictly cheaper than the fused layer; 0 if there is none."""
        return 0 if self.whole else min(self.full_rank, math.ceil(self.break_even_rank) - 1)

    def slope(self, kind: str) -> int:
        """What one more basis in every group adds to the pair.

        Args:
            kind: ``"params"``, ``"macs"`` or ``"bases"``.
        """
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
            kind: ``"params"`` (biases included), ``"macs"`` or ``"bases"``.
            new_bias: Whether a cut below full rank gives the layer a bias that the original lacked (mean-to-bias).
        """
        if kind == "bases":
            return self.groups * rank
        pair = self.kind(rank) == "pair"
        if kind == "macs":
            return rank * self.slope(kind) if pair else self.fused * self._measured()
        has_bias = self.bias or self.added_bias or (new_bias and rank < self.full_rank)
        return (rank * self.per_rank if pair else self.fused) + (self.out_channels if has_bias else 0)

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
        fan_in, bias, whole = layer.fan_in, layer.had_bias, layer.whole
        added = not bias and not layer.scaling.bias.is_meta and layer.needs_bias
    else:
        fan_in, bias, whole = weight_of(layer).numel() // outputs, layer.bias is not None, False
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
    )


@dataclass(frozen=True)
class ModelCost:
    """The cost of a whole model as a function of the ranks of its pairs.

    Attributes:
        layers: The decomposed layers.
        fixed_params: Parameters of everything else, the head included.
        fixed_macs: Multiply-adds of everything else for one example; None when not measured.
        new_bias: Whether cuts move means into biases, which then count.
    """

    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    fixed_params: int = 0
    fixed_macs: int | None = None
    new_bias: bool = True

    def fixed(self, kind: str) -> int:
        """Cost of what is not decomposed."""
        check_choice("kind", kind, COST_KINDS)
        if kind == "bases":
            return 0
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
