"""Records of runs that never were."""

from __future__ import annotations

from bsdp.cost import LayerCost, ModelCost
from bsdp.record import PruningRecord, RoundRecord


def make_record(
    *, layers: int, rounds: int, chosen: int | None = None, prefix: str = "", measured_macs: bool = True
) -> PruningRecord:
    """The record of a run that lost half a point of accuracy and an equal share of all ranks in every round.

    Args:
        layers: Decomposed layers, in three stages of blocks of two.
        rounds: Cuts after the unpruned model.
        chosen: Round the run ended with; the last one by default.
        prefix: Before all layer names.
        measured_macs: Whether MACs are known.
    """
    costs: dict[str, LayerCost] = {}
    for i in range(layers):
        stage = 3 * i // layers
        width = 16 * 2**stage
        name = f"{prefix}layer{stage + 1}.{sum(f'layer{stage + 1}.' in n for n in costs) // 2}.conv{i % 2 + 1}"
        costs[name] = LayerCost(9 * width, width, 1, width, False, (32 >> stage) ** 2 if measured_macs else None)
    cost = ModelCost(costs, fixed_params=2000, fixed_macs=50_000 if measured_macs else None)
    record = PruningRecord(target=0.5, tolerance=0.01, reference=0.98, cost=cost, input_shapes=[[1, 3, 32, 32]])
    record.chosen = rounds if chosen is None else chosen
    for number in range(rounds + 1):
        ranks = {n: max(1, round(c.full_rank * (1 - number / (rounds + 1)))) for n, c in costs.items()}
        value = 0.98 - 0.003 * number
        macs = cost.deployed(ranks, "macs") if measured_macs else None
        sizes = (cost.deployed(ranks, "bases"), cost.deployed(ranks))
        record.rounds.append(RoundRecord(number, number, ranks, *sizes, macs, value, value - 0.01, value))
    return record
