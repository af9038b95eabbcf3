"""Size and speed of the original and the pruned network, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import bsdp
from bsdp.compiling import uncompiled
from bsdp.stats import count_macs


def network_of(pl_module: LightningModule, name: str) -> nn.Module:
    """The network inside a module by its dotted name; "" for the module itself."""
    return pl_module.get_submodule(name) if name else pl_module


def fold_network(pl_module: LightningModule, name: str) -> nn.Module:
    """A plain copy of the network that the module holds now, in eval mode."""
    with uncompiled(pl_module):  # a copy of a compiled method would still run the original
        return bsdp.fold(network_of(pl_module, name)).eval()


def file_sizes(original: nn.Module, network: nn.Module, written: Path | None) -> dict[str, int]:
    """Bytes of both networks as safetensors files with the same metadata.

    Args:
        original: The original network, plain.
        network: The pruned network, still decomposed.
        written: The file that holds it, if there is one.
    """
    with tempfile.TemporaryDirectory() as folder:
        pruned = bsdp.save(network, Path(folder) / "pruned.safetensors") if written is None else written
        own = ("layers", "format_version", "widths")
        header = {key: value for key, value in bsdp.read_metadata(pruned).items() if key not in own}
        whole = bsdp.save(original, Path(folder) / "original.safetensors", metadata=header)
        return {"file_bytes_original": whole.stat().st_size, "file_bytes_pruned": pruned.stat().st_size}


def example_inputs(network: nn.Module, shapes: list[list[int]], *, batch_size: int = 1) -> tuple[Tensor, ...]:
    """Random inputs of the given shapes, whose first axis is the batch, in the type of the network's weights."""
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch_size, *shape[1:], generator=generator).to(dtype) for shape in shapes)


def latencies(
    networks: Mapping[str, nn.Module], shapes: list[list[int]], *, batch_size: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of one forward pass per network, and what they were measured with."""
    example = next(iter(networks.values()))
    inputs = tuple(t.to(device) for t in example_inputs(example, shapes, batch_size=batch_size))
    moved = {name: network.to(device) for name, network in networks.items()}
    times = bsdp.measure_latency(moved, inputs, repeats=repeats)
    return {
        **{f"latency_ms_{name}": value for name, value in times.items()},
        "latency_batch_size": batch_size,
        "latency_threads": torch.get_num_threads(),
        "latency_device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def macs(networks: Mapping[str, nn.Module], shapes: list[list[int]]) -> dict[str, int]:
    """Multiply-adds per network for one example."""
    return {f"macs_{name}": count_macs(net, example_inputs(net, shapes)) for name, net in networks.items()}
