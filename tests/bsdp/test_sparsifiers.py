"""The L1 penalty on scaling factors: its gradient, when it acts, and what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
from bsdp.scale_hooks import scales_of
from bsdp.sparsifiers import add_l1_gradient
from tests.bsdp.test_channel_pruner import make as make_channels
from tests.helpers.nets import ConvNet


def make(**settings: Any) -> tuple[nn.Module, bsdp.IterativePruner, list[nn.Parameter]]:
    torch.manual_seed(0)
    model = ConvNet()
    bsdp.decompose(model)
    bsdp.freeze(model, trainable=["head"])
    options: dict[str, Any] = {"target": 0.3, "rounds": 2, "tolerance": None, "importance": "magnitude", **settings}
    pruner = bsdp.IterativePruner(model, bsdp.PruningSettings(**options), bsdp.measure_cost(model))
    return model, pruner, [pair.scaling.delta for pair in pruner.pairs.values()]


def set_gradients(parameters: list[nn.Parameter], value: float = 0.5) -> None:
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)


def test_gradient_is_that_of_the_penalty() -> None:
    delta = torch.tensor([0.5, -0.5, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(0.25 * (1.0 + delta).abs().sum(), delta)
    delta.grad = torch.ones_like(delta)
    without = torch.zeros(2, requires_grad=True)
    add_l1_gradient([delta, without], 0.25, origin=-1.0)
    torch.testing.assert_close(delta.grad, 1.0 + expected)
    assert delta.grad.tolist() == [1.25, 1.25, 1.0, 0.75] and without.grad is None


def test_scores_do_not_see_the_penalty() -> None:
    sums = []
    for settings in ({}, {"sparsifier": "l1", "sparsity_weight": 0.25}):
        _, pruner, deltas = make(importance="mean_square", **settings)
        set_gradients(deltas)
        pruner.update()
        assert all((d.grad == 0.5 + settings.get("sparsity_weight", 0.0)).all() for d in deltas)  # type: ignore[operator]
        sums.append(torch.cat(list(pruner.scores.compute().values())))
    assert torch.equal(sums[0], sums[1])


def test_it_ends_with_the_last_cut() -> None:
    _, pruner, deltas = make(sparsifier="l1", sparsity_weight=0.25)
    added = []
    for epoch in range(1, 4):
        set_gradients(deltas)
        pruner.update()
        added.append({float(value) - 0.5 for delta in deltas for value in delta.grad})  # type: ignore[union-attr]
        if pruner.cut_due(epoch):
            pruner.cut(epoch)
    assert added == [{0.25}, {0.25}, {0.0}]


def test_it_ends_when_pruning_stops() -> None:
    _, pruner, deltas = make(sparsifier="l1", sparsity_weight=0.25)
    pruner.stopped = True
    set_gradients(deltas)
    pruner.update()
    assert all((d.grad == 0.5).all() for d in deltas)  # type: ignore[union-attr]


def test_the_penalty_on_channel_factors_ends_with_the_last_cut() -> None:
    model, pruner = make_channels(criterion="channel_scaling", l1=0.25, rounds=1, target=0.3)
    added = []
    for _ in range(2):
        weight = scales_of(model).weight  # type: ignore[union-attr]
        weight.grad = torch.zeros_like(weight)
        pruner.update()
        added.append({float(value) for value in weight.grad})
        pruner.cut(1)
    assert added == [{0.25}, {0.0}]


def test_a_large_weight_drives_the_factors_to_zero() -> None:
    results = {}
    for weight in (0.0, 3.0):
        model, pruner, deltas = make(**({"sparsifier": "l1", "sparsity_weight": weight} if weight else {}))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
        for _ in range(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            pruner.update()
            optimizer.step()
        results[weight] = torch.cat([1.0 + d.detach() for d in deltas]).abs().max()
    assert results[3.0] < 0.05 < 0.5 < results[0.0]


def test_double_pruning_has_it_too() -> None:
    model: Any = ConvNet()
    bsdp.decompose(model)
    settings = bsdp.DoublePruningSettings(
        target=0.3, rounds=1, tolerance=None, split=1.0, sparsifier="l1", sparsity_weight=0.5
    )
    pruner = bsdp.DoublePruner(model, settings, torch.zeros(1, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before: Tensor = model.conv1.scaling.delta.grad.clone()
    pruner.update()
    torch.testing.assert_close(model.conv1.scaling.delta.grad, before + 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsifier": "l2"}, "`sparsifier` must be one of 'none', 'l1', got 'l2'"),
        ({"sparsity_weight": 0.1}, "`sparsity_weight=0.1` weighs a penalty .* but `sparsifier` is 'none'"),
        ({"sparsifier": "l1"}, "`sparsifier='l1'` does nothing without a `sparsity_weight` above 0"),
        ({"sparsifier": "l1", "sparsity_weight": -0.1}, "`sparsity_weight` must be at least 0"),
    ],
)
@pytest.mark.parametrize("kind", [bsdp.PruningSettings, bsdp.DoublePruningSettings])
def test_bad_settings_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
