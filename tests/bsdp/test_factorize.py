"""Factors of a weight: reconstruction, orthonormality, energies and the activation metric."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import bsdp
from bsdp.factorize import METRICS, factorize
from bsdp.plain_layers import to_matrix
from tests.helpers.cases import CASES_BY_NAME
from tests.helpers.compare import relative_error
from tests.helpers.reference import input_moment, output_moment

SHAPES = [(1, 8, 20), (1, 20, 8), (1, 6, 6), (3, 4, 9), (2, 9, 4), (2, 1, 5), (1, 5, 1)]


def random_moment(size: int, *, rank: int | None = None) -> Tensor:
    """A second moment with a steep spectrum."""
    samples = torch.randn(4 * size, rank or size, dtype=torch.float64) * torch.logspace(0, -2, rank or size)
    mixed = samples @ torch.randn(rank or size, size, dtype=torch.float64)
    return mixed.T @ mixed / len(mixed)


def coloured_images(*shape: int) -> Tensor:
    """Smooth images with a mean, as real data are; white noise would make all metrics the same."""
    images = torch.randn(*shape, dtype=torch.float64)
    return (images.cumsum(-1).cumsum(-2) / shape[-1] + 0.5) * torch.linspace(0.1, 2.0, shape[1])[:, None, None]


def moments_of(metric: str, size: int) -> dict[str, Tensor | None]:
    """Random arguments of `factorize`."""
    moment = None if metric == "euclidean" else random_moment(size)
    return {"moment": moment, "gradient": random_moment(size) if metric == "kfac" else None}


def squared_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_factors_multiply_back_to_the_matrix(shape: tuple[int, int, int], metric: str) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    factors = factorize(matrix, metric=metric, **moments_of(metric, shape[0] * shape[1]))
    rank = min(shape[1:])
    assert factors.basis.shape == (shape[0], rank, shape[2])
    assert factors.coefficients.shape == (shape[0], shape[1], rank)
    assert factors.sigma.shape == (shape[0], rank)
    assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-12


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.sampled_from([torch.float16, torch.float32]))
def test_any_shape_and_dtype_is_factorised_in_float64(groups: int, out: int, fan_in: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(groups, out, fan_in).to(dtype)
    factors = factorize(matrix)
    assert factors.basis.dtype == factors.coefficients.dtype == torch.float64
    assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-12
    assert (factors.sigma.diff(dim=1) <= 0).all()
    assert (factors.sigma >= 0).all()


# Oracle 2
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_euclidean_bases_and_left_vectors_are_orthonormal(shape: tuple[int, int, int]) -> None:
    factors = factorize(torch.randn(shape, dtype=torch.float64))
    identity = torch.eye(factors.basis.shape[1], dtype=torch.float64).expand(shape[0], -1, -1)
    assert relative_error(factors.basis @ factors.basis.mT, identity) < 1e-12
    left = factors.coefficients / factors.sigma[:, None, :]
    assert relative_error(left.mT @ left, identity) < 1e-12


def steep(groups: int, out: int, fan_in: int, *, smallest: float) -> Tensor:
    """A matrix whose singular values fall evenly, on a logarithmic scale, from 1 to `smallest`."""
    rank = min(out, fan_in)
    left = torch.linalg.qr(torch.randn(groups, out, rank, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(groups, fan_in, rank, dtype=torch.float64)).Q
    exponents = torch.linspace(0, 1, rank, dtype=torch.float64)
    return left * smallest**exponents @ right.mT


@pytest.mark.parametrize("smallest", [0.5, 0.01, 1e-9], ids=str)
@pytest.mark.parametrize("shape", [(1, 60, 150), (1, 150, 60), (2, 64, 64)], ids=str)
def test_large_matrices_get_the_factors_of_an_svd(shape: tuple[int, int, int], smallest: float) -> None:
    matrix = steep(*shape, smallest=smallest)
    factors = factorize(matrix)
    identity = torch.eye(min(shape[1:]), dtype=torch.float64).expand(shape[0], -1, -1)
    assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-13
    assert relative_error(factors.basis @ factors.basis.mT, identity) < 1e-12
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    assert (factors.sigma - sigma).abs().max() < 1e-8
    assert (factors.sigma.diff(dim=1) <= 0).all()
    for rank in (1, 20, 50):
        best = left[:, :, :rank] * sigma[:, None, :rank] @ right[:, :rank]
        actual = factors.coefficients[:, :, :rank] @ factors.basis[:, :rank]
        assert relative_error(actual, best) < 1e-6


def test_a_large_matrix_of_low_rank_gets_a_whole_orthonormal_basis() -> None:
    matrix = torch.zeros(1, 60, 90, dtype=torch.float64)
    matrix[:, :5] = torch.randn(1, 5, 90, dtype=torch.float64)
    factors = factorize(matrix)
    assert relative_error(factors.basis @ factors.basis.mT, torch.eye(60, dtype=torch.float64)[None]) < 1e-12
    assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-13
    assert factors.sigma[0, 5:].max() < 1e-12


# Oracle 2
@pytest.mark.parametrize("name", ["first_conv", "strided", "pointwise", "linear_narrow", "linear_wide"])
def test_activation_bases_are_orthonormal_in_the_metric_of_the_data(name: str) -> None:
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    inputs = torch.randn(40, *case.input_shape[1:], dtype=torch.float64)
    matrix = to_matrix(layer.weight.detach(), 1)
    factors = factorize(matrix, metric="activation", moment=output_moment(layer, inputs))
    # The ridge is an isotropic input moment; without it U'^T A U' would be the identity exactly.
    ridge = 1e-4 * output_moment(layer, inputs).trace() / matrix.square().sum()
    moment = input_moment(layer, inputs)
    moment = moment + ridge * torch.eye(len(moment), dtype=torch.float64)
    gram = factors.basis[0] @ moment @ factors.basis[0].T
    assert relative_error(gram, torch.eye(len(gram), dtype=torch.float64)) < 1e-8
    left = factors.coefficients[0] / factors.sigma[0]
    assert relative_error(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64)) < 1e-12


# Oracle 8
@pytest.mark.parametrize("name", ["first_conv", "strided", "pointwise", "reflect", "same", "groups", "linear_narrow"])
def test_activation_metric_never_has_a_larger_output_error_than_the_plain_svd(name: str) -> None:
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    if isinstance(layer, nn.Linear):
        inputs = torch.randn(50, 20, dtype=torch.float64) @ torch.diag(torch.logspace(0, -2, 20, dtype=torch.float64))
    else:
        inputs = coloured_images(20, *case.input_shape[1:])
    moment = output_moment(layer, inputs)
    total = squared_error(layer(inputs), layer(inputs * 0))
    gains = []
    for rank in range(1, bsdp.layer_cost(layer).full_rank):
        errors = {}
        for metric in ("euclidean", "activation"):
            pair = bsdp.pair_from_layer(layer, metric=metric, moment=moment)
            pair.keep(torch.cat([torch.arange(rank) + g * pair.rank for g in range(pair.groups)]))
            errors[metric] = squared_error(pair(inputs), layer(inputs))
        assert errors["activation"] <= errors["euclidean"] * (1 + 1e-3) + 1e-6 * total
        gains.append(errors["euclidean"] / max(errors["activation"], 1e-12))
    assert max(gains) > 1.5  # and it is not just the same thing


def test_activation_truncation_is_the_svd_of_the_weight_in_the_data_metric() -> None:
    layer = nn.Linear(10, 6, bias=False).double()
    inputs = torch.randn(200, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    factors = factorize(layer.weight.detach()[None], metric="activation", moment=output_moment(layer, inputs))
    values, vectors = torch.linalg.eigh(input_moment(layer, inputs))
    root = vectors * values.sqrt() @ vectors.T
    left, sigma, right = torch.linalg.svd(layer.weight.detach() @ root, full_matrices=False)
    for rank in range(1, 6):
        expected = left[:, :rank] * sigma[:rank] @ right[:rank] @ torch.linalg.inv(root)
        actual = factors.coefficients[0, :, :rank] @ factors.basis[0, :rank]
        assert relative_error(actual, expected) < 1e-2  # up to the ridge


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_activation_metric_is_exact_at_full_rank_whatever_noise_the_moment_has(noise: float) -> None:
    # fan_in < out and singular values down to 1e-3: noise of a float32 sum must not displace a weak direction.
    left, _ = torch.linalg.qr(torch.randn(32, 9, dtype=torch.float64))
    matrix = (left * torch.logspace(0, -3, 9, dtype=torch.float64)) @ torch.randn(9, 9, dtype=torch.float64)
    outputs = matrix @ torch.randn(9, 100, dtype=torch.float64)
    moment = outputs @ outputs.T / 100
    moment = moment + noise * moment.diagonal().mean() * torch.randn(32, 32, dtype=torch.float64)
    factors = factorize(matrix[None], metric="activation", moment=moment)
    assert relative_error(factors.coefficients[0] @ factors.basis[0], matrix) < 1e-12


def test_activation_metric_copes_with_data_that_never_excite_the_layer() -> None:
    matrix = torch.randn(1, 5, 7, dtype=torch.float64)
    for rank in (None, 2):
        moment = torch.zeros(5, 5) if rank is None else random_moment(5, rank=rank)
        factors = factorize(matrix, metric="activation", moment=moment)
        assert factors.sigma.isfinite().all()
        assert (factors.sigma > 0).all()
        assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-12


def test_a_weight_of_zeros_is_factorised_into_zeros() -> None:
    for metric in METRICS:
        factors = factorize(torch.zeros(2, 3, 4), metric=metric, moment=torch.zeros(6, 6), gradient=torch.zeros(6, 6))
        assert (factors.coefficients @ factors.basis == 0).all()
        assert factors.sigma.isfinite().all()


def test_activation_metric_uses_the_diagonal_blocks_of_the_groups_only() -> None:
    matrix = torch.randn(2, 3, 5, dtype=torch.float64)
    moment = random_moment(6)
    blocks = torch.block_diag(moment[:3, :3], moment[3:, 3:])
    whole = factorize(matrix, metric="activation", moment=moment)
    apart = factorize(matrix, metric="activation", moment=blocks)
    assert torch.equal(whole.sigma, apart.sigma)
    first = factorize(matrix[:1], metric="activation", moment=moment[:3, :3])
    assert relative_error(whole.sigma[:1], first.sigma) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_and_moments_that_are_not_finite_are_refused(bad: float) -> None:
    matrix = torch.randn(1, 3, 4)
    broken = matrix.clone()
    broken[0, 1, 2] = bad
    with pytest.raises(ValueError, match="weight holds NaN or infinity"):
        factorize(broken)
    moment = torch.eye(3)
    moment[1, 1] = bad
    with pytest.raises(ValueError, match="statistics hold NaN or infinity"):
        factorize(matrix, metric="activation", moment=moment)


def test_a_moment_of_another_size_or_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 6 x 6, got the shape \(3, 3\)"):
        factorize(torch.randn(2, 3, 4), metric="activation", moment=torch.eye(3))
    with pytest.raises(ValueError, match="`metric='activation'` needs the second moment"):
        factorize(torch.randn(2, 3, 4), metric="activation")


# Oracle 4
@pytest.mark.parametrize("name", ["first_conv", "strided", "dilated", "groups", "conv3d", "linear_tokens"])
def test_squared_error_of_dropped_bases_is_the_sum_of_their_energies(name: str) -> None:
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    inputs = torch.randn(case.input_shape, dtype=torch.float64) + 1.0  # any input, not centred, not white
    pair = bsdp.pair_from_layer(layer)
    nn.init.uniform_(pair.scaling.delta, -0.5, 0.5)
    expected = pair(inputs)
    features = pair.basis(inputs)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    rows = features.movedim(axis, -1).reshape(-1, features.shape[axis])
    energies = (pair.scale * pair.scaling.sigma * rows).square().sum(0).detach()
    drop = torch.rand(len(energies)) < 0.4
    pair.scaling.delta.data[drop] = -1.0
    error = squared_error(pair(inputs), expected)
    assert 0 < drop.sum() < len(drop)
    assert error == pytest.approx(float(energies[drop].sum()), rel=1e-10)


# Oracle 5
@pytest.mark.parametrize("name", ["strided", "pointwise", "linear_narrow"])
def test_least_squares_scales_of_the_survivors_stay_one(name: str) -> None:
    case = CASES_BY_NAME[name]
    layer = case.build().double()
    inputs = torch.randn(case.input_shape, dtype=torch.float64) + 0.5
    pair = bsdp.pair_from_layer(layer)
    target = (layer(inputs) - layer(inputs * 0)).flatten().detach()
    terms = []
    for k in range(pair.rank):
        alone = bsdp.pair_from_layer(layer)
        alone.scaling.bias.data.zero_()
        alone.keep(torch.tensor([k]))
        terms.append(alone(inputs).flatten().detach())
    survivors = torch.stack(terms[::2], dim=1)
    scales = torch.linalg.lstsq(survivors, target[:, None]).solution[:, 0]
    assert relative_error(scales, torch.ones_like(scales)) < 1e-9


# Order: more rank never raises the error.
@pytest.mark.parametrize("metric", ["euclidean", "activation"])
def test_more_rank_never_raises_the_output_error(metric: str) -> None:
    layer = nn.Conv2d(6, 10, 3).double()
    inputs = coloured_images(8, 6, 9, 9)
    errors = []
    for rank in range(1, 11):
        pair = bsdp.pair_from_layer(layer, metric=metric, moment=output_moment(layer, inputs))
        pair.keep(torch.arange(rank))
        errors.append(squared_error(pair(inputs), layer(inputs)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-20


def weighted_error(layer: nn.Conv2d, inputs: Tensor, gradient: Tensor, metric: str, rank: int) -> float:
    """The squared output error of a truncation, weighted by a moment of gradients."""
    factors = factorize(
        to_matrix(layer.weight.detach(), layer.groups),
        metric=metric,
        moment=output_moment(layer, inputs),
        gradient=gradient,
    )
    pair = bsdp.pair_from_layer(layer)
    pair.set_factors(factors.basis, factors.coefficients, factors.sigma)
    pair.keep(torch.cat([torch.arange(rank) + g * pair.rank for g in range(pair.groups)]))
    error = (pair(inputs) - layer(inputs)).detach().movedim(1, -1).flatten(0, -2)
    return float((error @ gradient * error).sum())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 12), (2, 40)], ids=["wide", "tall"])
def test_kfac_truncation_never_has_a_larger_weighted_error(groups: int, inputs: int, outputs: int) -> None:
    layer = nn.Conv2d(inputs * groups, outputs * groups, 3, groups=groups).double()
    images = coloured_images(10, inputs * groups, 7, 7)
    gradient = torch.block_diag(*(random_moment(outputs) for _ in range(groups)))
    total = weighted_error(layer, images, gradient, "euclidean", 1)
    gains = []
    for rank in range(1, min(9 * inputs, outputs)):
        errors = {m: weighted_error(layer, images, gradient, m, rank) for m in METRICS}
        assert errors["kfac"] <= errors["activation"] * (1 + 1e-3) + 3e-4 * total
        gains.append(errors["activation"] / max(errors["kfac"], 1e-12))
    assert max(gains) > 1.2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kfac_with_white_gradients_is_the_activation_metric(shape: tuple[int, int, int]) -> None:
    matrix, size = torch.randn(shape, dtype=torch.float64), shape[0] * shape[1]
    moment = random_moment(size)
    white = torch.block_diag(*(3.0 * (g + 1) * torch.eye(shape[1]) for g in range(shape[0])))
    expected = factorize(matrix, metric="activation", moment=moment)
    actual = factorize(matrix, metric="kfac", moment=moment, gradient=white)
    assert relative_error(actual.sigma, expected.sigma) < 1e-4
    for rank in range(1, min(shape[1:]) + 1):
        products = [f.coefficients[:, :, :rank] @ f.basis[:, :rank] for f in (actual, expected)]
        assert relative_error(*products) < 1e-6


def test_kfac_is_the_svd_of_the_weight_between_both_moments() -> None:
    layer = nn.Linear(10, 6, bias=False).double()
    inputs = torch.randn(200, 10, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    mixing = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64)
    gradients = torch.randn(200, 6, dtype=torch.float64) @ mixing
    gradient = gradients.T @ gradients / 200
    matrix = layer.weight.detach()
    factors = factorize(matrix[None], metric="kfac", moment=output_moment(layer, inputs), gradient=gradient)
    roots = []
    for moment in (input_moment(layer, inputs), gradient / gradient.diagonal().mean()):
        values, vectors = torch.linalg.eigh(moment)
        roots.append(vectors * values.sqrt() @ vectors.T)
    left, sigma, right = torch.linalg.svd(roots[1] @ matrix @ roots[0], full_matrices=False)
    assert relative_error(factors.sigma[0], sigma) < 1e-2  # up to the ridges
    for rank in range(1, 6):
        truncated = left[:, :rank] * sigma[:rank] @ right[:rank]
        expected = torch.linalg.inv(roots[1]) @ truncated @ torch.linalg.inv(roots[0])
        assert relative_error(factors.coefficients[0, :, :rank] @ factors.basis[0, :rank], expected) < 2e-2


@pytest.mark.parametrize("gradient", [torch.zeros(5, 5), random_moment(5, rank=1)], ids=["none", "rank one"])
def test_kfac_copes_with_gradients_that_vanish(gradient: Tensor) -> None:
    matrix, moment = torch.randn(1, 5, 7, dtype=torch.float64), random_moment(5)
    factors = factorize(matrix, metric="kfac", moment=moment, gradient=gradient)
    assert factors.sigma.isfinite().all()
    assert (factors.sigma.diff() <= 0).all()
    assert relative_error(factors.coefficients @ factors.basis, matrix) < 1e-11


def test_kfac_without_gradients_or_with_broken_ones_is_refused() -> None:
    matrix, moment = torch.randn(1, 3, 4), torch.eye(3)
    with pytest.raises(ValueError, match="`metric='kfac'` needs the second moment of the gradients"):
        factorize(matrix, metric="kfac", moment=moment)
    with pytest.raises(ValueError, match="its gradient statistics must be 3 x 3"):
        factorize(matrix, metric="kfac", moment=moment, gradient=torch.eye(4))
    with pytest.raises(ValueError, match="its gradient statistics hold NaN"):
        factorize(matrix, metric="kfac", moment=moment, gradient=moment * float("nan"))
