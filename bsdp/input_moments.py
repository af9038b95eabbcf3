"""Mean and second moment of what convolution and linear layers read, patch by patch.

Layout: a patch is what one output position reads, unfolded to ``[m]`` with ``m = in_channels * kernel positions``,
channel by channel, as the rows of ``weight.flatten(1)``. Inputs of a linear layer are patches as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsdp._checks import check_whole
from bsdp.input_watching import watch_inputs
from bsdp.plain_layers import spatial_dims, weight_of
from bsdp.probing import probe

_CHUNK = 1 << 24  # numbers of unfolded patches in memory at a time


@dataclass(frozen=True)
class Moments:
    """First and second moment of patches.

    Attributes:
        mean: ``[m]`` in float64.
        second: ``E[x x^T]``, ``[m, m]`` in float64.
        count: Patches seen.
    """

    mean: Tensor
    second: Tensor
    count: int

    @property
    def covariance(self) -> Tensor:
        """``E[x x^T] - E[x] E[x]^T``."""
        return self.second - torch.outer(self.mean, self.mean)


class InputMoments:
    """Running moments of the patches that layers read; sums are kept in float64.

    Memory does not grow with the data: ``m * m`` numbers per layer, and a chunk of patches at a time.

    Args:
        layers: Ungrouped convolutions that are not transposed, and linear layers, by name.
        max_positions: Output positions per example that count, on an even grid; None for all of them.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, max_positions: int | None = None) -> None:
        if max_positions is not None:
            check_whole("max_positions", max_positions, 1)
        self.layers = dict(layers)
        self.max_positions = max_positions
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    @torch.no_grad()
    def update(self, name: str, inputs: Tensor) -> None:
        """Add what a layer reads in one forward pass; examples with NaN or infinity count for nothing."""
        layer = self.layers[name]
        inputs = _batched(layer, inputs.detach())
        inputs = inputs[inputs.flatten(1).isfinite().all(1)]
        if not len(inputs):
            return
        width = weight_of(layer)[0].numel()
        zeros = inputs.new_zeros(width, dtype=torch.float64)
        total, second, count = self._sums.get(name, (zeros, torch.outer(zeros, zeros), 0))
        step = max(1, _CHUNK // max(1, patches(layer, inputs[:1], max_positions=self.max_positions).numel()))
        for chunk in torch.split(inputs, step):
            rows = patches(layer, chunk, max_positions=self.max_positions).double()
            total, count = total + rows.sum(0), count + len(rows)
            second = torch.addmm(second, rows.mT, rows)
        self._sums[name] = (total, second, count)

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Record the forward passes made inside the ``with`` block; the model is in eval mode without gradients."""
        handles = [watch_inputs(layer, self._sink(name)) for name, layer in self.layers.items()]
        try:
            with probe(model, (), lambda *_: None):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _sink(self, name: str) -> Callable[[Tensor], None]:
        return lambda inputs: self.update(name, inputs)

    def compute(self) -> dict[str, Moments]:
        """Moments per layer; layers that read nothing are left out."""
        return {n: Moments(s / c, second / c, c) for n, (s, second, c) in self._sums.items() if c > 0}


def patches(layer: nn.Module, inputs: Tensor, *, max_positions: int | None = None) -> Tensor:
    """What every output position of a layer reads, ``[examples * positions, m]``.

    Args:
        layer: An ungrouped convolution or a linear layer.
        inputs: ``[examples, channels, ...]`` of a convolution, ``[examples, ..., features]`` of a linear layer.
        max_positions: Positions per example at most, see `InputMoments`.
    """
    dims = spatial_dims(layer)
    if dims == 0:
        rows = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        return rows[:, _grid(rows.shape[1], max_positions)].flatten(0, 1)
    windows = _windows(layer, inputs)  # [examples, channels, *positions, *kernel]
    share = 1.0 if max_positions is None else min(1.0, max_positions / math.prod(windows.shape[2 : 2 + dims]))
    for axis in range(2, 2 + dims):
        size = windows.shape[axis]
        at_most = None if share == 1.0 else max(1, math.floor(size * share ** (1 / dims)))
        windows = windows[(slice(None),) * axis + (_grid(size, at_most),)]
    windows = windows.movedim(1, 1 + dims)
    return windows.reshape(-1, math.prod(windows.shape[1 + dims :]))


def _batched(layer: nn.Module, inputs: Tensor) -> Tensor:
    dims = spatial_dims(layer)
    missing = inputs.dim() == (dims + 1 if dims else 1)
    return inputs.unsqueeze(0) if missing else inputs


def _grid(size: int, at_most: int | None) -> slice:
    """Evenly spaced positions, with the same distance to both borders."""
    step = 1 if at_most is None else math.ceil(size / at_most)
    return slice((size - 1) % step // 2, None, step)


def _windows(layer: Any, inputs: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, _padding(layer), mode=mode)
    for i, (kernel, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        windows = windows.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return windows


def _padding(layer: Any) -> list[int]:
    """In the order of `F.pad`: last axis first, before and after."""
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same":
        sides = [(span // 2, span - span // 2) for span in spans]
    else:
        widths = (0,) * len(spans) if layer.padding == "valid" else layer.padding
        sides = [(width, width) for width in widths]
    return [width for side in reversed(sides) for width in side]
