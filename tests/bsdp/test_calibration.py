"""Second moments of outputs and the bases they give."""

from __future__ import annotations

import pytest
import torch

import bsdp
from bsdp.calibration import collect_output_moments, rebase
from tests.helpers.compare import decomposed, half_ranks, keep_ranks, randomize_scales, relative_error
from tests.helpers.nets import NETS, make_input, make_net


@pytest.mark.parametrize("name", list(NETS))
def test_moments_are_those_of_the_outputs_without_bias(name: str) -> None:
    net, batches = make_net(name), [make_input(name), make_input(name, batch=2)]
    outputs: dict[str, list[torch.Tensor]] = {}
    for key, layer in net.named_modules():
        if isinstance(layer, bsdp.plain_layers.SUPPORTED_TYPES):

            def note(module: torch.nn.Module, _inputs: object, output: torch.Tensor, key: str = key) -> None:
                linear = isinstance(module, torch.nn.Linear)
                bias = torch.zeros(()) if module.bias is None else module.bias
                columns = output if linear else output.movedim(1, -1)
                outputs.setdefault(key, []).append((columns - bias).flatten(0, -2))

            layer.register_forward_hook(note)
    moments = collect_output_moments(net, batches)
    assert moments.keys() == outputs.keys()
    for key, parts in outputs.items():
        columns = torch.cat(parts)
        assert moments[key].count == len(columns)
        second = (columns.T @ columns / len(columns)).double()
        torch.testing.assert_close(moments[key].second, second, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[key].mean, columns.mean(0).double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[key].covariance, columns.T.cov(correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(NETS))
def test_rebase_keeps_the_function_and_resets_the_scales(name: str) -> None:
    model, inputs = decomposed(make_net(name)), make_input(name)
    randomize_scales(model)
    expected = model(inputs)
    rebase(bsdp.named_pairs(model), collect_output_moments(model, [make_input(name, batch=16)]))
    assert relative_error(model(inputs), expected) < 1e-9
    assert all(torch.equal(p.scale, torch.ones_like(p.scale)) for p in bsdp.named_pairs(model).values())


def test_bases_are_ordered_by_output_power_and_decorrelated() -> None:
    model, inputs = decomposed(make_net("residual")), make_input("residual", batch=64)
    rebase(bsdp.named_pairs(model), collect_output_moments(model, [inputs]))
    seen: list[torch.Tensor] = []
    model.left.basis.register_forward_hook(lambda _m, _i, output: seen.append(output))
    model(inputs)
    features = seen[0].movedim(1, -1).flatten(0, -2)
    moment = features.T @ features / len(features)
    assert relative_error(moment, torch.eye(len(moment), dtype=moment.dtype)) < 1e-2
    assert (model.left.scaling.sigma.diff() <= 0).all()


def test_truncation_error_is_never_above_that_of_plain_svd() -> None:
    inputs = make_input("conv", batch=64) @ torch.randn(8, 8, dtype=torch.float64)  # far from white
    plain, data = decomposed(make_net("conv")), decomposed(make_net("conv"))
    data.load_state_dict(plain.state_dict())
    rebase(bsdp.named_pairs(data), collect_output_moments(data, [inputs]))
    expected = plain.conv1(inputs)
    for rank in range(1, 8):
        errors = []
        for model in (plain, data):
            pair = decomposed(model).conv1
            pair.load_state_dict(model.conv1.state_dict())
            order = torch.arange(rank)
            pair.keep(order)
            errors.append(relative_error(pair(inputs), expected))
        assert errors[1] <= errors[0] * (1 + 1e-3)


def test_moments_are_no_use_that_keeps_a_layer_whole() -> None:
    model = decomposed(make_net("conv"))
    for pair in bsdp.named_pairs(model).values():
        pair.watched = True
    collect_output_moments(model, [make_input("conv")])
    assert not any(pair.whole for pair in bsdp.named_pairs(model).values())


@pytest.mark.parametrize("metric", ["euclidean", "activation"])
@pytest.mark.parametrize("name", list(NETS))
def test_rebase_of_pruned_pairs_keeps_function_and_rank(name: str, metric: str) -> None:
    model, inputs = decomposed(make_net(name)), make_input(name, batch=16)
    randomize_scales(model)
    ranks = half_ranks(model)
    keep_ranks(model, ranks)
    expected = model(inputs)
    moments = collect_output_moments(model, [inputs]) if metric == "activation" else None
    rebase(bsdp.named_pairs(model), moments, metric=metric)
    assert relative_error(model(inputs), expected) < 1e-12
    for key, pair in bsdp.named_pairs(model).items():
        assert pair.rank == ranks[key]
        assert torch.equal(pair.scale, torch.ones_like(pair.scale))
        columns = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
        gram = columns.mT @ columns  # orthogonal, and ordered
        assert relative_error(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2))) < 1e-7
        assert (pair.scaling.sigma.view(pair.groups, -1).diff(dim=1) <= 0).all()


def test_euclidean_rebase_makes_trained_weights_orthonormal_again() -> None:
    model = decomposed(make_net("conv"))
    keep_ranks(model, half_ranks(model))
    pair = model.conv2
    torch.nn.init.normal_(pair.basis.weight)
    torch.nn.init.normal_(pair.scaling.weight)
    expected = pair.product.detach().clone()
    rebase({"conv2": pair}, metric="euclidean")
    basis = pair.basis.weight.detach().flatten(1)
    assert relative_error(basis @ basis.T, torch.eye(pair.rank, dtype=basis.dtype)) < 1e-12
    assert relative_error(pair.product, expected) < 1e-12
    values = torch.linalg.svdvals(expected[0])[: pair.rank]
    assert relative_error(pair.scaling.sigma, values) < 1e-12


@pytest.mark.parametrize("metric", ["euclidean", "activation"])
def test_a_product_of_lower_rank_than_its_pair_stays_sound(metric: str) -> None:
    model, inputs = decomposed(make_net("conv")), make_input("conv", batch=16)
    keep_ranks(model, half_ranks(model))
    with torch.no_grad():
        model.conv2.scaling.delta[:3] = -1.0
        model.conv1.scaling.delta.fill_(-1.0)  # nothing is left
    for _ in range(2):
        expected = model(inputs)
        moments = None if metric == "euclidean" else collect_output_moments(model, [inputs])
        rebase(bsdp.named_pairs(model), moments, metric=metric)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)


def test_rebase_drops_the_momentum_of_what_it_changes() -> None:
    model, inputs = decomposed(make_net("conv")), make_input("conv", batch=16)
    pair = model.conv2
    for parameter in pair.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    model(inputs).square().sum().backward()
    optimizer.step()
    rebase({"conv2": pair}, metric="euclidean", optimizers=[optimizer])
    for parameter in (pair.basis.weight, pair.scaling.weight, pair.scaling.delta):
        assert parameter not in optimizer.state
        assert parameter.grad is None
    assert pair.scaling.bias in optimizer.state
    assert model.head.weight in optimizer.state
    assert model.conv1.scaling.delta in optimizer.state


def test_a_metric_of_the_data_needs_moments() -> None:
    with pytest.raises(ValueError, match="`metric='activation'` needs `moments`"):
        rebase(bsdp.named_pairs(decomposed(make_net("conv"))))


def test_nan_moments_are_refused() -> None:
    model = decomposed(make_net("conv"))
    moments = {name: m.second * float("nan") for name, m in collect_output_moments(model, [make_input("conv")]).items()}
    with pytest.raises(ValueError, match="layer 'conv1': its output statistics hold NaN or infinity"):
        rebase(bsdp.named_pairs(model), moments)
