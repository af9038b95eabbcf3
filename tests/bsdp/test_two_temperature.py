"""Two-temperature gates on problems whose best subset is known, and on small networks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from bsdp.importance import NoScoresError
from bsdp.two_temperature import TwoTemperatureGates, gate_step, hard_gate, soft_slope
from tests.helpers.marks import slow_but
from tests.helpers.nets import GroupedNet

BENEFIT = torch.tensor([2.0, 1.5, 1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
COST = torch.tensor([0.2, 0.1, 0.3, 0.2, 0.1, 0.2], dtype=torch.float64)
PENALTIES = [0.0, 1.0, 4.0, 8.0, 100.0]


def quadratic(gates: Tensor) -> Tensor:
    """Squared error of a sum whose parts overlap a little, so that one part's worth depends on the others."""
    mixing = torch.eye(6, dtype=torch.float64) + 0.1 * torch.ones(6, 6, dtype=torch.float64).triu(1)
    return (mixing @ (BENEFIT * (1.0 - gates))).square().sum()


def best_subset(penalty: float) -> list[bool]:
    subsets = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([0.0, 1.0], repeat=6)]
    best = min(subsets, key=lambda s: float(quadratic(s) + penalty * (COST * s).sum()))
    return best.bool().tolist()


def searched(penalty: float, *, hard: float = math.inf) -> list[bool]:
    theta = torch.full((6,), 0.1, dtype=torch.float64)
    means = torch.zeros_like(theta)
    for step in range(1200):
        gates = hard_gate(theta, hard).requires_grad_(True)
        (gradient,) = torch.autograd.grad(quadratic(gates), gates)
        theta = gate_step(theta, gradient, COST, penalty=penalty, soft=1.0, learning_rate=0.02)
        means += gates.detach() * (step >= 400)
    return [bool(mean > 400) for mean in means]


SEARCHES = [(penalty, hard) for hard in (50.0, math.inf) for penalty in PENALTIES]


@pytest.mark.parametrize(("penalty", "hard"), slow_but(SEARCHES[::2], SEARCHES))
def test_the_best_subset_of_a_quadratic_is_found(penalty: float, hard: float) -> None:
    assert searched(penalty, hard=hard) == best_subset(penalty)


def test_the_toy_has_subsets_of_several_sizes() -> None:
    assert [sum(best_subset(p)) for p in PENALTIES] == [6, 5, 3, 2, 0]


def test_gates_become_binary_as_the_temperature_rises() -> None:
    theta = torch.tensor([-2.0, -0.01, 0.01, 3.0])
    binary = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(hard_gate(theta, math.inf), binary)
    errors = [float((hard_gate(theta, m) - binary).abs().max()) for m in (1.0, 10.0, 100.0, 1000.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_the_slope_is_the_derivative_of_the_soft_gate() -> None:
    theta = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(hard_gate(theta, 1.7).sum(), theta)
    torch.testing.assert_close(soft_slope(theta.detach(), 1.7), expected)


# --- on networks ------------------------------------------------------------------------------------------------


def decomposed(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    bsdp.decompose(model, exclude=["4"])
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def search(model: nn.Module, *, steps: int = 30, **options: Any) -> TwoTemperatureGates:
    """Gates that try to keep what the whole model computes."""
    wanted = model(images()).detach()
    gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), **{"penalty": 0.0, **options})
    for _ in range(steps):
        learn(model, gates, wanted)
    return gates


def learn(model: nn.Module, gates: TwoTemperatureGates, wanted: Tensor) -> None:
    with gates.applied():
        (model(images()) - wanted).square().mean().backward()
    gates.update()


def test_the_forward_pass_is_that_of_the_open_bases() -> None:
    model = decomposed()
    gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), penalty=0.0, hard=math.inf)
    signs = torch.randn(len(gates.theta), generator=torch.Generator().manual_seed(2))
    gates.load_state_dict({**gates.state_dict(), "theta": signs})
    with gates.applied():
        gated = model(images())
    for name, theta in gates.split(signs).items():
        keep = (theta > 0).nonzero().flatten()
        bsdp.named_pairs(model)[name].keep(keep)
        assert gates.ranks(now=True)[name] == len(keep)
    torch.testing.assert_close(gated, model(images()))


