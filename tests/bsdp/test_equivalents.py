"""Plain layers for layers with code of their own: which have one, and that it is the same function."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import bsdp
from bsdp.equivalents import idle_parameter, is_plain, plain_equivalent
from tests.helpers.compare import relative_error


class StandardisedConv(nn.Conv2d):
    """Weight standardisation with a gain, as in normaliser-free networks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, images: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        weight = self.gain * (self.weight - mean) / spread
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardised1d(nn.Conv1d):
    def forward(self, signal: Tensor) -> Tensor:
        return self._conv_forward(signal, self.weight - self.weight.mean(), self.bias)


class DoubledLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, 2 * self.weight, self.bias)


class NamedConv(nn.Conv2d):
    """A new name and nothing else."""


class SamePadConv(nn.Conv2d):
    """Padding as in TensorFlow: how much depends on the size of the input."""

    def forward(self, images: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(images.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(images, pads), self.weight, self.bias, self.stride)


class SquashedConv(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.tanh())


class ClampedConv(nn.Conv2d):
    """Plain for small inputs only."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.clamp(-6, 6))


class NoisyLinear(nn.Linear):
    """Plain in eval mode only."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(F.dropout(inputs, 0.5, self.training))


class WithAdapter(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.adapter = nn.Linear(*sizes)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + self.adapter(inputs)


class LoRALinear(nn.Linear):
    """Low-rank adapter as parameters of the layer itself; `second` starts as zeros."""

    def __init__(self, *sizes: int, active: bool = True) -> None:
        super().__init__(*sizes)
        self.active = active
        self.first = nn.Parameter(torch.randn(2, sizes[0]))
        self.second = nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        return outputs + inputs @ self.first.T @ self.second.T if self.active else outputs


class LowRankPart(nn.Module):
    """The same as a parametrization."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.second @ self.first


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


HAVE_ONE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "standardised": (lambda: StandardisedConv(6, 8, 3, padding=1), (6, 9, 8)),
    "standardised_strided": (lambda: StandardisedConv(6, 8, 3, stride=2, padding=1, bias=False), (6, 9, 8)),
    "standardised_groups": (lambda: StandardisedConv(6, 8, (3, 2), groups=2, dilation=2), (6, 9, 8)),
    "standardised_patches": (lambda: StandardisedConv(3, 70, 4, stride=4), (3, 12, 12)),
    "standardised_pointwise": (lambda: StandardisedConv(6, 8, 1), (6, 4, 4)),
    "one_dimension": (lambda: Standardised1d(4, 7, 5, padding=2), (4, 15)),
    "linear": (lambda: DoubledLinear(5, 9), (5,)),
    "name_only": (lambda: NamedConv(5, 6, 3, padding="same"), (5, 7, 7)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(5, 6, 3)), (5, 7, 7)),
    "parametrized": (lambda: parametrized(nn.Linear(5, 6)), (5,)),
    "parametrized_transposed": (lambda: parametrized(nn.ConvTranspose2d(5, 6, 3)), (5, 4, 4)),
    "same_pad_stride_1": (lambda: SamePadConv(5, 6, 3, padding=1), (5, 7, 8)),
}
HAVE_NONE: dict[str, Callable[[], nn.Module]] = {
    "input_dependent_padding": lambda: SamePadConv(5, 6, 3, stride=2),
    "squashed": lambda: SquashedConv(5, 6, 3),
    "clamped": lambda: ClampedConv(5, 6, 3),
    "noisy": lambda: NoisyLinear(8, 8),
    "adapter": lambda: WithAdapter(8, 8),
    "no_convolution": lambda: nn.BatchNorm2d(4),
    "fake_quantised": lambda: torch.ao.nn.qat.Conv2d(4, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", HAVE_ONE)
def test_a_layer_that_computes_what_a_plain_one_does_has_an_equivalent(name: str, dtype: torch.dtype) -> None:
    build, shape = HAVE_ONE[name]
    layer = build().to(dtype)
    inputs = torch.randn(2, *shape, dtype=dtype)
    before, state = layer(inputs).detach(), torch.get_rng_state()
    assert not is_plain(layer)
    plain = plain_equivalent(layer)
    assert plain is not None
    assert is_plain(plain)
    assert plain.weight.dtype == dtype
    assert plain.training
    assert relative_error(plain(inputs), before) < (1e-6 if dtype == torch.float32 else 1e-13)
    assert torch.equal(layer(inputs), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", HAVE_NONE)
def test_a_layer_that_does_more_has_none(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        layer = HAVE_NONE[name]()
    assert plain_equivalent(layer) is None


@pytest.mark.parametrize("name", HAVE_ONE)
def test_a_model_with_such_a_layer_is_decomposed_pruned_folded_and_saved(name: str, tmp_path: Any) -> None:
    build, shape = HAVE_ONE[name]
    model = nn.Sequential(build(), nn.ReLU()).double()
    inputs = torch.randn(2, *shape, dtype=torch.float64)
    expected = model(inputs)
    done = bsdp.decompose(model, include=["0"])
    assert list(done.replaced) == ["0"]
    assert relative_error(model(inputs), expected) < 1e-12
    pair = bsdp.named_pairs(model)["0"]
    pair.keep(torch.cat([torch.arange(max(1, pair.rank - 2)) + g * pair.rank for g in range(pair.groups)]))
    folded = bsdp.fold(model)
    assert relative_error(folded(inputs), model(inputs)) < 1e-12
    fresh = nn.Sequential(build(), nn.ReLU()).double()
    loaded = bsdp.load(fresh, bsdp.save(model, tmp_path / "model.safetensors"))
    assert relative_error(loaded(inputs), model(inputs)) < 1e-12
    rebuilt = nn.Sequential(build(), nn.ReLU()).double()
    bsdp.rebuild(rebuilt, bsdp.structure_of(model))
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(inputs), model(inputs))


def trained(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def adapted(size: int) -> nn.Module:
    layer = nn.Linear(size, size)
    parametrize.register_parametrization(layer, "weight", LowRankPart(size, size))
    return layer


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: LoRALinear(8, 8), "second"),
        (lambda: trained(LoRALinear(8, 8, active=False)), "first"),
        (lambda: adapted(8), "parametrizations.weight.0.second"),
    ],
    ids=["fresh", "switched_off", "parametrization"],
)
def test_an_adapter_that_does_nothing_yet_is_not_lost(build: Callable[[], nn.Module], name: str) -> None:
    model = nn.Sequential(build(), nn.Linear(8, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert idle_parameter(model[0]) == name
    reason = f"its parameter {name!r} does nothing yet, like a fresh adapter, and would be lost"
    assert bsdp.decompose(model).skipped["0"] == reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("build", [lambda: LoRALinear(8, 8), lambda: adapted(8)], ids=["direct", "parametrization"])
def test_an_adapter_that_was_trained_is_part_of_the_weight(build: Callable[[], nn.Module]) -> None:
    model, inputs = nn.Sequential(trained(build()), nn.Linear(8, 2)).double(), torch.randn(3, 8).double()
    expected = model(inputs)
    assert list(bsdp.decompose(model).replaced) == ["0"]
    assert relative_error(model(inputs), expected) < 1e-12


@pytest.mark.parametrize("name", HAVE_ONE)
def test_gains_and_norms_of_weights_do_something(name: str) -> None:
    layer = HAVE_ONE[name][0]()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert idle_parameter(layer) is None
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_weights_of_zero_are_no_adapter() -> None:
    layer = parametrized(nn.Linear(8, 8))
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    assert idle_parameter(layer) is None


def test_the_gain_of_a_library_does_something() -> None:
    layers = pytest.importorskip("timm.layers")
    for layer in (layers.ScaledStdConv2d(8, 8, 3), layers.ScaledStdConv2dSame(8, 8, 3), layers.StdConv2d(8, 8, 3)):
        assert idle_parameter(layer) is None
        assert plain_equivalent(layer) is not None


def test_shared_parametrizations_are_left_alone() -> None:
    model = nn.Sequential(parametrized(nn.Linear(6, 6)), parametrized(nn.Linear(6, 6)), nn.Linear(6, 2))
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    assert set(bsdp.decompose(model).skipped.values()) >= {"it shares a parameter with another module"}
    assert not bsdp.named_pairs(model)


def test_a_forward_that_was_put_on_the_instance_is_not_lost() -> None:
    model, inputs = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU()).double(), torch.randn(2, 6, 5, 5).double()
    layer = model[0]
    plain = layer.forward
    layer.forward = lambda images: 2 * plain(images)  # type: ignore[method-assign]
    expected = model(inputs)
    bsdp.decompose(model, include=["0"])
    assert relative_error(model(inputs), expected) < 1e-12
