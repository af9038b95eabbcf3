"""Second moments of outputs and the bases they give."""

from __future__ import annotations

import pytest
import torch

import bsdp
from bsdp.calibration import collect_output_moments, rebase
from tests.helpers.compare import decomposed, randomize_scales, relative_error
from tests.helpers.nets import NETS, make_input, make_net


@pytest.mark.parametrize("name", list(NETS))
def test_moments_are_those_of_the_outputs_without_bias(name: str) -> None:
    net, batches = make_net(name), [make_input(name), make_input(name, batch=2)]
    outputs: dict[str, list[torch.Tensor]] = {}
    for key, layer in net.named_modules():
        if isinstance(layer, bsdp.layers.SUPPORTED_TYPES):

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
        torch.testing.assert_close(moments[key], (columns.T @ columns / len(columns)).double(), rtol=1e-5, atol=1e-6)


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


def test_pruned_pairs_are_refused() -> None:
    model = decomposed(make_net("conv"))
    moments = collect_output_moments(model, [make_input("conv")])
    model.conv2.keep(torch.arange(3))
    with pytest.raises(ValueError, match=r"layer 'conv2' has rank 3 of 12: rebase before pruning"):
        rebase(bsdp.named_pairs(model), moments)


def test_nan_moments_are_refused() -> None:
    model = decomposed(make_net("conv"))
    moments = {name: m * float("nan") for name, m in collect_output_moments(model, [make_input("conv")]).items()}
    with pytest.raises(ValueError, match="NaN or infinity"):
        rebase(bsdp.named_pairs(model), moments)
