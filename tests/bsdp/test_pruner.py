"""The state machine of iterative pruning, without any trainer."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.pruner import IterativePruner, PruningSettings, largest_removable_share
from bsdp.round_settings import default_rounds
from tests.helpers.nets import ConvNet


def make(**options: Any) -> tuple[ConvNet, IterativePruner]:
    model = ConvNet()
    bsdp.decompose(model)
    settings = PruningSettings(**{"target": 0.4, "rounds": 2, "tolerance": 0.01, **options})
    return model, IterativePruner(model, settings, bsdp.measure_cost(model, torch.zeros(1, 3, 8, 8)))


def train(model: nn.Module, pruner: IterativePruner, optimizer: torch.optim.Optimizer, *, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(8, 3, 8, 8, generator=generator)
        with pruner.statistics.collecting():
            nn.functional.cross_entropy(model(images), torch.arange(8) % 4).backward()
        pruner.update()
        optimizer.step()


def run(values: list[float], **options: Any) -> tuple[ConvNet, IterativePruner, int]:
    model, pruner = make(**options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    epoch = 0
    for epoch, value in enumerate(values):
        if pruner.cut_due(epoch):
            pruner.cut(epoch, optimizers=[optimizer])
        pruner.start_epoch()
        train(model, pruner, optimizer)
        pruner.observe(value)
        if pruner.should_stop(epoch):
            break
    pruner.restore(optimizers=[optimizer])
    return model, pruner, epoch


def test_cuts_come_when_they_are_due() -> None:
    _, pruner = make(rounds=2, warmup_epochs=2, epochs_per_round=3, importance="magnitude")
    due = []
    for epoch in range(12):
        if pruner.cut_due(epoch):
            due.append(epoch)
            pruner.cut(epoch)
    assert due == [2, 5]
    assert pruner.settings.epochs == 8


def test_budget_bias_and_history() -> None:
    model, pruner, _ = run([0.9, 0.9, 0.9])
    record = pruner.record
    assert [r.round for r in record.rounds] == [0, 1, 2]
    assert record.chosen == 2
    assert record.rounds[2].params <= 0.6 * record.cost.original()
    assert record.rounds[2].params == sum(p.numel() for p in bsdp.fold(model).parameters())
    assert record.rounds[1].accuracy_before == 0.9
    assert model.conv2.bias.any()  # means went there


def test_no_means_without_mean_to_bias() -> None:
    model, _, _ = run([0.9, 0.9, 0.9], mean_to_bias=False)
    assert not model.conv1.bias.any()
    assert not model.conv2.bias.any()


def test_warm_up_scores_are_those_of_its_last_epoch() -> None:
    model, pruner = make(warmup_epochs=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        pruner.start_epoch()
        train(model, pruner, optimizer, steps=3)
    assert pruner.scores.steps == 3


def test_smallest_tolerated_structure_wins_over_better_larger_ones() -> None:
    model, pruner, _ = run([0.9, 0.95, 0.891, 0.2], rounds=3)
    assert pruner.record.chosen == 2
    assert {n: p.rank for n, p in bsdp.named_pairs(model).items()} == pruner.record.rounds[2].ranks


def test_stops_after_failed_rounds() -> None:
    *_, epoch = run([0.9, 0.5, 0.9, 0.9], rounds=3)
    assert epoch == 1
    *_, epoch = run([0.9, 0.5, 0.5, 0.9], rounds=3, patience_rounds=2)
    assert epoch == 2
    _, pruner, epoch = run([0.9, 0.5, 0.9, 0.5], rounds=3, patience_rounds=2)
    assert epoch == 3
    assert pruner.failed_rounds == 0


def test_best_epoch_of_the_final_structure() -> None:
    _, pruner, _ = run([0.9, 0.9, 0.3, 0.8, 0.5], tolerance=None)
    assert pruner.record.chosen == 2
    assert pruner.record.rounds[2].accuracy_after == 0.3
    assert pruner.record.rounds[2].accuracy_best == 0.8


def test_state_round_trip_gives_the_same_cut() -> None:
    model, pruner = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    train(model, pruner, optimizer)
    pruner.observe(0.9)
    state, twin = copy.deepcopy(pruner.state_dict()), ConvNet()
    bsdp.decompose(twin)
    twin.load_state_dict(model.state_dict())
    other = IterativePruner(twin, pruner.settings, bsdp.measure_cost(twin))
    other.load_state_dict(state)
    for p in (pruner, other):
        assert p.cut(1)
    assert other.record.rounds == pruner.record.rounds
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_warm_up_may_begin_later() -> None:
    _, pruner = make(rounds=2, importance="magnitude")
    pruner.begin(6)
    assert [epoch for epoch in range(6, 10) if pruner.cut_due(epoch) and pruner.cut(epoch)] == [7, 8]


def test_late_cuts_keep_their_distance() -> None:
    _, pruner = make(rounds=2, epochs_per_round=3, importance="magnitude")
    assert [epoch for epoch in range(4, 12) if pruner.cut_due(epoch) and pruner.cut(epoch)] == [4, 7]


def test_without_tolerance_only_the_newest_structure_counts() -> None:
    model, pruner = make(tolerance=None, importance="magnitude")
    pruner.observe(0.9)
    pruner.cut(1)
    pruner.observe(0.8)
    pruner.cut(2)  # and no validation any more
    pruner.restore()
    assert pruner.record.chosen == 2
    assert {n: p.rank for n, p in bsdp.named_pairs(model).items()} == pruner.record.rounds[2].ranks


def test_nan_and_infinity_are_not_observed() -> None:
    _, pruner = make()
    for value in (float("nan"), float("inf")):
        pruner.observe(value)
    assert pruner.record.reference is None
    pruner.observe(0.5)
    assert pruner.record.rounds[0].accuracy_after == 0.5
    assert pruner.record.reference == 0.5


def test_buffers_that_are_nan_are_not_observed_and_not_cut_but_may_be_infinite() -> None:
    model, pruner = make(importance="magnitude")
    variance = model.bn1.running_var.clone()
    model.bn1.running_var[0] = float("nan")
    pruner.observe(0.9)
    assert pruner.record.reference is None
    with pytest.warns(UserWarning, match="round 1 is skipped: the weights are NaN"):
        assert not pruner.cut(1)
    model.bn1.running_var.copy_(variance)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    pruner.observe(0.8)
    assert pruner.record.reference == 0.8
    assert pruner.cut(2)


def test_a_round_fails_only_once() -> None:
    _, pruner = make(rounds=4, patience_rounds=2, importance="magnitude")
    pruner.observe(0.9)
    pruner.cut(1)
    pruner.observe(0.1)
    assert [pruner.should_stop(epoch) for epoch in (1, 2, 3)] == [False, False, False]
    assert pruner.failed_rounds == 1


def test_finished_run_goes_on_from_the_round_it_ended_with() -> None:
    model, pruner, _ = run([0.9, 0.9, 0.2, 0.2], rounds=3)
    state = copy.deepcopy(pruner.state_dict())
    assert (pruner.record.chosen, len(pruner.record.rounds)) == (1, 3)
    again = IterativePruner(model, pruner.settings, bsdp.measure_cost(model))
    again.load_state_dict(state)
    assert (again.record.chosen, len(again.record.rounds), again.stopped) == (None, 2, False)
    again.observe(0.95)
    assert again.record.rounds[-1].accuracy_best == 0.95


@pytest.mark.parametrize(("values", "chosen"), [([0.9, 0.9, 0.2], 1), ([0.9, 0.2], 0)])
def test_finished_run_that_goes_on_falls_back_on_its_model(values: list[float], chosen: int) -> None:
    model, pruner, _ = run(values, rounds=3)
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    assert pruner.record.chosen == chosen
    state["record"]["reference_state"] = None  # as in the checkpoint of a finished run
    again = IterativePruner(model, pruner.settings, bsdp.measure_cost(model))
    again.load_state_dict(state)
    for pair in bsdp.named_pairs(model).values():
        pair.scaling.delta.data.add_(1)
    again.observe(0.5)
    assert again.restore().round == chosen
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_rounds_after_a_finished_run_are_judged() -> None:
    model, pruner, _ = run([0.9, 0.9, 0.2], rounds=3, importance="magnitude")
    assert (pruner.record.chosen, pruner.judged_round) == (1, 2)
    again = IterativePruner(model, pruner.settings, bsdp.measure_cost(model))
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert again.cut(3) and again.record.rounds[-1].accuracy_before == 0.9
    again.scheduled = 2  # another cut is to come
    again.observe(0.2)
    assert again.should_stop(3)


@pytest.mark.parametrize("finished", [False, True])
def test_a_tighter_tolerance_lets_a_candidate_of_the_looser_one_go(finished: bool) -> None:
    model, pruner = make(tolerance=0.1, rounds=3, importance="magnitude")
    pruner.observe(0.9)
    pruner.cut(1)
    pruner.observe(0.82)
    if finished:
        pruner.restore()
    for tolerance, kept in ((0.01, False), (0.09, True), (None, True)):
        settings = PruningSettings(target=0.4, rounds=3, importance="magnitude", tolerance=tolerance)
        again = IterativePruner(model, settings, bsdp.measure_cost(model))
        again.load_state_dict(copy.deepcopy(pruner.state_dict()))
        assert (again.candidate is not None) == kept


def test_settings_of_the_present_run_decide_and_are_reported() -> None:
    model, pruner = make(tolerance=0.01)
    pruner.stopped = True
    state = copy.deepcopy(pruner.state_dict())
    again = IterativePruner(model, PruningSettings(target=0.5, rounds=2, tolerance=0.1), bsdp.measure_cost(model))
    again.load_state_dict(state)
    assert (again.record.tolerance, again.record.target, again.stopped) == (0.1, 0.5, False)


def test_finished_pruner_lets_the_candidate_go() -> None:
    _, pruner, _ = run([0.9, 0.9, 0.9])
    assert pruner.candidate is None


def test_cut_without_scores_is_skipped_with_a_warning() -> None:
    _, pruner = make()
    with pytest.warns(UserWarning, match="pruning round 1 is skipped"):
        assert not pruner.cut(1)
    assert len(pruner.record.rounds) == 1


def test_warns_when_the_last_round_cannot_reach_the_budget() -> None:
    _, pruner = make(rounds=30, max_layer_ratio=0.2, importance="magnitude")
    pruner.scheduled = 29
    with pytest.warns(UserWarning, match="did not reach the budget"):
        pruner.cut(1)


def test_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call `bsdp\.decompose` first"):
        IterativePruner(ConvNet(), PruningSettings(), bsdp.ModelCost())


def test_target_out_of_reach_in_the_rounds_there_are() -> None:
    message = r"out of reach in `rounds=1`, each of which may remove `max_layer_ratio=0.05`"
    with pytest.raises(ValueError, match=message):
        make(rounds=1, max_layer_ratio=0.05)


def test_target_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"`target=0.95` is out of reach"):
        make(target=0.95)
    with pytest.raises(ValueError, match=r"of the macs would be gone .* below 0.827"):
        make(target=0.9, target_kind="macs")
    make(target=0.82, target_kind="macs")


class Bare(nn.Module):
    """Convolutions without biases, one of them in groups; input ``[batch, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        options = {"padding": 1, "bias": False}
        self.first, self.second = nn.Conv2d(1, 12, 3, **options), nn.Conv2d(12, 16, 3, **options)
        self.third, self.head = nn.Conv2d(16, 16, 3, groups=4, **options), nn.Linear(16, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(self.first(images).relu()).relu()).mean((2, 3)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cut_before", [False, True])
def test_no_target_that_can_be_reached_is_refused(cut_before: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    options: dict[str, Any] = {
        "target_kind": draw.choice(["params", "macs", "bases"]),
        "rounds": draw.choice([1, 2, 3]),
        "max_layer_ratio": draw.choice([0.3, 0.5, 0.8]),
        "min_rank": draw.choice([1, 2, 3]),
        "rank_multiple": draw.choice([1, 2, 4]),
        "ranking": draw.choice(["importance", "per_cost", "hull"]),
        **{"schedule": "constant", "importance": "magnitude", "tolerance": None, "warmup_epochs": 0},
    }
    model = Bare()
    bsdp.decompose(model, exclude=["head"])
    for pair in bsdp.named_pairs(model).values():
        if cut_before and pair.groups == 1:
            pair.keep(torch.arange(max(1, pair.rank // 3)))
    cost = bsdp.measure_cost(model, torch.zeros(1, 1, 8, 8))
    ranks = {name: pair.rank for name, pair in bsdp.named_pairs(model).items()}
    with monkeypatch.context() as patch:
        patch.setattr(IterativePruner, "check_target", lambda _: None)
        pruner = IterativePruner(model, PruningSettings(target=0.98, **options), cost)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the last round did not reach the budget
        for epoch in range(pruner.settings.rounds):
            pruner.cut(epoch)
    share = pruner.record.kept(pruner.record.rounds[-1], options["target_kind"])
    assert share is not None
    for rounds in (None, options["rounds"]):
        limit = largest_removable_share(cost, pruner.settings, ranks, rounds=rounds)
        assert 1 - share <= limit + 1e-9
    assert 1 - share == pytest.approx(limit, abs=0.15)  # and it is no empty bound


@pytest.mark.parametrize(("epochs", "expected"), [(10, 4), (11, 4), (2, 0), (1, 0)])
def test_default_rounds(epochs: int, expected: int) -> None:
    assert default_rounds(epochs=epochs, warmup_epochs=2, epochs_per_round=2) == expected
