"""A table of layer geometries that a pair must reproduce."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn


@dataclass(frozen=True)
class LayerCase:
    """One layer and the shape of an input for it."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name


def _case(
    name: str, kind: Callable[..., nn.Module], *sizes: int, shape: tuple[int, ...], **options: object
) -> LayerCase:
    return LayerCase(name, partial(kind, *sizes, **options), shape)


# The first four are those of oracle 1 in the design: (c, o, k, stride, padding, dilation).
LAYER_CASES = [
    _case("first_conv", nn.Conv2d, 3, 64, 3, padding=1, shape=(2, 3, 9, 9)),
    _case("strided", nn.Conv2d, 16, 8, 3, stride=2, padding=1, shape=(2, 16, 9, 8)),
    _case("pointwise", nn.Conv2d, 8, 32, 1, shape=(2, 8, 6, 5)),
    _case("dilated", nn.Conv2d, 6, 10, 5, stride=2, padding=2, dilation=2, shape=(2, 6, 13, 12)),
    _case("rectangle", nn.Conv2d, 4, 6, (3, 5), stride=(2, 1), padding=(0, 2), shape=(2, 4, 9, 7)),
    _case("no_bias", nn.Conv2d, 8, 12, 3, bias=False, shape=(2, 8, 7, 7)),
    _case("same", nn.Conv2d, 5, 8, 4, padding="same", shape=(2, 5, 8, 7)),
    _case("same_dilated", nn.Conv2d, 5, 8, 3, padding="same", dilation=2, shape=(2, 5, 8, 7)),
    _case("valid", nn.Conv2d, 5, 8, 3, padding="valid", shape=(2, 5, 8, 7)),
    _case("reflect", nn.Conv2d, 5, 8, 3, padding=2, padding_mode="reflect", shape=(2, 5, 8, 7)),
    _case("replicate", nn.Conv2d, 5, 8, 3, padding=1, padding_mode="replicate", shape=(2, 5, 8, 7)),
    _case("circular", nn.Conv2d, 5, 8, 3, padding=1, stride=2, padding_mode="circular", shape=(2, 5, 8, 7)),
    _case("same_circular", nn.Conv2d, 5, 8, 3, padding="same", padding_mode="circular", shape=(2, 5, 8, 7)),
    _case("groups", nn.Conv2d, 8, 12, 3, padding=1, groups=2, shape=(2, 8, 7, 6)),
    _case("groups_wide", nn.Conv2d, 6, 36, 1, groups=3, shape=(2, 6, 5, 5)),
    _case("groups_no_bias", nn.Conv2d, 12, 8, 3, groups=4, bias=False, stride=2, shape=(2, 12, 7, 7)),
    _case("conv1d", nn.Conv1d, 6, 10, 5, stride=2, padding=2, shape=(3, 6, 17)),
    _case("conv1d_groups", nn.Conv1d, 6, 8, 3, groups=2, padding="same", bias=False, shape=(3, 6, 11)),
    _case("conv1d_circular", nn.Conv1d, 4, 7, 3, padding=1, padding_mode="circular", shape=(3, 4, 11)),
    _case("conv1d_reflect", nn.Conv1d, 4, 7, 3, padding=2, padding_mode="reflect", dilation=2, shape=(3, 4, 11)),
    _case("conv3d", nn.Conv3d, 3, 9, 3, padding=1, shape=(2, 3, 4, 5, 6)),
    _case("conv3d_groups", nn.Conv3d, 4, 6, (1, 3, 2), groups=2, stride=(1, 2, 1), shape=(2, 4, 3, 7, 5)),
    _case(
        "conv3d_replicate", nn.Conv3d, 2, 5, 3, padding=1, padding_mode="replicate", bias=False, shape=(1, 2, 4, 4, 4)
    ),
    _case("transposed", nn.ConvTranspose2d, 6, 8, 3, stride=2, padding=1, shape=(2, 6, 5, 4)),
    _case(
        "transposed_odd",
        nn.ConvTranspose2d,
        4,
        9,
        (3, 2),
        stride=(2, 1),
        output_padding=(1, 0),
        dilation=2,
        shape=(2, 4, 4, 5),
    ),
    _case("transposed_groups", nn.ConvTranspose2d, 8, 12, 2, stride=2, groups=2, bias=False, shape=(2, 8, 4, 5)),
    _case("transposed1d", nn.ConvTranspose1d, 5, 6, 4, stride=2, padding=1, shape=(3, 5, 7)),
    _case("transposed3d", nn.ConvTranspose3d, 4, 6, 2, groups=2, stride=(1, 2, 1), shape=(1, 4, 3, 3, 4)),
    _case("linear_narrow", nn.Linear, 20, 12, shape=(5, 20)),
    _case("linear_wide", nn.Linear, 12, 20, shape=(5, 12)),
    _case("linear_no_bias", nn.Linear, 9, 9, bias=False, shape=(5, 9)),
    _case("linear_tokens", nn.Linear, 10, 14, shape=(3, 7, 10)),
]
CASES_BY_NAME = {case.name: case for case in LAYER_CASES}
