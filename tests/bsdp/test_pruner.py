"""The state machine of iterative pruning, without any trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.pruner import IterativePruner, PruningSettings, default_rounds
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


def test_finished_pruner_lets_the_candidate_go() -> None:
    _, pruner, _ = run([0.9, 0.9, 0.9])
    assert pruner.candidate is None


def test_cut_without_scores_is_skipped_with_a_warning() -> None:
    _, pruner = make()
    with pytest.warns(UserWarning, match="pruning round 1 is skipped"):
        assert not pruner.cut(1)
    assert len(pruner.record.rounds) == 1


def test_warns_when_the_last_round_cannot_reach_the_budget() -> None:
    _, pruner = make(rounds=1, max_layer_ratio=0.05, importance="magnitude")
    with pytest.warns(UserWarning, match="did not reach the budget"):
        pruner.cut(1)


def test_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call `bsdp\.decompose` first"):
        IterativePruner(ConvNet(), PruningSettings(), bsdp.ModelCost())


def test_target_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"`target=0.95` is out of reach"):
        make(target=0.95)
    with pytest.raises(ValueError, match=r"of the macs would be gone .* below 0.827"):
        make(target=0.9, target_kind="macs")
    make(target=0.82, target_kind="macs")


@pytest.mark.parametrize(("epochs", "expected"), [(10, 4), (11, 4), (2, 0), (1, 0)])
def test_default_rounds(epochs: int, expected: int) -> None:
    assert default_rounds(epochs=epochs, warmup_epochs=2, epochs_per_round=2) == expected
