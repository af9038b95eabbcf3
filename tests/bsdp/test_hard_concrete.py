"""Hard-concrete gates."""

import pytest
import torch

from bsdp.hard_concrete import (
    check_stretch,
    deterministic_gates,
    expected_l0,
    open_probability,
    sample_gates,
    uniform_noise,
)

# Low, high, temperature: Guo et al., Louizos et al., and a lopsided one.
STRETCHES = [(-1.5, 1.5, 1.0), (-0.1, 1.1, 2 / 3), (-0.3, 2.0, 1.7)]


@pytest.mark.parametrize(("low", "high", "temperature"), STRETCHES)
def test_expected_l0_is_the_share_of_open_samples(low: float, high: float, temperature: float) -> None:
    alpha = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0])
    many = alpha.expand(200_000, 5)
    noise = uniform_noise(many, generator=torch.Generator().manual_seed(1))
    gates = sample_gates(many, noise, low=low, high=high, temperature=temperature)
    estimate = (gates > 0).double().mean(0)
    exact = open_probability(alpha, low=low, high=high, temperature=temperature).double()
    deviation = (exact * (1 - exact) / 200_000).sqrt()
    assert ((estimate - exact).abs() < 5 * deviation).all()
    total = expected_l0(alpha, low=low, high=high, temperature=temperature)
    torch.testing.assert_close(total.double(), estimate.sum(), atol=0.02, rtol=0.0)


def test_gates_are_exactly_closed_and_open_with_a_gradient_between() -> None:
    alpha = torch.tensor([-9.0, 0.8, 9.0], requires_grad=True)
    gates = sample_gates(alpha, torch.full((3,), 0.5))
    assert gates[0] == 0.0 and gates[2] == 1.0 and 0.0 < gates[1] < 1.0
    (gradient,) = torch.autograd.grad(gates.sum(), alpha)
    soft = torch.sigmoid(torch.tensor(0.8))
    torch.testing.assert_close(gradient, torch.tensor([0.0, float(3.0 * soft * (1 - soft)), 0.0]))


def test_the_gradient_of_the_penalty_never_dies() -> None:
    alpha = torch.tensor([-3.0, 0.0, 5.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(expected_l0(alpha), alpha)
    chance = torch.sigmoid(alpha.detach())
    torch.testing.assert_close(gradient, chance * (1 - chance))


def test_gates_without_noise() -> None:
    gates = deterministic_gates(torch.tensor([-5.0, 0.0, 0.9, 5.0]))
    torch.testing.assert_close(gates, torch.tensor([0.0, 0.0, 3.0 * torch.sigmoid(torch.tensor(0.9)) - 1.5, 1.0]))


def test_noise_is_never_at_an_end_and_is_that_of_its_generator() -> None:
    noise = [uniform_noise(torch.zeros(1000), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(noise[0], noise[1])
    half = uniform_noise(torch.zeros(100_000, dtype=torch.bfloat16))
    assert half.min() > 0.0 and half.max() < 1.0
    assert sample_gates(torch.zeros(100_000, dtype=torch.bfloat16), half).dtype == torch.bfloat16


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (-1.0, 1.0), (float("nan"), 2.0), (-1.0, float("inf"))])
def test_a_stretch_that_cannot_close_or_open_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="`low` must be below 0 and `high` above 1"):
        check_stretch(low, high)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        check_stretch(-1.0, 2.0, 0.0)
