"""Moments of outputs and gradients, their spread, and what few examples do to bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bsdp
import bsdp.moments
from bsdp.calibration import OutputMoments, collect_output_moments, rebase
from bsdp.gradient_moments import collect_gradient_moments, drawn_labels
from bsdp.moments import LayerMoment, squared_norms
from bsdp.plain_layers import matrix_of
from bsdp.shrinkage import best_share, metric_moments
from tests.helpers.compare import decomposed, half_ranks, keep_ranks, relative_error, snapshot
from tests.helpers.nets import NETS, make_input, make_net


@pytest.mark.parametrize("positions", [3, 20])
@pytest.mark.parametrize("largest", [1, 2**24])
def test_squared_norms_of_examples(positions: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bsdp.moments, "_LARGEST", largest)
    columns = torch.randn(5, positions, 12, dtype=torch.float64)
    for groups in (1, 3):
        expected = torch.empty(5, groups, dtype=torch.float64)
        for example in range(5):
            for group, part in enumerate(columns[example].chunk(groups, dim=1)):
                expected[example, group] = (part.T @ part / positions).square().sum()
        assert relative_error(squared_norms(columns, groups), expected) < 1e-12


def test_spread_is_the_squared_error_to_expect() -> None:
    layer = nn.Conv2d(3, 6, 1, groups=3, bias=False).double()
    power = torch.rand(4000, 1, 1, 1, dtype=torch.float64) * 2  # examples differ; positions of one are alike
    images = power * torch.randn(4000, 3, 1, 1, dtype=torch.float64).expand(-1, -1, 2, 2)
    truth = collect_output_moments(layer, [images])[""].second
    errors, spreads = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for part in images.split(20):
        moment = collect_output_moments(layer, [part[:8], part[8:]])[""]
        blocks = (moment.second - truth).view(3, 2, 3, 2).diagonal(dim1=0, dim2=2)
        errors += blocks.square().sum((0, 1))
        spreads += moment.spread
    assert relative_error(spreads, errors) < 0.2


def test_processes_together_have_the_moments_of_one() -> None:
    net, inputs = make_net("grouped"), make_input("grouped", batch=12)
    whole = collect_output_moments(net, [inputs])
    layers = {"grouped": net.grouped, "stem": net.stem}
    shares = [OutputMoments(layers) for _ in range(3)]
    for share, part in zip(shares[:2], (inputs[:4], inputs[4:]), strict=True):  # the third sees nothing
        with share.collecting(net):
            net(part)
    calls: list[list[Tensor]] = [[], [], []]
    for share, seen in zip(shares, calls, strict=True):
        share.reduce(lambda value, seen=seen: seen.append(value) or value)  # type: ignore[misc]
    means = [torch.stack(values).mean(0) for values in zip(*calls, strict=True)]
    values = iter(means)
    shares[2].reduce(lambda _value: next(values))
    found = shares[2].compute()
    assert found.keys() == layers.keys()
    for name, moment in found.items():
        assert relative_error(moment.second, whole[name].second) < 1e-6
        assert relative_error(moment.mean, whole[name].mean) < 1e-6
        assert moment.count == round(whole[name].count / 3)


def test_best_share_minimises_the_expected_error() -> None:
    # One number instead of a matrix: estimate 3 with variance 2 and target 1, distance 4.
    share = best_share(torch.full((2, 1, 1), 3.0), torch.ones(2, 1, 1), torch.tensor([2.0, 9.0]))
    assert share.tolist() == [0.5, 1.0]
    assert best_share(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1)).tolist() == [0.0]


def truncation_error(net: nn.Module, moment: LayerMoment, inputs: Tensor, rank: int, shrinkage: float | None) -> float:
    pair = bsdp.pair_from_layer(net.conv2, metric="activation", moment=moment, shrinkage=shrinkage)
    pair.keep(torch.arange(rank))
    return float((pair(inputs) - net.conv2(inputs)).detach().square().sum())


def test_shrinkage_from_the_data_helps_with_few_examples_and_fades_with_many() -> None:
    net = make_net("conv")
    colours = torch.logspace(0, -1, 8, dtype=torch.float64)[:, None, None]
    unseen = torch.randn(200, 8, 6, 6, dtype=torch.float64) * colours
    errors: dict[float | None, float] = {None: 0.0, 0.0: 0.0}
    for _ in range(8):
        one = torch.randn(2, 8, 3, 3, dtype=torch.float64) * colours  # two examples of four positions
        moment = collect_output_moments(net.conv2, [one])[""]
        for shrinkage in errors:
            errors[shrinkage] += truncation_error(net, moment, unseen, 6, shrinkage)
    assert errors[None] < 0.98 * errors[0.0]
    many = collect_output_moments(net.conv2, [unseen])[""]
    matrix = matrix_of(net.conv2).detach()
    ready = metric_moments(matrix, "activation", many, None).moment
    assert ready is not None
    assert relative_error(ready[0], many.second) < 0.02


def test_full_shrinkage_is_the_plain_svd() -> None:
    layer = make_net("conv").conv2
    moment = collect_output_moments(layer, [make_input("conv", batch=1).repeat(1, 3, 1, 1)[:, :8]])[""]
    data = bsdp.pair_from_layer(layer, metric="activation", moment=moment, shrinkage=1.0)
    plain = bsdp.pair_from_layer(layer)
    for pair in (data, plain):
        pair.keep(torch.arange(5))
    assert relative_error(data.product, plain.product) < 1e-9


def test_few_samples_give_one_warning_that_names_the_layers() -> None:
    model, inputs = decomposed(make_net("tokens")), torch.randn(1, 5, 10, dtype=torch.float64)
    expected = model(inputs)
    moments = collect_output_moments(model, [inputs])  # 5 columns, rank 10
    with pytest.warns(UserWarning, match=r"than there are bases in 2 layers \('up', 'down'\)") as caught:
        rebase(bsdp.named_pairs(model), moments)
    assert len(caught) == 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert relative_error(model(inputs), expected) < 1e-9
    net = make_net("tokens")
    with pytest.warns(UserWarning, match=r"in 2 layers \('up', 'down'\)"):
        bsdp.decompose(net, metric="activation", statistics=moments)


def test_a_single_example_of_one_position_gives_sound_bases() -> None:
    layer = nn.Linear(6, 4).double()
    moment = collect_output_moments(layer, [torch.randn(1, 6, dtype=torch.float64)])[""]
    pair = bsdp.pair_from_layer(layer, metric="activation", moment=moment)
    assert pair.scaling.sigma.isfinite().all()
    assert relative_error(pair.product[0], layer.weight) < 1e-10


def test_no_calibration_data_is_refused() -> None:
    model = decomposed(make_net("conv"))
    with pytest.raises(ValueError, match="`batches` is empty: output moments need"):
        collect_output_moments(model, [])
    with pytest.raises(ValueError, match="`batches` is empty: gradient moments need"):
        collect_gradient_moments(model, [])
    with pytest.raises(ValueError, match="`shrinkage` must be between 0 and 1"):
        rebase(bsdp.named_pairs(model), {}, shrinkage=1.5)
    with pytest.raises(ValueError, match=r"`metric=.kfac.` needs `gradients`: see `bsdp\.collect_gradient_moments`"):
        rebase(bsdp.named_pairs(model), {}, metric="kfac")
    with pytest.raises(ValueError, match="`metric='kfac'` needs `gradients`"):
        bsdp.decompose(make_net("conv"), metric="kfac", statistics={})
    with pytest.raises(ValueError, match="`gradients` lacks layer 'conv1'"):
        moments = collect_output_moments(make_net("conv"), [make_input("conv")])
        bsdp.decompose(make_net("conv"), metric="kfac", statistics=moments, gradients={})


@pytest.mark.parametrize("name", ["conv", "grouped", "tokens"])
def test_centred_truncation_is_better_when_the_mean_moves_to_the_bias(name: str) -> None:
    net = make_net(name)
    key, size = {"conv": ("conv2", 8), "grouped": ("grouped", 8), "tokens": ("down", 16)}[name]
    layer = net.get_submodule(key)
    shape = (40, 7, size) if name == "tokens" else (40, size, 6, 6)
    inputs = torch.randn(shape, dtype=torch.float64) + 2.0  # far from centred
    moment = collect_output_moments(layer, [inputs])[""]
    gains = []
    for rank in range(1, bsdp.layer_cost(layer).full_rank):
        errors = []
        for centred in (True, False):
            pair = bsdp.pair_from_layer(layer, metric="activation", moment=moment, centred=centred, shrinkage=0.0)
            mean = pair.basis(inputs).movedim(-1 if name == "tokens" else 1, 0).flatten(1).mean(1)
            keep = torch.cat([torch.arange(rank) + g * pair.rank for g in range(pair.groups)])
            with torch.no_grad():
                pair.scaling.bias.add_(bsdp.pruning.mean_contribution(pair, mean, keep))
            pair.keep(keep)
            errors.append(float((pair(inputs) - layer(inputs)).detach().square().sum()))
        assert errors[0] <= errors[1] * (1 + 1e-3)
        gains.append(errors[1] / errors[0])
    assert max(gains) > 1.02


def test_centring_needs_a_mean() -> None:
    model = decomposed(make_net("conv"))
    moments = {name: m.second for name, m in collect_output_moments(model, [make_input("conv")]).items()}
    with pytest.raises(ValueError, match="layer 'conv1': `centred` needs moments with a mean"):
        rebase(bsdp.named_pairs(model), moments, centred=True)


def explicit_gradients(net: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Second moments of output gradients, layer by layer, from a shift that is added to the output."""
    moments = {}
    for key, layer in net.named_modules():
        if not isinstance(layer, bsdp.plain_layers.SUPPORTED_TYPES):
            continue
        shifts: list[Tensor] = []

        def shift(_module: Any, _inputs: Any, output: Tensor, shifts: list[Tensor] = shifts) -> Tensor:
            shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + shifts[-1]

        handle = layer.register_forward_hook(shift)
        F.cross_entropy(net(inputs), labels, reduction="sum").backward()
        handle.remove()
        axis = -1 if isinstance(layer, nn.Linear) else 1
        columns = torch.cat([s.grad.movedim(axis, -1).flatten(0, -2) for s in shifts])  # type: ignore[union-attr]
        moments[key] = columns.T @ columns / len(columns)
    return moments