def test_a_closed_gate_has_the_gradient_of_opening_it() -> None:
    model = decomposed()
    gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), penalty=0.0, hard=math.inf)
    theta = torch.ones_like(gates.theta)
    theta[3] = -1.0
    gates.load_state_dict({**gates.state_dict(), "theta": theta})
    with gates.applied():
        loss = model(images()).square().mean()
        loss.backward()
    assert gates._gates.grad is not None
    slope, step = float(gates._gates.grad[3]), 1e-3
    gates._gates.data[3] = step
    with gates.applied():
        moved = model(images()).square().mean()
    assert slope != 0.0
    assert float((moved - loss).detach()) / step == pytest.approx(slope, rel=0.02)


def test_the_model_is_left_as_found() -> None:
    model = decomposed()
    before, hooks = model(images()).detach(), [len(m._forward_hooks) for m in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    gates = search(model, penalty=50.0, interval=1, steps=60)
    assert gates.open_share() < 1.0
    with pytest.raises(RuntimeError), gates.applied():
        raise RuntimeError
    assert torch.equal(model(images()), before)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [name for name, _ in model.named_parameters()] == names


def test_a_higher_penalty_leaves_fewer_gates_open() -> None:
    found = [search(decomposed(), penalty=p, interval=1, steps=150).ranks() for p in (0.0, 0.02, 1.0)]
    open_gates = [sum(ranks.values()) for ranks in found]
    assert open_gates == sorted(open_gates, reverse=True) and len(set(open_gates)) == 3
    assert found[0] == {"0": 8, "2": 6} and found[-1] == {"0": 1, "2": 1}


def test_the_strongest_gate_of_a_layer_stays_open() -> None:
    gates = search(decomposed(), penalty=1e4, interval=1, steps=60)
    assert float(gates.theta.max()) < 0.0
    assert [float(g.max()) for g in gates.gates.values()] == [1.0, 1.0]
    assert [int((g == 1.0).sum()) for g in gates.gates.values()] == [1, 1]


def test_the_penalty_adapts_to_a_budget() -> None:
    gates = search(decomposed(), penalty=None, budget=0.6, interval=1, steps=250)
    assert gates.penalty > 0.0
    assert 0.4 < gates.cost_share() <= 0.65


def test_costs_are_those_of_one_more_basis_as_a_share_of_the_original() -> None:
    gates = search(decomposed(), steps=0)
    assert {name: costs.unique().tolist() for name, costs in gates.split(gates.costs).items()} == {
        name: [pytest.approx(layer.per_rank / gates.model_cost.original())]
        for name, layer in gates.model_cost.layers.items()
    }


def test_gradients_of_an_interval_are_averaged() -> None:
    one, two = (search(decomposed(), steps=n, interval=n, penalty=1e-5) for n in (1, 4))
    assert (one.steps, two.steps) == (1, 1)
    torch.testing.assert_close(one.theta, two.theta)
    assert not torch.equal(one.theta, torch.full_like(one.theta, 0.5))


def test_a_process_without_gradients_does_not_weaken_those_of_the_others() -> None:
    seen: list[int] = []

    def average(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor / 2  # as if the other process had seen nothing finite

    alone, together = (
        search(decomposed(), steps=1, interval=1, penalty=1e-5),
        search(decomposed(), steps=1, interval=1, penalty=1e-5, average=average),
    )
    torch.testing.assert_close(alone.theta, together.theta)
    assert seen == [len(alone.theta), 1]


def test_the_loss_scale_is_taken_out() -> None:
    thetas = []
    for scale in (1.0, 1024.0):
        model = decomposed()
        gates = search(model, steps=0, interval=1, penalty=3.0)
        with gates.applied(scale):
            (scale * model(images()).square().mean()).backward()
        gates.update()
        thetas.append(gates.theta)
    torch.testing.assert_close(*thetas)


def test_broken_steps_and_steps_without_gates_count_for_nothing() -> None:
    model = decomposed()
    gates = search(model, steps=0, interval=1)
    start = gates.theta
    model(images()).sum().backward()
    gates.update()
    with gates.applied():
        (model(images()).sum() * math.nan).backward()
    gates.update()
    assert torch.equal(gates.theta, start) and gates.steps == 0
    with pytest.raises(NoScoresError, match="no step had a finite gradient"):
        gates.scores()


def test_a_search_goes_on_from_its_state() -> None:
    options: dict[str, Any] = {"penalty": None, "budget": 0.5, "interval": 3}
    whole, half = search(decomposed(), steps=20, **options), search(decomposed(), steps=10, **options)
    model = decomposed()
    gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), **options)
    gates.load_state_dict(half.state_dict())
    wanted = model(images()).detach()
    for _ in range(10):
        learn(model, gates, wanted)
    assert torch.equal(gates.theta, whole.theta) and gates.penalty == whole.penalty


