"""Fixed batch norms as one multiplication and addition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bsdp
from tests.helpers.nets import make_input, make_net


def held_for_backward(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What a forward pass keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(inputs).sum()
    return kept


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.BatchNorm2d(6), nn.BatchNorm3d(6)])
def test_outputs_and_gradients_are_the_same(norm: nn.Module) -> None:
    norm = norm.double().eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)  # type: ignore[arg-type]
    dims = {"1": 1, "2": 2, "3": 3}[type(norm).__name__[-2]]
    results = []
    images = torch.randn(4, 6, *[5] * dims, dtype=torch.float64)
    for lean in (False, True):
        inputs = images.clone().requires_grad_()
        with bsdp.lean_batch_norms([norm] if lean else []):
            outputs = norm(inputs)
        outputs.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append((outputs, inputs.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_the_input_is_not_kept() -> None:
    norm, images = nn.BatchNorm2d(6).eval().requires_grad_(False), torch.randn(4, 6, 5, 5, requires_grad=True)
    assert any(tensor.shape == images.shape for tensor in held_for_backward(norm, images))
    with bsdp.lean_batch_norms([norm]):
        assert all(tensor.numel() == 6 for tensor in held_for_backward(norm, images))


def test_what_is_not_fixed_runs_as_ever() -> None:
    images = torch.randn(4, 6, 5, 5)
    norms = {
        "training": nn.BatchNorm2d(6),
        "learning": nn.BatchNorm2d(6).eval(),
        "bare": nn.BatchNorm2d(6, affine=False).eval(),
        "without statistics": nn.BatchNorm2d(6, track_running_stats=False).eval().requires_grad_(False),
    }
    plain = copy.deepcopy(norms)
    with bsdp.lean_batch_norms(norms.values()):
        for name, norm in norms.items():
            assert torch.equal(norm(images), plain[name](images)), name
    assert torch.equal(norms["training"].running_mean, plain["training"].running_mean)  # type: ignore[arg-type]
    double = nn.BatchNorm2d(6).eval().requires_grad_(False).to(torch.bfloat16)
    with bsdp.lean_batch_norms([double]), pytest.raises(RuntimeError):
        double(images.double())  # as without


def test_classes_come_back_and_copies_made_inside_are_whole() -> None:
    model, images = make_net("conv", dtype=torch.float32), make_input("conv", dtype=torch.float32)
    model.requires_grad_(False)
    expected = model(images)
    with pytest.raises(KeyError), bsdp.lean_batch_norms(bsdp.fixed_batch_norms(model)):
        with bsdp.lean_batch_norms(bsdp.fixed_batch_norms(model)):
            copied = copy.deepcopy(model)
        assert type(model.bn1) is not nn.BatchNorm2d and isinstance(model.bn1, nn.BatchNorm2d)
        copied.bn1.running_mean += 1.0  # type: ignore[operator]
        torch.testing.assert_close(model(images), expected)
        assert not torch.allclose(copied(images), expected)
        raise KeyError
    assert type(model.bn1) is nn.BatchNorm2d and torch.equal(model(images), expected)
