"""Comparisons, and changes to a model that many tests need."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import bsdp


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The model's state dict is bit for bit the given one."""
    now = model.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(now[key], value), key


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is laid out channels last, and not contiguous as well."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def decomposed(model: nn.Module, **options: object) -> nn.Module:
    """A decomposed copy."""
    model = copy.deepcopy(model)
    bsdp.decompose(model, **options)  # type: ignore[arg-type]
    return model


def randomize_scales(model: nn.Module, low: float = 0.5, high: float = 1.5) -> None:
    """Give all scaling factors random values."""
    for pair in bsdp.named_pairs(model).values():
        nn.init.uniform_(pair.scaling.delta, low - 1.0, high - 1.0)


def keep_ranks(model: nn.Module, ranks: Mapping[str, int], *, seed: int = 0) -> dict[str, Tensor]:
    """Cut pairs to the given ranks, keeping random bases; returns what was kept."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, pair in bsdp.named_pairs(model).items():
        rows = [torch.randperm(pair.rank, generator=generator)[: ranks[name]].sort().values for _ in range(pair.groups)]
        kept[name] = torch.cat([row + g * pair.rank for g, row in enumerate(rows)])
        pair.keep(kept[name])
    return kept


def half_ranks(model: nn.Module) -> dict[str, int]:
    """Half the rank of every pair, at least 1."""
    return {name: max(1, pair.rank // 2) for name, pair in bsdp.named_pairs(model).items()}


def count_parameters(model: nn.Module) -> int:
    """All parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
