"""Batch norms folded into the layers before them: the same outputs, and only where that is exact."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import bsdp
from tests.helpers.channel_removal import TRACEABLE, halved, traceable_batch, traceable_net
from tests.helpers.nets import make_input, make_net

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(3, 8, 3), lambda: nn.BatchNorm2d(8), (2, 3, 7, 7)),
    "no_bias": (lambda: nn.Conv2d(3, 8, 3, bias=False), lambda: nn.BatchNorm2d(8), (2, 3, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False), lambda: nn.BatchNorm2d(4), (2, 4, 7, 7)),
    "same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), lambda: nn.BatchNorm2d(5), (2, 3, 7, 7)),
    "circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), lambda: nn.BatchNorm2d(5), (2, 3, 6, 6)
    ),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), lambda: nn.BatchNorm1d(5), (2, 3, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 3), lambda: nn.BatchNorm3d(5), (2, 2, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 8, 2), lambda: nn.BatchNorm2d(8), (2, 3, 5, 5)),
    "transposed_groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed_1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), lambda: nn.BatchNorm1d(6), (2, 4, 5)
    ),
    "transposed_3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4), (3, 5)),
    "linear_no_bias": (lambda: nn.Linear(5, 4, bias=False), lambda: nn.BatchNorm1d(4, affine=False), (3, 5)),
    "no_affine": (lambda: nn.Conv2d(3, 4, 1), lambda: nn.BatchNorm2d(4, affine=False, eps=0.1), (2, 3, 5, 5)),
    "sync": (lambda: nn.Conv2d(3, 4, 1), lambda: nn.SyncBatchNorm(4), (2, 3, 5, 5)),
}  # fmt: skip


def lively(model: nn.Module) -> nn.Module:
    """Batch norms that do something."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_without_the_batch_norm(name: str) -> None:
    layer, norm, shape = CASES[name]
    model = lively(nn.Sequential(layer(), norm(), nn.ReLU())).double()
    images = torch.randn(shape, dtype=torch.float64)
    folding = bsdp.fold_batch_norm(model, images)

    assert (folding.folded, folding.kept) == ({"1": "0"}, {})
    assert type(folding.model[1]) is nn.Identity and norms_in(model) == 1
    assert type(folding.model[0]) is type(model[0])
    torch.testing.assert_close(folding.model(images), model.eval()(images), rtol=1e-12, atol=1e-12)
    assert folding.difference.relative < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).eval()
    model[0].to(dtype)
    images = torch.randn(2, 3, 4, 4).to(dtype)
    folding = bsdp.fold_batch_norm(model, images)
    exact = bsdp.fold_batch_norm(copy.deepcopy(model).double(), images.double())

    assert folding.folded == {"1": "0"}
    weight, bias = folding.model[0].weight, folding.model[0].bias
    assert weight.dtype == bias.dtype == dtype
    assert torch.equal(weight, exact.model[0].weight.to(dtype)) and torch.equal(bias, exact.model[0].bias.to(dtype))


def test_the_pointwise_layer_of_a_pair_takes_it_up() -> None:
    model, images = make_net("conv"), make_input("conv")
    bsdp.decompose(model)
    bsdp.named_pairs(model)["conv2"].keep(torch.arange(4))
    plain = bsdp.fold(model)
    folding = bsdp.fold_batch_norm(plain, images)

    assert folding.folded == {"bn1": "conv1", "bn2": "conv2.1"}
    torch.testing.assert_close(folding.model(images), plain(images), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"call `bsdp.fold"):
        bsdp.fold_batch_norm(model, images)


def test_the_model_is_left_alone() -> None:
    model, images = make_net("conv", dtype=torch.float32).train(), make_input("conv", dtype=torch.float32)
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    folding = bsdp.fold_batch_norm(model, images)

    assert not any(module.training for module in folding.model.modules())
    assert model.training and model.bn2.training and not model.bn1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.requires_grad for parameter in folding.model.parameters())


