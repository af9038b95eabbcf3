"""Training both layers of a pair, or the one that is not square."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bsdp
from bsdp.calibration import rebase
from bsdp.plain_layers import matrix_of
from bsdp.weight_training import condition_factors, square_factor

LAYERS = {
    "wide": lambda: nn.Conv2d(8, 6, 3, bias=False),
    "tall": lambda: nn.Conv2d(4, 12, 1),
    "square": lambda: nn.Conv2d(8, 8, 1),
    "linear": lambda: nn.Linear(5, 9),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
}


def inputs_of(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(7, layer.in_features, dtype=torch.float64)
    assert isinstance(layer.in_channels, int)
    return torch.randn(3, layer.in_channels, 6, 6, dtype=torch.float64)


def decomposed(kind: str) -> tuple[nn.Module, nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    plain, net = nn.Sequential(layer), nn.Sequential(bsdp.pair_from_layer(layer))
    return plain, net, inputs_of(layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_descent_is_that_of_the_original_layer(kind: str) -> None:
    plain, net, inputs = decomposed(kind)
    before = net(inputs)
    bsdp.freeze(net, train_weights=True)
    pairs = bsdp.named_pairs(net)
    condition_factors(pairs)
    assert torch.allclose(net(inputs), before, atol=1e-10)
    pairs["0"].scaling.delta.requires_grad_(False)
    for model in (plain, net):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert torch.allclose(pairs["0"].weight, plain[0].weight, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_square_layers_have_unit_length_and_do_not_train(kind: str) -> None:
    _, net, _ = decomposed(kind)
    pair = bsdp.named_pairs(net)["0"]
    bsdp.freeze(net, train_weights=True)
    condition_factors({"0": pair})
    factor = square_factor(pair)
    assert factor is not None
    assert not factor.requires_grad
    assert sum(p.requires_grad for p in (pair.scaling.weight, pair.basis.weight)) == 1
    columns = pair.scaling.weight.detach().view(pair.groups, pair.out_per_group, pair.rank)
    square = columns if factor is pair.scaling.weight else matrix_of(pair.basis).detach()
    eye = torch.eye(pair.rank, dtype=torch.float64).expand_as(square.mT @ square)
    assert torch.allclose(square.mT @ square, eye, atol=1e-9)


@pytest.mark.parametrize("kind", ["wide", "tall", "grouped"])
def test_both_layers_train_after_a_cut(kind: str) -> None:
    _, net, inputs = decomposed(kind)
    bsdp.freeze(net, train_weights=True)
    pairs = bsdp.named_pairs(net)
    assert condition_factors(pairs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(inputs).square().mean().backward()
    optimizer.step()
    assert not condition_factors(pairs, optimizers=[optimizer])
    assert optimizer.state
    pair = pairs["0"]
    pair.keep(torch.cat([torch.arange(2) + group * pair.rank for group in range(pair.groups)]))
    with torch.no_grad():  # what a re-base leaves
        pair.basis.weight.mul_(5.0)
    before = net(inputs).detach()
    assert condition_factors(pairs, optimizers=[optimizer])
    assert torch.allclose(net(inputs), before, atol=1e-10)
    assert pair.scaling.weight.requires_grad
    assert pair.basis.weight.requires_grad
    assert torch.allclose(matrix_of(pair.basis).norm(dim=2), torch.ones(1, dtype=torch.float64))
    assert not optimizer.state
    assert not condition_factors(pairs)
    assert square_factor(pair) is None


def test_a_layer_without_weights_worth_a_length(kind: str = "wide") -> None:
    _, net, inputs = decomposed(kind)
    pair = bsdp.named_pairs(net)["0"]
    with torch.no_grad():
        pair.scaling.weight[:, 0] = 0.0
    before = net(inputs)
    condition_factors({"0": pair})
    assert torch.allclose(net(inputs), before, atol=1e-10)


def test_activation_metric_keeps_the_function_and_a_square_orthogonal_layer() -> None:
    _, net, inputs = decomposed("wide")
    moments = bsdp.collect_output_moments(net, [inputs])
    rebase(bsdp.named_pairs(net), moments)
    before = net(inputs)
    condition_factors(bsdp.named_pairs(net))
    assert torch.allclose(net(inputs), before, atol=1e-9)
    columns = bsdp.named_pairs(net)["0"].scaling.weight.detach().flatten(1)
    assert torch.allclose(columns.T @ columns, torch.eye(6, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_conditioning_again_changes_nothing(kind: str) -> None:
    _, net, _ = decomposed(kind)
    pairs = bsdp.named_pairs(net)
    condition_factors(pairs)
    pair = pairs["0"]
    with torch.no_grad():
        (pair.basis.weight if pair.basis.weight.requires_grad else pair.scaling.weight).mul_(3.0)
        pair.scaling.delta.fill_(0.1)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    bsdp.freeze(net, train_weights=True)
    assert condition_factors(pairs)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("importance", ["magnitude", "sigma_energy"])
@pytest.mark.parametrize("kind", LAYERS)
def test_scores_without_data_do_not_depend_on_which_layer_holds_the_lengths(kind: str, importance: str) -> None:
    _, net, _ = decomposed(kind)
    pairs = bsdp.named_pairs(net)
    frozen = bsdp.ScoreAccumulator(pairs, importance=importance).compute()["0"]
    bsdp.freeze(net, train_weights=True)
    condition_factors(pairs)
    trained = bsdp.ScoreAccumulator(pairs, importance=importance).compute()["0"]
    assert torch.allclose(trained, frozen, atol=1e-5)
