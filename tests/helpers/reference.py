"""Slow, obvious versions of what the core computes fast."""

import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
from bsdp.cost import LayerCost, ModelCost


def fvcore_macs(model: nn.Module, example_input: Tensor) -> int:
    """What fvcore counts, with nothing of ours in between."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model.eval(), example_input)
        return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def taylor_scores(
    gradients: Iterable[Mapping[str, Tensor]], scales: Mapping[str, Tensor], power: int
) -> dict[str, Tensor]:
    """Mean over minibatches of ``abs(s g) ** power``, one basis at a time."""
    batches = list(gradients)
    scores = {}
    for name, scale in scales.items():
        values = []
        for k in range(len(scale)):
            terms = [abs(float(scale[k].detach()) * float(batch[name][k])) ** power for batch in batches]
            values.append(sum(terms) / len(terms))
        scores[name] = torch.tensor(values)
    return scores


def input_moment(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``E[x x^T]`` of the unfolded input of an ungrouped Conv2d or Linear, ``[fan_in, fan_in]``."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
    else:
        assert isinstance(layer, nn.Conv2d)
        assert layer.groups == 1
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        rows = patches.movedim(1, -1).reshape(-1, patches.shape[1])
    return rows.T @ rows / len(rows)


def output_moment(layer: nn.Module, inputs: Tensor) -> Tensor:
    """``E[y y^T]`` of the outputs before the bias, ``[out_channels, out_channels]``."""
    outputs = layer(inputs)
    if layer.bias is not None:
        shape = (-1,) if isinstance(layer, nn.Linear) else (1, -1, *(1,) * (outputs.dim() - 2))
        outputs = outputs - layer.bias.view(shape)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    rows = outputs.movedim(axis, -1).reshape(-1, outputs.shape[axis]).detach()
    return rows.T @ rows / len(rows)


def unit_importance(scores: Tensor, groups: int) -> list[tuple[float, list[int]]]:
    """Units of a layer, weakest first: summed importance and the positions among all bases."""
    rank = len(scores) // groups
    per_group = []
    for g in range(groups):
        values = scores[g * rank : (g + 1) * rank].tolist()
        per_group.append(sorted(range(rank), key=lambda i: (values[i], i)))
    units = []
    for position in range(rank):
        members = [g * rank + per_group[g][position] for g in range(groups)]
        units.append((sum(float(scores[m]) for m in members), members))
    return units


def floor_of(rank: int, min_rank: int, cap: Fraction, layer: LayerCost) -> int:
    """The least rank one plan may leave."""
    if layer.positions == 0 or layer.whole:
        return rank  # never called, or somebody reads its weight
    by_cap = rank - (rank * cap.numerator) // cap.denominator
    return max(min(min_rank, rank), by_cap, 1)


def slow_select(
    importance: Mapping[str, Tensor],
    cost: ModelCost,
    *,
    budget: float,
    kind: str,
    ranking: str,
    min_rank: int = 1,
    cap: Fraction = Fraction(95, 100),
) -> tuple[dict[str, int], dict[str, list[int]], bool]:
    """One removal at a time, costing the whole model anew before each. Returns ranks, kept positions, reached."""
    units = {name: unit_importance(scores, cost.layers[name].groups) for name, scores in importance.items()}
    full = {name: len(u) for name, u in units.items()}
    ranks = dict(full)
    floors = {name: floor_of(rank, min_rank, cap, cost.layers[name]) for name, rank in full.items()}
    while cost.deployed(ranks, kind) > budget:
        choice = _best_run(units, full, ranks, floors, cost, kind, ranking)
        if choice is None:
            break
        name, count = choice
        ranks[name] -= count
    keep = {}
    for name, layer_units in units.items():
        keep[name] = sorted(m for _, members in layer_units[full[name] - ranks[name] :] for m in members)
    return ranks, keep, cost.deployed(ranks, kind) <= budget


def _best_run(
    units: Mapping[str, list[tuple[float, list[int]]]],
    full: Mapping[str, int],
    ranks: Mapping[str, int],
    floors: Mapping[str, int],
    cost: ModelCost,
    kind: str,
    ranking: str,
) -> tuple[str, int] | None:
    """The next removal: the cheapest single unit, or for the hull the run of units that loses least per cost saved."""
    best: tuple[Fraction, int, int] | None = None
    names = list(units)
    for index, name in enumerate(names):
        done = full[name] - ranks[name]
        most = ranks[name] - floors[name]
        for count in range(1, (most if ranking == "hull" else min(most, 1)) + 1):
            lost = sum((Fraction(v) for v, _ in units[name][done : done + count]), Fraction(0))
            if ranking == "importance":
                value = lost
            elif ranking == "per_cost":
                value = lost / unit_price(cost.layers[name], kind)
            elif ranking == "local":
                value = Fraction(done + 1, full[name])
            elif ranking == "isomorphic":
                alike = [n for n in names if _shape(cost.layers[n]) == _shape(cost.layers[name])]
                peers = [v for n in alike if cost.layers[n].cuttable for v, _ in units[n]]
                value = Fraction(sum(v <= units[name][done][0] for v in peers), len(peers))
            else:
                after = {**ranks, name: ranks[name] - count}
                saved = cost.deployed(ranks, kind) - cost.deployed(after, kind)
                if saved <= 0:
                    continue
                value = lost / saved
            if best is None or (value, index, count) < best:
                best = (value, index, count)
    return None if best is None else (names[best[1]], best[2])


def _shape(layer: LayerCost) -> tuple[int, int, int]:
    return layer.fan_in, layer.out_channels, layer.groups


def unit_price(layer: LayerCost, kind: str) -> int:
    """What one unit costs in a layer that is deployed as a pair."""
    if kind == "bases":
        return layer.groups
    weights = layer.groups * layer.fan_in + layer.out_channels
    return weights if kind == "params" else weights * (layer.positions or 0)


def masked(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Switch off, in place, every basis that is not kept, by a scaling factor of zero."""
    for name, pair in bsdp.named_pairs(model).items():
        mask = torch.ones_like(pair.scaling.delta, dtype=torch.bool)
        mask[keep[name]] = False
        with torch.no_grad():
            pair.scaling.delta[mask] = -1.0
