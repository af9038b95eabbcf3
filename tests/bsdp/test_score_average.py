"""Scores carried over cuts: by hand, through a pruner, and forgotten when the bases are others."""

import io
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.importance import magnitude
from bsdp.layers import named_pairs
from bsdp.score_average import ScoreAverage
from tests.helpers.compare import decomposed


def test_three_rounds_by_hand() -> None:
    average = ScoreAverage(0.75)
    assert average.average({"a": torch.tensor([1.0, 2.0, 4.0])})["a"].tolist() == [1.0, 2.0, 4.0]
    average.gather({"a": torch.tensor([0, 2])})
    average.advance()
    second = average.average({"a": torch.tensor([5.0, 0.0])})["a"]
    assert second.tolist() == [0.75 * 1.0 + 0.25 * 5.0, 0.75 * 4.0]
    average.gather({"a": torch.tensor([1])})
    average.advance()
    assert average.average({"a": torch.tensor([8.0])})["a"].tolist() == [0.75 * 3.0 + 0.25 * 8.0]


def test_a_cut_that_is_only_tried_changes_nothing() -> None:
    average = ScoreAverage(0.5)
    average.average({"a": torch.tensor([1.0, 3.0])})
    average.gather({"a": torch.tensor([1])})
    assert average.average({"a": torch.tensor([2.0, 2.0])})["a"].tolist() == [2.0, 2.0]
    average.gather({"a": torch.tensor([0])})
    average.advance()
    assert average.carried["a"].tolist() == [2.0]
    average.advance()  # a cut of something else
    assert average.carried == {}


def test_momentum_zero_carries_nothing() -> None:
    average = ScoreAverage(0.0)
    average.average({"a": torch.tensor([1.0, 3.0])})
    average.gather({"a": torch.tensor([1])})
    average.advance()
    assert average.carried == {}


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan"), True, "much"])
def test_other_momenta_are_refused(momentum: Any) -> None:
    with pytest.raises(ValueError, match=r"`score_momentum` must be in \[0, 1\)"):
        ScoreAverage(momentum)
    for settings in (bsdp.PruningSettings, bsdp.DoublePruningSettings):
        with pytest.raises(ValueError, match=r"`score_momentum` must be in \[0, 1\)"):
            settings(score_momentum=momentum)


def make_pruner(momentum: float = 0.5) -> bsdp.IterativePruner:
    torch.manual_seed(0)
    net = decomposed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), include=["0"])
    settings = bsdp.PruningSettings(
        target=0.375,
        target_kind="bases",
        rounds=3,
        schedule="constant",
        tolerance=None,
        importance="magnitude",
        score_momentum=momentum,
        mean_to_bias=False,
    )
    return bsdp.IterativePruner(net, settings, bsdp.measure_cost(net))


def set_scores(pruner: bsdp.IterativePruner, scores: list[float]) -> None:
    """Give the bases, still marked by their columns, the magnitudes that their scores shall be."""
    pair = pruner.pairs["0"]
    norms = magnitude(torch.ones(pair.rank), torch.linalg.vector_norm(pair.scaling.weight.detach(), dim=0))
    pair.scaling.delta.data = torch.tensor(scores) / norms - 1.0


def test_a_pruner_ranks_by_the_average_and_carries_it_through_a_checkpoint() -> None:
    pruner = make_pruner()
    sigma = pruner.pairs["0"].scaling.sigma.clone()
    set_scores(pruner, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    pruner.cut(1)
    assert pruner.pairs["0"].scaling.sigma.tolist() == sigma[:-1].tolist()
    carried = pruner.basis.score_average.carried["0"]
    assert carried.tolist() == pytest.approx([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    buffer = io.BytesIO()
    torch.save(pruner.basis.state_dict(), buffer)
    buffer.seek(0)
    pruner.basis.score_average.drop()
    pruner.basis.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(pruner.basis.score_average.carried["0"], carried)
    set_scores(pruner, [1.0, 9.0, 0.5, 9.0, 9.0, 9.0, 5.0])  # averages 4.5, 8, 3.25, 7, 6.5, 6, 3.5
    pruner.cut(2)
    assert pruner.pairs["0"].scaling.sigma.tolist() == sigma[[0, 1, 3, 4, 5, 6]].tolist()
    assert pruner.basis.score_average.carried["0"].tolist() == pytest.approx([4.5, 8.0, 7.0, 6.5, 6.0, 3.5])


@pytest.mark.parametrize("forget", ["bases_changed", "reset"])
def test_scores_of_other_bases_are_forgotten(forget: str) -> None:
    pruner = make_pruner()
    set_scores(pruner, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    pruner.cut(1)
    getattr(pruner.basis, forget)()
    set_scores(pruner, [1.0, 9.0, 0.5, 9.0, 9.0, 9.0, 5.0])
    assert pruner.basis.plan(0.0, pruner.cost).ranks["0"] < 7
    assert pruner.basis.score_average._newest["0"].tolist() == pytest.approx([1.0, 9.0, 0.5, 9.0, 9.0, 9.0, 5.0])


def test_carried_scores_of_other_ranks_are_refused_and_old_states_have_none() -> None:
    pruner = make_pruner()
    set_scores(pruner, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    pruner.cut(1)
    state = pruner.basis.state_dict()
    fresh = make_pruner()
    with pytest.raises(ValueError, match="another rank of layer '0'"):
        fresh.basis.load_state_dict(state)
    del state["average"]
    pruner.basis.load_state_dict(state)
    assert pruner.basis.score_average.carried == {}


@pytest.mark.parametrize("how", ["basis", "channel", "basis and channel"])
def test_a_cut_of_channels_ends_the_average(how: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    net = decomposed(net, include=["0", "2"])
    settings = bsdp.DoublePruningSettings(
        target=0.5, tolerance=None, importance="magnitude", criterion="l1", score_momentum=0.5, mean_to_bias=False
    )
    inputs = torch.randn(16, 8)
    pruner = bsdp.DoublePruner(net, settings, torch.zeros(1, 8), probe=lambda: net(inputs).detach())
    pruner.try_cuts(0.7 * pruner.record.cost.original())
    assert pruner.basis.score_average.carried == {}
    pruner._choose = lambda budget: how  # type: ignore[method-assign]
    assert pruner.cut(1)
    carried = pruner.basis.score_average.carried
    sizes = {name: pair.rank for name, pair in named_pairs(net).items()} if how == "basis" else {}
    assert {name: len(score) for name, score in carried.items()} == sizes
