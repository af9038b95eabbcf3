"""Layers of any geometry through the whole way: decompose, prune, fold, save, load, and a checkpoint of it."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bsdp
from bsdp.layers import BasisPair, named_pairs
from bsdp.plain_layers import SUPPORTED_TYPES, spatial_dims
from tests.helpers.compare import assert_same_state, keep_ranks, randomize_scales

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class Drawn:
    """A layer that can be built again, and an input for it."""

    kind: type[nn.Module]
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def build(self) -> nn.Module:
        return nn.Sequential(self.kind(**self.arguments)).to(self.dtype)

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)


def draw_layer(kind: type[nn.Module], seed: int) -> Drawn:
    """Drawn evenly: strategies that prefer simple values would hardly ever give a group or a dilation."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    bias = rng.random() < 0.5
    if issubclass(kind, nn.Linear):
        arguments = {"in_features": rng.randint(1, 12), "out_features": rng.randint(1, 12), "bias": bias}
        shape = tuple(rng.randint(1, 3) for _ in range(rng.randint(1, 3)))
        return Drawn(kind, arguments, (*shape, arguments["in_features"]), dtype, seed)
    dims = spatial_dims(kind(1, 1, 1, device="meta"))
    groups = rng.choice([1, 1, 1, 2, 3])
    arguments = {
        "in_channels": groups * rng.randint(1, 5),
        "out_channels": groups * rng.randint(1, 6),
        "kernel_size": tuple(rng.randint(1, 3) for _ in range(dims)),
        "stride": tuple(rng.randint(1, 3) for _ in range(dims)),
        "dilation": tuple(rng.randint(1, 2) for _ in range(dims)),
        "groups": groups,
        "bias": bias,
    }
    extents = [d * (k - 1) + 1 for d, k in zip(arguments["dilation"], arguments["kernel_size"], strict=True)]
    padding: Any = tuple(rng.randint(0, 2) for _ in range(dims))
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        padding = tuple(min(p, (extent - 1) // 2) for p, extent in zip(padding, extents, strict=True))
        arguments["output_padding"] = tuple(
            rng.randint(0, max(s, d) - 1) for s, d in zip(arguments["stride"], arguments["dilation"], strict=True)
        )
        sizes = [rng.randint(1, 4) for _ in range(dims)]
    else:
        arguments["padding_mode"] = rng.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
        padding = rng.choice([padding, padding, "valid", "same"])
        if padding == "same":
            arguments["stride"] = (1,) * dims
        sizes = [extent + 2 + rng.randint(0, 3) for extent in extents]  # more than any padding, which wraps or mirrors
    arguments["padding"] = padding
    return Drawn(kind, arguments, (rng.randint(1, 3), arguments["in_channels"], *sizes), dtype, seed)


LAYERS = st.builds(draw_layer, st.sampled_from(SUPPORTED_TYPES), st.integers(0, 10**9))


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Relative to the largest output, for some outputs are zero."""
    scale = max(float(expected.detach().abs().max()), 1e-3)
    return (
        actual.shape == expected.shape and float((actual - expected).detach().abs().max()) <= TOLERANCE[dtype] * scale
    )


@settings(max_examples=200)
@given(LAYERS)
def test_any_layer_goes_the_whole_way(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> None:
    goes_the_whole_way(tmp_path_factory, drawn)


@pytest.mark.slow
@settings(max_examples=1000)
@given(LAYERS)
def test_many_layers_go_the_whole_way(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> None:
    goes_the_whole_way(tmp_path_factory, drawn)


def goes_the_whole_way(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> None:
    """Decompose, prune, fold, save and load a layer, and take a checkpoint of it."""
    torch.manual_seed(drawn.seed)
    folder, dtype, inputs = tmp_path_factory.getbasetemp(), drawn.dtype, drawn.inputs()
    net = drawn.build().train()
    expected = net(inputs)
    done = bsdp.decompose(net, include=["0"])
    assert (list(done.replaced) == ["0"]) is not bool(done.skipped)
    assert close(net(inputs), expected, dtype)
    event("skipped" if done.skipped else "decomposed")

    randomize_scales(net)
    rng = random.Random(drawn.seed)
    keep_ranks(net, {name: rng.randint(1, pair.rank) for name, pair in named_pairs(net).items()}, seed=drawn.seed)
    expected = net(inputs)
    if expected.requires_grad:
        expected.sum().backward()
        assert all(pair.scaling.delta.grad is not None for pair in named_pairs(net).values())
    folded = bsdp.fold(net)
    assert not any(isinstance(module, BasisPair) for module in folded.modules())
    assert close(folded(inputs), expected, dtype)

    path = bsdp.save(net, folder / "fuzz.safetensors")
    loaded = bsdp.load(drawn.build(), path)
    assert_same_state(loaded, folded.state_dict())
    assert torch.equal(loaded(inputs), folded.eval()(inputs))
    assert bsdp.read_metadata(path)["layers"]["0"]["kind"] == (
        "plain" if done.skipped else "pair" if isinstance(folded[0], nn.Sequential) else "fused"
    )

    torch.save({"state_dict": net.state_dict(), "bsdp": bsdp.structure_of(net)}, folder / "fuzz.ckpt")
    rebuilt = drawn.build()
    bsdp.load_checkpoint(rebuilt, folder / "fuzz.ckpt")
    assert_same_state(rebuilt, net.state_dict())
    assert torch.equal(rebuilt(inputs), net(inputs))


def test_the_layers_that_are_drawn_are_of_all_kinds() -> None:
    drawn = [draw_layer(kind, seed) for kind in SUPPORTED_TYPES for seed in range(60)]
    convs = [d.arguments for d in drawn if "groups" in d.arguments]
    assert {d["padding_mode"] for d in convs if "padding_mode" in d} == {"zeros", "reflect", "replicate", "circular"}
    assert {"same", "valid"} < {str(d["padding"]) for d in convs}
    assert {d["groups"] for d in convs} == {1, 2, 3}
    replaced = [bool(bsdp.decompose(d.build(), include=["0"]).replaced) for d in drawn]
    assert 0.3 * len(drawn) < sum(replaced) < len(drawn)