@pytest.mark.parametrize("name", list(NETS))
def test_gradient_moments_are_those_of_the_loss_at_the_outputs(name: str) -> None:
    net, inputs = make_net(name), make_input(name, batch=6)
    labels = torch.arange(6) % 3
    expected = explicit_gradients(net, inputs, labels)
    net.zero_grad()
    net.requires_grad_(False)  # frozen networks have gradients at their outputs, too
    before = snapshot(net)
    moments = collect_gradient_moments(net.train(), [(inputs[:2], labels[:2]), [inputs[2:], labels[2:]]])
    assert moments.keys() == expected.keys()
    for key, moment in moments.items():
        assert relative_error(moment.second, expected[key]) < 1e-6
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_layers_that_work_in_place_do_not_disturb_gradients() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    batch = (torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3)
    expected = collect_gradient_moments(net, [batch])
    net[1].inplace = True
    actual = collect_gradient_moments(net, [batch])
    for name, moment in expected.items():
        assert torch.equal(actual[name].second, moment.second)


def test_labels_are_drawn_from_what_the_model_predicts() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [3.0, 0.0, 0.0]]).repeat(20000, 1)
    drawn = drawn_labels(logits, torch.Generator().manual_seed(0)).view(-1, 2)
    for row in range(2):
        shares = torch.bincount(drawn[:, row], minlength=3) / len(drawn)
        assert (shares - logits[row].softmax(0)).abs().max() < 0.01
    maps = torch.full((2, 3, 4, 5), -1e3)
    maps[:, 1, :2], maps[:, 2, 2:] = 0.0, 0.0
    expected = torch.tensor([1, 1, 2, 2]).view(1, 4, 1).expand(2, 4, 5)
    assert torch.equal(drawn_labels(maps, torch.Generator()), expected)