class Blocks(nn.Module):
    """One convolution and one batch norm each for what can go wrong between them."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4, track_running_stats=case != "batch_statistics")
        if case == "same_weight":
            self.other = nn.Conv2d(4, 4, 3, padding=1)
            self.other.weight = self.conv.weight
        if case == "tokens":
            self.conv, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(4)
        if case == "subclass":
            self.bn = type("MyBatchNorm", (nn.BatchNorm2d,), {})(4)
        if case == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        case = self.case
        if case == "norm_first":
            return self.conv(self.bn(x))
        if case == "conv_twice":
            return self.conv(self.bn(self.conv(x)))
        if case == "norm_twice":
            return self.bn(self.bn(self.conv(x)))
        if case == "output_used":
            y = self.conv(x)
            return self.bn(y) + y
        if case == "in_place":
            y = self.conv(x)
            y.mul_(2.0)
            return self.bn(y)
        if case == "same_weight":
            return self.other(self.bn(self.conv(x)))
        if case == "weight_read":
            return self.bn(self.conv(x)) + self.conv.weight.mean()
        if case == "standardised":
            weight = self.conv.weight - self.conv.weight.mean(dim=(1, 2, 3), keepdim=True)
            return self.bn(F.conv2d(x, weight, self.conv.bias, padding=1))
        if case == "other_bias":
            return self.bn(F.conv2d(x, self.conv.weight, self.bn.bias, padding=1))
        if case == "relu_between":
            return self.bn(self.conv(x).relu())
        if case == "not_called":
            return self.conv(x)
        if case == "batch_mode":
            bn = self.bn
            return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)
        if case == "tokens":
            return self.bn(self.conv(x[:, :, 0]))
        return self.bn(self.conv(x))


KEPT = {
    "norm_first": "its input is not the output of a convolution or linear layer",
    "relu_between": "its input is not the output of a convolution or linear layer",
    "in_place": "",
    "conv_twice": "is used a second time",
    "weight_read": "is used a second time",
    "norm_twice": "it is not called exactly once",
    "not_called": "it is not called exactly once",
    "output_used": "the output of the layer before it is used elsewhere, too",
    "same_weight": "the weight of the layer before it is computed, shared",
    "standardised": "the weight of the layer before it is computed",
    "parametrized": "the weight of the layer before it is computed",
    "other_bias": "it is not called exactly once",
    "batch_mode": "it does not normalise by its running statistics",
    "batch_statistics": "it normalises by the statistics of each batch",
    "tokens": "its channels are not the features",
    "subclass": "it is a MyBatchNorm",
}


@pytest.mark.parametrize("case", KEPT)
def test_it_stays_where_folding_would_not_be_exact(case: str) -> None:
    model = lively(Blocks(case)).eval()
    images = torch.randn(2, 4, 6, 6)
    folding = bsdp.fold_batch_norm(model, images)

    assert list(folding.kept) == ["bn"] and KEPT[case] in folding.kept["bn"]
    assert folding.folded == {} and norms_in(folding.model) == 1
    assert torch.equal(folding.model(images), model(images))
    assert "0 batch norms folded" in str(folding) and "kept: bn: " in str(folding)


def test_the_plain_block_is_folded() -> None:
    model = lively(Blocks("plain"))
    assert bsdp.fold_batch_norm(model, torch.randn(2, 4, 6, 6)).folded == {"bn": "conv"}


class Branching(nn.Sequential):
    """Cannot be traced: the path depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Curious(nn.Sequential):
    """Reads an attribute of the batch norm in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : self[1].num_features]


def test_models_that_cannot_be_traced_or_read_their_norms_keep_them() -> None:
    images = torch.randn(2, 3, 6, 6)
    branching = bsdp.fold_batch_norm(Branching(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images)
    curious = bsdp.fold_batch_norm(Curious(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images)

    assert "the model cannot be traced" in branching.kept["1"] and norms_in(branching.model) == 1
    assert "the model needs it" in curious.kept["1"] and norms_in(curious.model) == 1
    assert curious.model(images).shape == (2, 4, 4, 4)


def test_modules_under_two_names_are_replaced_under_both() -> None:
    holder = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    twice = nn.ModuleDict({"a": holder, "b": holder})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = twice

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["b"](x)

    net = Net().eval()
    images = torch.randn(1, 3, 5, 5)
    folding = bsdp.fold_batch_norm(net, images)
    assert folding.folded == {"parts.a.1": "parts.a.0"} and norms_in(folding.model) == 0
    torch.testing.assert_close(folding.model(images), net(images))


def test_a_change_of_the_outputs_takes_the_folding_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import bsdp.batch_norm_folding as module

    real = module._folded_parameters
    monkeypatch.setattr(module, "_folded_parameters", lambda *a: tuple(nn.Parameter(1.01 * p) for p in real(*a)))
    folding = bsdp.fold_batch_norm(lively(Blocks("plain")), torch.randn(2, 4, 6, 6))
    assert "folding it changes the outputs by" in folding.kept["bn"] and norms_in(folding.model) == 1


def test_activation_of_timm_stays() -> None:
    pytest.importorskip("timm")
    from timm.layers import BatchNormAct2d

    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU))).eval()
    images = torch.randn(2, 3, 6, 6)
    folding = bsdp.fold_batch_norm(model, images)
    assert folding.folded == {"1": "0"} and norms_in(folding.model) == 0
    torch.testing.assert_close(folding.model(images), model(images))
    assert any(isinstance(module, nn.SiLU) for module in folding.model.modules())


def test_nothing_to_fold() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    folding = bsdp.fold_batch_norm(model, torch.randn(1, 3))
    assert str(folding).startswith("0 batch norms folded") and folding.model is not model


@pytest.mark.parametrize("name", TRACEABLE)
def test_networks_that_lost_channels_are_still_compared_with_the_original(name: str) -> None:
    example = traceable_batch(name, batch=1)
    original = traceable_net(name).eval()
    expected = bsdp.describe(bsdp.fold_batch_norm(original, example).model, example)
    pruned = bsdp.fold_batch_norm(halved(original, example), example).model
    stats = bsdp.describe(pruned, example)
    assert (stats.params_original, stats.macs_original) == (expected.params, expected.macs)
    assert stats.params == sum(p.numel() for p in pruned.parameters()) < expected.params
