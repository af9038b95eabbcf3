"""Low-rank layers by least squares, against direct solutions on the columns themselves."""

import pytest
import torch
from torch import Tensor

from bsdp.joint_moments import JointMoments
from bsdp.least_squares import LowRank, reduced_rank_layer, refitted_layer


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(target: Tensor, output: Tensor, groups: int = 1) -> JointMoments:
    """From columns ``[positions, out]``."""
    means = target.mean(0), output.mean(0)
    y, z = ((t - m).view(len(t), groups, -1).permute(1, 2, 0) for t, m in zip((target, output), means, strict=True))
    return JointMoments(*means, y @ z.mT / len(target), z @ z.mT / len(target), len(target))


def outputs(layer: LowRank, inputs: Tensor) -> Tensor:
    """Of inputs ``[positions, groups * fan_in]``."""
    grouped = inputs.view(len(inputs), len(layer.basis), -1).permute(1, 2, 0)
    return (layer.coefficients @ layer.basis @ grouped).permute(2, 0, 1).flatten(1) + layer.bias


class Case:
    """A layer of `groups`, what it is given in the original and in a shortened network, and what it puts out."""

    def __init__(self, groups: int = 1, out: int = 6, fan_in: int = 9, rank: int | None = None) -> None:
        rank = min(out, fan_in) if rank is None else rank
        self.left, self.right = seeded(groups, out, rank, seed=1), seeded(groups, rank, fan_in, seed=2)
        self.bias = seeded(groups * out, seed=3)
        self.inputs = seeded(200, groups * fan_in, seed=4) + 0.5
        self.changed = self.inputs + 0.4 * seeded(200, groups * fan_in, seed=5)
        old = LowRank(self.right, self.left, self.bias)
        self.target, self.output = outputs(old, self.inputs), outputs(old, self.changed)
        self.moments = moments_of(self.target, self.output, groups)


@pytest.mark.parametrize("groups", [1, 3])
def test_without_a_change_full_rank_is_the_old_layer(groups: int) -> None:
    case = Case(groups)
    moments = moments_of(case.output, case.output, groups)
    for layer in (
        reduced_rank_layer(case.left, case.right, case.bias, moments, 6),
        refitted_layer(case.left, case.right, case.bias, moments, torch.arange(6 * groups)),
    ):
        torch.testing.assert_close(layer.coefficients @ layer.basis, case.left @ case.right)
        torch.testing.assert_close(layer.bias, case.bias)


def test_kept_bases_get_the_coefficients_of_lstsq() -> None:
    case, keep = Case(), torch.tensor([0, 2, 5])
    layer = refitted_layer(case.left, case.right, case.bias, case.moments, keep, ridge=0.0)

    features = case.changed @ case.right[0, keep].mT
    design = torch.cat([features, torch.ones(200, 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, case.target).solution
    torch.testing.assert_close(layer.coefficients[0], wanted[:3].mT)
    torch.testing.assert_close(layer.bias, wanted[3])
    assert torch.equal(layer.basis, case.right[:, keep])


@pytest.mark.parametrize(("out", "fan_in"), [(6, 9), (9, 4)])
def test_no_layer_of_that_rank_comes_closer(out: int, fan_in: int) -> None:
    case = Case(out=out, fan_in=fan_in)
    layer = reduced_rank_layer(case.left, case.right, case.bias, case.moments, 2, ridge=0.0)

    # Reduced-rank regression the long way: the least-squares fit on the inputs that lie in the old layer's rows,
    # projected on the principal directions of what it puts out.
    features = case.changed @ case.right[0].mT
    centred = features - features.mean(0)
    fit = torch.linalg.lstsq(centred, case.target - case.target.mean(0)).solution
    directions = torch.linalg.svd(centred @ fit, full_matrices=False).Vh[:2]
    best = centred @ fit @ directions.mT @ directions + case.target.mean(0)
    torch.testing.assert_close(outputs(layer, case.changed), best)


@pytest.mark.parametrize("groups", [1, 3])
def test_error_falls_with_the_rank_and_is_below_plain_truncation(groups: int) -> None:
    case = Case(groups)

    def error(layer: LowRank) -> float:
        return float((outputs(layer, case.changed) - case.target).square().mean())

    errors = [error(reduced_rank_layer(case.left, case.right, case.bias, case.moments, r)) for r in range(1, 7)]
    assert errors == sorted(errors, reverse=True)
    for rank in range(1, 7):
        keep = torch.cat([torch.arange(rank) + 6 * g for g in range(groups)])
        refitted = error(refitted_layer(case.left, case.right, case.bias, case.moments, keep))
        plain = error(LowRank(case.right[:, :rank], case.left[:, :, :rank], case.bias))
        assert errors[rank - 1] <= refitted * (1 + 1e-6)
        assert refitted <= plain


def test_a_large_ridge_pulls_to_the_old_weights() -> None:
    case = Case()
    for layer in (
        reduced_rank_layer(case.left, case.right, case.bias, case.moments, 6, ridge=1e9),
        refitted_layer(case.left, case.right, case.bias, case.moments, torch.arange(6), ridge=1e9),
    ):
        torch.testing.assert_close(layer.coefficients @ layer.basis, case.left @ case.right)


def test_silent_outputs_keep_the_weights() -> None:
    case = Case()
    silent = moments_of(case.bias.expand(10, -1), case.bias.expand(10, -1))
    layer = reduced_rank_layer(case.left, case.right, case.bias, silent, 6)
    torch.testing.assert_close(layer.coefficients @ layer.basis, case.left @ case.right)
    kept = refitted_layer(case.left, case.right, case.bias, silent, torch.arange(6))
    torch.testing.assert_close(kept.coefficients, case.left)


def test_fewer_positions_than_outputs_give_finite_weights() -> None:
    case = Case()
    few = moments_of(case.target[:3], case.output[:3])
    layer = reduced_rank_layer(case.left, case.right, case.bias, few, 4)
    assert all(t.isfinite().all() for t in (layer.basis, layer.coefficients, layer.bias))


def test_a_layer_that_was_cut_before_is_cut_further() -> None:
    case = Case(rank=4)
    layer = reduced_rank_layer(case.left, case.right, case.bias, case.moments, 2)
    assert layer.basis.shape == (1, 2, 9)
    whole = reduced_rank_layer(case.left, case.right, case.bias, moments_of(case.output, case.output), 4)
    torch.testing.assert_close(whole.coefficients @ whole.basis, case.left @ case.right)


def test_nan_is_refused() -> None:
    case = Case()
    broken = moments_of(case.target * float("nan"), case.output)
    with pytest.raises(ValueError, match="calibration data"):
        reduced_rank_layer(case.left, case.right, case.bias, broken, 2)
    with pytest.raises(ValueError, match="calibration data"):
        refitted_layer(case.left, case.right, case.bias, broken, torch.arange(2))
