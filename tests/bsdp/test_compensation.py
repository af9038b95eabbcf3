"""Forward selection and closed-form compensation, against slow references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bsdp.compensation import Reader, compensate, reconstruction_loss, select_inputs
from bsdp.input_moments import Moments


def moments_of(rows: Tensor) -> Moments:
    return Moments(rows.mean(0), rows.mT @ rows / len(rows), len(rows))


def mixed_rows(count: int, width: int) -> Tensor:
    return torch.randn(count, width).double() @ torch.randn(width, width).double() + torch.randn(width).double()


def slow_loss(weight: Tensor, covariance: Tensor, keep: list[int]) -> float:
    """Variance of the outputs that the best linear map of the kept inputs does not give."""
    whole = torch.trace(weight @ covariance @ weight.mT)
    if not keep:
        return float(whole)
    across = covariance[keep] @ weight.mT
    return float(whole - torch.trace(across.mT @ torch.linalg.inv(covariance[keep][:, keep]) @ across))


def slow_order(readers: list[Reader]) -> tuple[list[int], list[float]]:
    """Try every unit at every step."""

    def loss(units: list[int]) -> float:
        total = 0.0
        for reader in readers:
            keep = reader.kept.tolist() + reader.columns[units].flatten().tolist()
            total += slow_loss(reader.weight, reader.covariance, keep) / slow_loss(reader.weight, reader.covariance, [])
        return total / len(readers)

    order: list[int] = []
    losses = [loss([])]
    left = list(range(len(readers[0].columns)))
    while left:
        best = min(left, key=lambda unit: loss([*order, unit]))
        order.append(best)
        left.remove(best)
        losses.append(loss(order))
    return order, losses


def make_reader(units: int, width: int, *, others: int = 0, outputs: int = 5) -> Reader:
    total = units * width + others
    places = torch.randperm(total)
    covariance = mixed_rows(200, total).mT.cov(correction=0)
    columns, kept = places[: units * width].view(units, width), places[units * width :]
    return Reader(torch.randn(outputs, total).double(), covariance, columns, kept)


@pytest.mark.parametrize("sizes", [[(5, 1, 0)], [(4, 3, 0)], [(5, 2, 3)], [(4, 2, 3), (4, 1, 0), (4, 3, 2)]])
def test_selection_equals_the_slow_one(sizes: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(len(sizes))
    readers = [make_reader(units, width, others=others) for units, width, others in sizes]
    found = select_inputs(readers, ridge=0.0)
    order, losses = slow_order(readers)
    assert found.order.tolist() == order
    assert found.greedy == len(order)
    torch.testing.assert_close(found.losses, torch.tensor(losses).double(), atol=1e-8, rtol=1e-6)


def test_losses_fall() -> None:
    losses = select_inputs([make_reader(12, 2)]).losses
    assert bool((losses.diff() <= 0).all())
    assert float(losses[0]) == pytest.approx(1.0)
    assert float(losses[-1]) == pytest.approx(0.0, abs=1e-5)


def test_duplicates_cost_nothing_and_constants_go_first() -> None:
    rows = mixed_rows(300, 4)
    rows = torch.cat([rows, rows[:, :2], torch.full((300, 1), 3.0).double()], 1)
    moments, weight = moments_of(rows), torch.randn(6, 7).double()
    found = select_inputs([Reader(weight, moments.covariance, torch.arange(7)[:, None], torch.arange(0))])
    assert found.order[-1] == 6
    assert float(found.losses[4]) < 1e-5
    keep = torch.zeros(7, dtype=torch.bool)
    keep[found.order[:4]] = True
    assert {int(unit) % 4 for unit in found.order[:4]} == {0, 1, 2, 3}
    bias = torch.randn(6).double()
    new, shift = compensate(weight, bias, moments, keep)
    assert shift is not None
    torch.testing.assert_close(rows[:, keep] @ new.mT + shift, rows @ weight.mT + bias, atol=1e-4, rtol=1e-4)
    assert reconstruction_loss(weight, new, moments, keep) < 1e-8


def test_indefinite_blocks_stop_the_search() -> None:
    # Without a ridge, a unit of two inputs that are the same has no Cholesky factor.
    covariance = torch.block_diag(torch.eye(1), torch.ones(2, 2), torch.eye(1)).double()
    columns = torch.tensor([[0, 3], [1, 2]])
    found = select_inputs([Reader(torch.ones(1, 4).double(), covariance, columns, torch.arange(0))], ridge=0.0)
    assert found.order.tolist() == [0, 1]
    assert found.greedy == 1
    assert bool(found.losses.isfinite().all())


def test_all_inputs_change_nothing() -> None:
    rows = mixed_rows(50, 6)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    everything = torch.ones(6, dtype=torch.bool)
    new, shift = compensate(weight, bias, moments_of(rows), everything, ridge=1.0, restore_variance=True)
    assert torch.equal(new, weight.double())
    assert shift is not None and torch.equal(shift, bias.double())


@pytest.mark.parametrize("biased", [True, False])
def test_compensation_equals_least_squares(biased: bool) -> None:
    rows = mixed_rows(400, 8)
    weight, bias = torch.randn(5, 8).double(), torch.randn(5).double() if biased else None
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    outputs = rows @ weight.mT + (0 if bias is None else bias)
    inputs = rows[:, keep] - (rows[:, keep].mean(0) if biased else 0)
    wanted = torch.linalg.lstsq(inputs, outputs - (outputs.mean(0) if biased else 0)).solution.mT
    moments = moments_of(rows)
    new, shift = compensate(weight, bias, moments, keep, ridge=0.0)
    torch.testing.assert_close(new, wanted, atol=1e-8, rtol=1e-6)
    assert (shift is None) is not biased
    found = rows[:, keep] @ new.mT + (0 if shift is None else shift)
    if biased:
        torch.testing.assert_close(found.mean(0), outputs.mean(0))
    error = float((found - outputs).square().mean(0).sum())
    assert reconstruction_loss(weight, new, moments, keep, biased=biased) == pytest.approx(error)


def test_the_loss_is_the_formula_of_the_paper() -> None:
    moments, weight = moments_of(mixed_rows(100, 6)), torch.randn(3, 6).double()
    keep = torch.tensor([True, True, False, True, False, False])
    new, _ = compensate(weight, torch.zeros(3), moments, keep, ridge=0.0)
    wanted = slow_loss(weight, moments.covariance, [0, 1, 3])
    assert reconstruction_loss(weight, new, moments, keep) == pytest.approx(wanted)


def test_variance_is_restored_where_some_is_left() -> None:
    rows = mixed_rows(500, 6)
    weight = torch.randn(4, 6).double()
    weight[3] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    others = torch.cat([rows[:, :5], torch.ones(500, 1).double()], 1)
    rows[:, 5] -= others @ torch.linalg.lstsq(others, rows[:, 5]).solution  # nothing else tells it
    keep = torch.tensor([True, True, True, True, False, False])
    plain, _ = compensate(weight, torch.zeros(4), moments_of(rows), keep)
    new, shift = compensate(weight, torch.zeros(4), moments_of(rows), keep, restore_variance=True)
    assert shift is not None
    before, after = rows @ weight.mT, rows[:, keep] @ new.mT + shift
    torch.testing.assert_close(after.var(0)[:3], before.var(0)[:3])
    torch.testing.assert_close(after.mean(0), before.mean(0))
    assert torch.equal(new[3], plain[3])


def test_moments_that_are_none_are_refused() -> None:
    bad = Moments(torch.zeros(3).double(), -torch.eye(3).double(), 3)
    with pytest.raises(ValueError, match="second moments"):
        compensate(torch.ones(2, 3), torch.zeros(2), bad, torch.tensor([True, True, False]))