def test_without_labels_gradients_are_those_of_drawn_ones_and_repeatable() -> None:
    net, inputs = make_net("conv"), make_input("conv", batch=8)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = collect_gradient_moments(net, [inputs])
    assert torch.equal(torch.get_rng_state(), state)
    again = collect_gradient_moments(net, [(inputs, None)])
    other = collect_gradient_moments(net, [(inputs,)], generator=torch.Generator().manual_seed(5))
    labels = drawn_labels(net(inputs), torch.Generator().manual_seed(0))
    given = collect_gradient_moments(net, [(inputs, labels)])
    assert torch.equal(first["conv1"].second, again["conv1"].second)
    assert torch.equal(first["conv1"].second, given["conv1"].second)
    assert not torch.equal(first["conv1"].second, other["conv1"].second)


def test_a_loss_of_ones_own() -> None:
    net, inputs = make_net("tokens"), make_input("tokens")
    targets = torch.randn(4, 3, dtype=torch.float64)
    moment = collect_gradient_moments(net, [(inputs, targets)], loss=lambda o, t: (o - t).square().sum())["head"]
    gradients = 2 * (net(inputs) - targets).detach()
    assert relative_error(moment.second, gradients.T @ gradients / 4) < 1e-6


@pytest.mark.parametrize(
    ("batch", "loss", "message"),
    [
        (torch.zeros(2, 3, 8, 8), lambda o, t: o.sum(), "`loss` needs labels: make `batches` pairs"),
        ((torch.zeros(2, 3, 8, 8), None), lambda o, t: o.sum(), "`loss` needs labels"),
        ((1, 2, 3), None, r"`batches` must hold pairs of inputs and labels, or tensors; one is a tuple of 3"),
        ({"x": 1}, None, "one is a dict"),
    ],
)
def test_batches_of_another_form_are_refused(batch: Any, loss: Callable[..., Tensor] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_gradient_moments(make_net("conv", dtype=torch.float32), [batch], loss=loss)


def test_outputs_that_are_no_logits_are_refused() -> None:
    message = r"needs logits \[batch, classes, ...\] of two classes or more, the model gave a tensor of shape"
    for net in (nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), nn.Linear(4, 1)):
        with pytest.raises(ValueError, match=message):
            collect_gradient_moments(net, [torch.randn(2, 4)])


