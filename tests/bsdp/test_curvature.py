"""Hutchinson's estimate against the exact Hessian, and the scores made of it."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

import bsdp
from bsdp.curvature import hutchinson_by_differences, hutchinson_diagonal, measure_curvature
from bsdp.importance import NoScoresError, ScoreAccumulator, second_order
from bsdp.layers import named_pairs
from tests.helpers.compare import decomposed, randomize_scales, relative_error


class Once(torch.autograd.Function):
    """A cube that cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)  # type: ignore[attr-defined]
        return inputs**3

    @staticmethod
    @once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 3.0 * inputs**2 * gradient


class Cube(nn.Module):
    """A smooth activation; `twice` says whether it has a second derivative."""

    twice = True

    def forward(self, inputs: Tensor) -> Tensor:
        cubed: Tensor = inputs**3 if self.twice else Once.apply(inputs)
        return cubed


class Case:
    """A tiny network, its loss on one batch, and the exact derivatives in all scaling factors together."""

    def __init__(self, *, twice: bool = True) -> None:
        torch.manual_seed(3)
        cube = Cube()
        cube.twice = twice
        self.net = decomposed(nn.Sequential(nn.Linear(4, 3), cube, nn.Linear(3, 4), nn.Linear(4, 2)).double())
        randomize_scales(self.net)
        self.inputs = 0.7 * torch.randn(6, 4, dtype=torch.float64)
        self.pairs = named_pairs(self.net)
        self.deltas = [pair.scaling.delta for pair in self.pairs.values()]

    def loss(self) -> Tensor:
        return self.net(self.inputs).square().mean()

    def exact(self) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian."""
        names = [f"{name}.scaling.delta" for name in self.pairs]
        flat = torch.cat([delta.detach() for delta in self.deltas])

        def loss(vector: Tensor) -> Tensor:
            parts = torch.split(vector, [delta.numel() for delta in self.deltas])
            return functional_call(self.net, dict(zip(names, parts, strict=True)), self.inputs).square().mean()

        gradient = torch.autograd.functional.jacobian(loss, flat)
        return gradient, torch.autograd.functional.hessian(loss, flat)


def test_one_sample_is_the_product_of_the_hessian_with_random_signs() -> None:
    case = Case()
    gradient, hessian = case.exact()
    found = hutchinson_diagonal(case.loss(), case.deltas, samples=1, generator=torch.Generator().manual_seed(7))
    drawn = torch.randint(0, 2, gradient.shape, generator=torch.Generator().manual_seed(7))
    vector = torch.where(drawn == 1, 1.0, -1.0).double()
    assert relative_error(found.gradient, gradient) < 1e-10
    assert relative_error(found.diagonal, vector * (hessian @ vector)) < 1e-10


def test_samples_converge_to_the_diagonal() -> None:
    case = Case()
    diagonal = case.exact()[1].diagonal()
    errors = []
    for samples in (2, 400):
        generator = torch.Generator().manual_seed(1)
        found = hutchinson_diagonal(case.loss(), case.deltas, samples=samples, generator=generator)
        errors.append(relative_error(found.diagonal, diagonal))
    assert errors[1] < 0.1 < errors[0]


def test_differences_agree_and_leave_the_scales_alone() -> None:
    case = Case()
    before = [delta.detach().clone() for delta in case.deltas]
    options = [{"samples": 3, "generator": torch.Generator().manual_seed(2)} for _ in range(2)]
    exact = hutchinson_diagonal(case.loss(), case.deltas, **options[0])  # type: ignore[arg-type]
    found = hutchinson_by_differences(case.loss, case.deltas, **options[1])  # type: ignore[arg-type]
    assert relative_error(found.gradient, exact.gradient) < 1e-12
    assert relative_error(found.diagonal, exact.diagonal) < 1e-7
    assert all(torch.equal(delta, old) for delta, old in zip(case.deltas, before, strict=True))


def test_float32_differences_are_close() -> None:
    case = Case()
    exact = hutchinson_diagonal(case.loss(), case.deltas, generator=torch.Generator().manual_seed(2)).diagonal
    case.net.float()
    case.inputs = case.inputs.float()
    found = hutchinson_by_differences(case.loss, case.deltas, generator=torch.Generator().manual_seed(2))
    assert relative_error(found.diagonal, exact) < 0.01


def test_a_network_without_second_derivatives_is_measured_by_differences() -> None:
    case, smooth = Case(twice=False), Case()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        hutchinson_diagonal(case.loss(), case.deltas)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        return case.loss()

    found = measure_curvature(loss, case.deltas, samples=2, generator=generators[0])
    expected = hutchinson_diagonal(smooth.loss(), smooth.deltas, samples=2, generator=generators[1])
    assert relative_error(found.diagonal, expected.diagonal) < 1e-7
    assert len(calls) == 1 + 1 + 2 * 2


def test_gradients_and_frozen_scales_stay_as_they_are() -> None:
    case = Case()
    case.net.requires_grad_(False)
    case.deltas[0].grad = torch.ones_like(case.deltas[0])
    with torch.no_grad():
        found = measure_curvature(case.loss, case.deltas)
    assert found.diagonal.any()
    assert not any(parameter.requires_grad for parameter in case.net.parameters())
    assert case.deltas[0].grad.tolist() == [1.0] * 3 and case.deltas[1].grad is None


def test_a_scale_without_influence_and_a_linear_loss_have_no_curvature() -> None:
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    found = hutchinson_diagonal((used**2).sum(), [used, unused])
    assert found.gradient.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert found.diagonal.tolist() == [2.0, 2.0, 0.0, 0.0]
    linear = hutchinson_diagonal(used.sum(), [used])
    assert linear.gradient.tolist() == [1.0, 1.0] and linear.diagonal.tolist() == [0.0, 0.0]


def test_errors_of_the_loss_are_not_swallowed() -> None:
    def broken() -> Tensor:
        raise RuntimeError("no such image")

    with pytest.raises(RuntimeError, match="no such image"):
        measure_curvature(broken, Case().deltas)
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        measure_curvature(Case().loss, Case().deltas, samples=0)


# --- scores


def test_the_formula_on_numbers() -> None:
    scale, gradient, diagonal = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, -3.0, 5.0]), torch.tensor([4.0, 2, 9])
    assert second_order(scale, gradient, diagonal).tolist() == [6.0, 4.0, 0.0]


def test_the_score_is_the_change_of_a_quadratic_loss_with_a_diagonal_hessian() -> None:
    # One linear layer with orthonormal V under a squared error: its cross derivatives in s vanish.
    net = decomposed(nn.Sequential(nn.Linear(6, 5), nn.Identity()).double(), include=["0"])
    randomize_scales(net)
    inputs, targets = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)

    def loss() -> Tensor:
        return (net(inputs) - targets).square().mean()

    scores = ScoreAccumulator(named_pairs(net), importance="second_order")
    scores.update_curvature(loss, samples=1)
    delta, before = named_pairs(net)["0"].scaling.delta, loss().item()
    changes = []
    for k in range(5):
        old = delta.data[k].clone()
        delta.data[k] = -1.0
        changes.append(loss().item() - before)
        delta.data[k] = old
    assert relative_error(scores.compute()["0"], torch.tensor(changes).abs()) < 1e-5


def test_minibatches_are_averaged_after_the_absolute_value_and_broken_ones_left_out() -> None:
    case = Case()
    whole = ScoreAccumulator(case.pairs, importance="second_order")
    parts, generator = [], torch.Generator()
    for seed, factor in enumerate((1.0, -2.0, float("nan"))):
        for scores in (whole, ScoreAccumulator(case.pairs, importance="second_order")):
            generator.manual_seed(seed)
            scores.update_curvature(lambda f=factor: f * case.loss(), generator=generator)  # type: ignore[misc]
            if scores is not whole and seed < 2:
                parts.append(torch.cat(list(scores.compute().values())))
    assert whole.steps == 2
    assert relative_error(torch.cat(list(whole.compute().values())), (parts[0] + parts[1]) / 2) < 1e-6


def test_a_cut_without_curvature_is_refused_with_advice() -> None:
    scores = ScoreAccumulator(Case().pairs, importance="second_order")
    assert scores.needs_curvature and not scores.needs_gradients and not scores.needs_hooks
    with pytest.raises(NoScoresError, match="call `update_curvature`"):
        scores.compute()


def test_a_pruner_cuts_by_curvature() -> None:
    torch.manual_seed(0)
    net = decomposed(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), include=["0"])
    settings = bsdp.PruningSettings(target=0.3, rounds=1, tolerance=None, importance="second_order")
    pruner = bsdp.IterativePruner(net, settings, bsdp.measure_cost(net))
    weakest = named_pairs(net)["0"].scaling.weight
    weakest.data[:, 3] = 0.0
    images = torch.randn(16, 8)
    with pytest.warns(UserWarning, match="round 1 is skipped: no finite curvature"):
        assert not pruner.cut(1)
    pruner.scheduled = 0
    pruner.scores.update_curvature(lambda: net(images).square().mean())
    kept = weakest.data.clone()
    assert pruner.cut(1)
    left = named_pairs(net)["0"].scaling.weight.data
    assert left.shape[1] < 8 and not (left == 0).all(0).any() and kept.shape[1] == 8
