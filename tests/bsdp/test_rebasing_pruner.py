"""Pruners of bases: when bases are chosen anew, and what follows from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.double_pruner import DoublePruner, DoublePruningSettings
from bsdp.pruner import IterativePruner, PruningSettings
from bsdp.rebasing import BasisRoundPruner
from tests.helpers.compare import relative_error
from tests.helpers.nets import ConvNet

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> tuple[nn.Module, IterativePruner]:
    torch.manual_seed(0)
    model = ConvNet().eval()
    bsdp.decompose(model)
    settings = PruningSettings(**{"target": 0.4, "rounds": 3, "tolerance": None, "warmup_epochs": 2, **options})
    return model, IterativePruner(model, settings, bsdp.measure_cost(model))


def make_double(**options: Any) -> tuple[nn.Module, BasisRoundPruner]:
    torch.manual_seed(0)
    model = ConvNet().eval()
    bsdp.decompose(model)
    given = {"target": 0.4, "rounds": 3, "tolerance": None, "warmup_epochs": 2, "split": 0.5, "order": "alternate"}
    return model, DoublePruner(model, DoublePruningSettings(**{**given, **options}), IMAGES[:1])


KINDS = pytest.mark.parametrize("make", [make, make_double], ids=["bases", "both"])


def step(model: nn.Module, pruner: BasisRoundPruner, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(IMAGES), torch.arange(16) % 4).backward()
    pruner.update()
    optimizer.step()


SCHEDULES = [
    ({"rebase": "never"}, []),
    ({"rebase": "warmup"}, [1]),
    ({"rebase": "warmup", "warmup_epochs": 4}, [3]),
    ({"rebase": "every_round"}, [1, 2, 3]),
    ({"rebase": "every_round", "epochs_per_round": 3}, [1, 4, 7]),
    ({"rebase": "every_round", "warmup_epochs": 1}, [0, 1, 2]),
]


@KINDS
@pytest.mark.parametrize(("options", "expected"), SCHEDULES)
def test_bases_are_chosen_before_the_epoch_that_scores_them(
    make: Callable[..., Any], options: dict[str, Any], expected: list[int]
) -> None:
    model, pruner = make(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = []
    for epoch in range(pruner.settings.epochs):
        if pruner.cut_due(epoch):
            assert pruner.cut(epoch, optimizers=[optimizer])
        if pruner.rebase_due(epoch):
            before = model(IMAGES)
            pruner.rebase([IMAGES], optimizers=[optimizer])
            assert relative_error(model(IMAGES), before) < 1e-5
            assert not pruner.rebase_due(epoch)
            seen.append(epoch)
        pruner.start_epoch()
        with pruner.collecting():
            step(model, pruner, optimizer)
    assert seen == expected
    assert len(pruner.record.rounds) == 4


@KINDS
@pytest.mark.parametrize("metric", ["euclidean", "activation", "kfac"])
def test_scores_and_momentum_of_the_old_bases_are_gone(make: Callable[..., Any], metric: str) -> None:
    model, pruner = make(rebase="warmup", metric=metric)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with pruner.collecting():
        step(model, pruner, optimizer)
    assert pruner.basis.statistics.means()
    batches = [] if metric == "euclidean" else [(IMAGES, torch.arange(16) % 4)]
    pruner.rebase(batches, optimizers=[optimizer])
    assert not pruner.basis.statistics.means()
    with pytest.raises(bsdp.importance.NoScoresError):
        pruner.basis.scores.compute()
    assert model.conv1.scaling.delta not in optimizer.state
    assert model.head.weight in optimizer.state
    assert model.conv1.scaling.delta.eq(0).all()


@KINDS
def test_state_remembers_that_bases_were_chosen(make: Callable[..., Any]) -> None:
    model, pruner = make(rebase="warmup")
    pruner.rebase([IMAGES])
    twin, other = make(rebase="warmup")
    twin.load_state_dict(model.state_dict())
    assert other.rebase_due(1)
    other.load_state_dict(copy.deepcopy(pruner.state_dict()))
    assert not other.rebase_due(1)
    older = {key: value for key, value in pruner.state_dict().items() if key != "rebased_for"}
    other.load_state_dict(older)
    assert other.rebase_due(1)


@KINDS
def test_what_cannot_work_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="`metric='kfac'` needs `warmup_epochs` of at least 2, got 1"):
        make(rebase="warmup", metric="kfac", warmup_epochs=1)
    with pytest.raises(ValueError, match="`rebase` must be one of 'never', 'warmup', 'every_round'"):
        make(rebase="always")
    with pytest.raises(ValueError, match="`metric` must be one of"):
        make(metric="plain")
    with pytest.raises(ValueError, match="`shrinkage` must be between 0 and 1"):
        make(shrinkage=-0.1)
    with pytest.raises(ValueError, match="`batches` is empty: choosing bases"):
        make(rebase="warmup")[1].rebase([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "kfac"}, "`metric='kfac'` is about bases that are chosen anew .* but `rebase` is 'never'"),
        ({"centred": True}, "`centred=True` is about bases that are chosen anew"),
        ({"shrinkage": 0.0}, "`shrinkage=0.0` is about bases that are chosen anew"),
        ({"rebase": "warmup", "warmup_epochs": 0, "importance": "magnitude"}, "`rebase='warmup'` needs"),
        ({"rebase": "every_round", "score_momentum": 0.5}, "`score_momentum=0.5` averages scores of the same bases"),
    ],
)
def test_settings_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
