"""The record of a run and its way through a checkpoint."""

import io

import pytest
import torch

from bsdp.cost import LayerCost, ModelCost
from bsdp.record import PruningRecord, RoundRecord


def example() -> PruningRecord:
    layers = {"conv1": LayerCost(27, 8, 1, 8, False, 64), "conv2": LayerCost(36, 12, 2, 6, True, 16)}
    return PruningRecord(
        monitor="val_accuracy",
        target=0.7,
        target_kind="macs",
        tolerance=0.01,
        network="net",
        cost=ModelCost(layers, 100, 2000, True),
        input_shapes=[[1, 3, 8, 8]],
        rounds=[
            RoundRecord(round=0, epoch=0, ranks={"conv1": 8, "conv2": 6}, bases=20, params=700, macs=30_000),
            RoundRecord(round=1, epoch=2, ranks={"conv1": 4, "conv2": 6}, bases=16, params=600, macs=20_000),
        ],
        reference=0.9,
    )


def test_state_round_trips_through_weights_only_loading() -> None:
    record = example()
    record.reference_state = {"weight": torch.ones(2)}
    buffer = io.BytesIO()
    torch.save(record.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = PruningRecord()
    other.load_state_dict(state)
    assert torch.equal(other.reference_state.pop("weight"), torch.ones(2))
    record.reference_state = {}
    assert other == record
    assert isinstance(other.cost.layers["conv2"], LayerCost)
    assert isinstance(other.rounds[1], RoundRecord)


def test_an_empty_record_round_trips() -> None:
    other = PruningRecord(monitor="other", rounds=[RoundRecord(0, 0, {}, 0, 0)])
    other.load_state_dict(PruningRecord().state_dict())
    assert other == PruningRecord()


def test_records_do_not_share_their_lists() -> None:
    first, second = PruningRecord(), PruningRecord()
    first.rounds.append(RoundRecord(0, 0, {}, 0, 0))
    first.input_shapes.append([1])
    assert (second.rounds, second.input_shapes) == ([], [])


def test_update_last_changes_the_newest_round_only() -> None:
    record = example()
    first = record.rounds[0]
    record.update_last(accuracy_after=0.85, accuracy_best=0.87)
    assert record.rounds[0] is first
    assert (record.rounds[1].accuracy_after, record.rounds[1].accuracy_best) == (0.85, 0.87)
    assert record.rounds[1].params == 600


@pytest.mark.parametrize(("kind", "share"), [("params", 600 / 760), ("macs", 20_000 / 22_736), ("bases", 16 / 20)])
def test_kept_is_the_share_of_the_original(kind: str, share: float) -> None:
    record = example()
    original = {"params": 100 + 216 + 432 + 12, "macs": 2000 + 216 * 64 + 432 * 16, "bases": 20}[kind]
    assert record.cost.original(kind) == original
    assert record.kept(record.rounds[1], kind) == pytest.approx(share)


def test_kept_is_none_when_it_was_not_measured() -> None:
    record = example()
    record.rounds.append(RoundRecord(2, 3, {"conv1": 2, "conv2": 2}, 6, 300))
    assert record.kept(record.rounds[2], "macs") is None