@pytest.mark.parametrize("name", list(NETS))
def test_kfac_rebase_keeps_the_function_at_any_rank(name: str) -> None:
    model, inputs = decomposed(make_net(name)), make_input(name, batch=16)
    keep_ranks(model, half_ranks(model))
    expected = model(inputs)
    moments, gradients = collect_output_moments(model, [inputs]), collect_gradient_moments(model, [inputs])
    before = {n: p.basis.weight.clone() for n, p in bsdp.named_pairs(model).items()}
    rebase(bsdp.named_pairs(model), moments, metric="kfac", gradients=gradients)
    assert relative_error(model(inputs), expected) < 1e-9
    assert all(not torch.equal(p.basis.weight, before[n]) for n, p in bsdp.named_pairs(model).items())


def test_kfac_decomposition_is_that_of_a_rebase() -> None:
    net, inputs = make_net("conv"), make_input("conv", batch=16)
    moments, gradients = collect_output_moments(net, [inputs]), collect_gradient_moments(net, [inputs])
    model, other = decomposed(net), decomposed(net, metric="kfac", statistics=moments, gradients=gradients)
    rebase(bsdp.named_pairs(model), moments, metric="kfac", gradients=gradients)
    for name, pair in bsdp.named_pairs(model).items():
        assert relative_error(pair.scaling.sigma, other.get_submodule(name).scaling.sigma) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["activation", "kfac"])
def test_half_precision_models_are_rebased(dtype: torch.dtype, metric: str) -> None:
    model = decomposed(make_net("conv", dtype=torch.float32)).to(dtype)
    inputs = make_input("conv", batch=16, dtype=torch.float32)
    expected = model.float()(inputs)
    model.to(dtype)
    moments = collect_output_moments(model, [inputs.to(dtype)])
    gradients = collect_gradient_moments(model, [inputs.to(dtype)]) if metric == "kfac" else None
    assert moments["conv1"].second.dtype == torch.float64
    rebase(bsdp.named_pairs(model), moments, metric=metric, gradients=gradients)
    assert model.conv1.basis.weight.dtype == dtype
    assert relative_error(model.float()(inputs), expected) < (3e-2 if dtype == torch.bfloat16 else 4e-3)