def test_groups_keep_equal_ranks() -> None:
    model = GroupedNet()
    bsdp.decompose(model, include=["grouped"])
    pairs, cost = bsdp.named_pairs(model), bsdp.measure_cost(model)
    gates = TwoTemperatureGates(pairs, cost, penalty=0.0)
    theta = -torch.ones_like(gates.theta)
    theta[:2] = 1.0  # two in the first group, none in the second
    gates.load_state_dict({**gates.state_dict(), "theta": theta})
    assert gates.ranks(now=True) == {"grouped": 2}
    assert int((gates.gates["grouped"].view(2, -1)[1] == 1.0).sum()) == 1


def test_linear_layers_have_gates_on_their_last_axis() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    bsdp.decompose(model, include=["0"])
    gates = TwoTemperatureGates(bsdp.named_pairs(model), bsdp.measure_cost(model), penalty=0.0, hard=math.inf)
    theta = torch.tensor([1.0, -1.0, 1.0, -1.0])
    gates.load_state_dict({**gates.state_dict(), "theta": theta})
    tokens = torch.randn(2, 3, 5)
    with gates.applied():
        gated = model(tokens)
    bsdp.named_pairs(model)["0"].keep(torch.tensor([0, 2]))
    torch.testing.assert_close(gated, model(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hard": 0.5, "soft": 1.0}, "`hard` no less than it"),
        ({"soft": 0.0}, "`soft` must be above 0"),
        ({"hard": math.nan}, "`hard` no less"),
        ({"interval": 0}, "`interval`"),
        ({"penalty": -1.0}, "`penalty`"),
        ({"penalty": None}, "give a `penalty`, or a `budget`"),
        ({"penalty": None, "budget": 1.5}, "`budget`"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = decomposed()
    with pytest.raises(ValueError, match=message):
        search(model, **options)


def test_a_model_without_layers_to_cut_and_gates_of_another_one_are_refused() -> None:
    model = decomposed()
    pairs, cost = bsdp.named_pairs(model), bsdp.measure_cost(model)
    gates = TwoTemperatureGates(pairs, cost, penalty=0.0)
    pairs["0"].keep(torch.arange(3))
    with pytest.raises(ValueError, match="they are of other ranks"):
        TwoTemperatureGates(pairs, cost, penalty=0.0).load_state_dict(gates.state_dict())
    for pair in pairs.values():
        pair.whole = True
    with pytest.raises(ValueError, match="nothing to search"):
        TwoTemperatureGates(pairs, bsdp.measure_cost(model), penalty=0.0)
