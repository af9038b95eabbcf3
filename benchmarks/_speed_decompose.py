"""What `bsdp.decompose` and the statistics for it cost: seconds, memory, and how they grow."""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bsdp
from benchmarks._speed_common import Row, build, milliseconds
from bsdp.factorize import factorize

NETWORKS = ("torchvision:resnet50", "torchvision:densenet121", "torchvision:vit_b_16", "torchvision:vgg16")
_SIZES = {"torchvision:vit_b_16": 224}


def decompose(options: argparse.Namespace) -> Iterator[Row]:
    """Seconds and peak memory of `decompose` for large networks, each in a process of its own.

    The memory is the peak of the whole process above what it held before, by `getrusage`. `seconds` is processor time,
    `seconds_wall` the clock on the wall. Statistics for the activation metric are of few images, which costs the same
    per image for any number.
    """
    for backbone in [name for name, *_ in options.networks] or NETWORKS:
        for metric in ("euclidean", "activation"):
            words = [backbone, metric, str(options.images), str(options.threads)]
            command = [sys.executable, "-m", "benchmarks._speed_decompose", *words]
            root = Path(__file__).resolve().parent.parent
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            yield {"part": "decompose", **json.loads(done.stdout.splitlines()[-1])}


def growth(options: argparse.Namespace) -> Iterator[Row]:
    """How the cost of one layer grows with its size, and that of the statistics with the images.

    A 3x3 convolution of c to c channels, factorised in both metrics, in processor seconds; `order` is the exponent from
    one row to the next: 3 where the time grows with the cube of c.
    """
    for metric in ("euclidean", "activation"):
        previous = 0.0
        for width in (64, 128, 256, 512, 1024):
            weight = torch.randn(1, width, 9 * width)
            outputs = torch.randn(2 * width, width)
            moment = outputs.T @ outputs / len(outputs)
            seconds = min(_timed(weight, metric, moment) for _ in range(2 if width < 1024 else 1))
            order = None if not previous else torch.tensor(seconds / previous).log2().item()
            row = {"part": "growth", "what": f"factorize, {metric}", "size": width, "seconds": seconds}
            yield row | {"order": order}
            previous = seconds
    network = build("bsdp:resnet20")
    bsdp.decompose(network)
    previous = 0.0
    for images in (64, 256, 1024):
        batches = [torch.randn(64, 3, 32, 32) for _ in range(images // 64)]
        start = time.process_time()
        bsdp.collect_output_moments(network, batches)
        seconds = time.process_time() - start
        order = None if not previous else torch.tensor(seconds / previous).log2().item() / 2
        row = {"part": "growth", "what": "statistics of ResNet-20 by images", "size": images, "seconds": seconds}
        yield row | {"order": order}
        previous = seconds


def parallel(options: argparse.Namespace) -> Iterator[Row]:
    """Whether layers in parallel are decomposed faster than one after another, in seconds on the wall.

    `alone` is one thread, `inside` lets torch use the threads within each layer (what `decompose` does), `side by side`
    gives each thread a layer of its own.
    """
    threads = max(2, options.threads)
    for backbone in [name for name, *_ in options.networks] or ("torchvision:resnet50", "torchvision:vit_b_16"):
        network = build(backbone)
        names = bsdp.decompose(copy.deepcopy(network)).replaced
        layers = [network.get_submodule(name) for name in names]
        calls = {
            "alone": lambda layers=layers: _factorised(layers, threads=1, workers=1),
            "inside": lambda layers=layers: _factorised(layers, threads=threads, workers=1),
            "side by side": lambda layers=layers: _factorised(layers, threads=1, workers=threads),
        }
        try:
            times = milliseconds(calls, repeats=options.repeats, warmup=0, wall=True)
        finally:
            torch.set_num_threads(options.threads)
        for way, time_taken in times.items():
            row = {"part": "parallel", "network": backbone, "what": way, "layers": len(layers)}
            yield {**row, "seconds": time_taken / 1e3, "threads": 1 if way == "alone" else threads}


def _factorised(layers: Sequence[nn.Module], *, threads: int, workers: int) -> None:
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(bsdp.pair_from_layer, layers))


def _timed(weight: torch.Tensor, metric: str, moment: torch.Tensor) -> float:
    start = time.process_time()
    factorize(weight, metric=metric, moment=moment if metric == "activation" else None)
    return time.process_time() - start


def measure(backbone: str, metric: str, images: int) -> Row:
    """Decompose one network in this process."""
    network = build(backbone).eval()
    inputs = torch.randn(images, 3, *2 * (_SIZES.get(backbone, 64),))
    statistics, collected = None, None
    if metric == "activation":
        statistics, collected = _statistics(network, inputs)
    parameters = sum(p.numel() for p in network.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, wall = time.process_time(), time.perf_counter()
    done = bsdp.decompose(network, metric=metric, statistics=statistics)
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "network": backbone,
        "metric": metric,
        "layers": len(done.replaced),
        "parameters": parameters,
        "seconds": seconds,
        "seconds_wall": wall,
        "peak_mb": peak / 1024,
        "weights_mb": 4 * parameters / 1e6,
        "seconds_statistics": collected,
        "images": images if metric == "activation" else None,
        "threads": torch.get_num_threads(),
    }


def _statistics(network: nn.Module, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Output second moments of the plain layers, and the seconds they took."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    moments = {name: torch.eye(layer.weight.shape[0]) for name, layer in layers.items()}  # some are never called

    def hook(name: str) -> Any:
        def add(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            rows = (output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output).flatten(0, -2)
            moments[name] = rows.mT @ rows / len(rows)

        return add

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    start = time.process_time()
    with torch.no_grad():
        network(images)
    seconds = time.process_time() - start
    for handle in handles:
        handle.remove()
    return moments, seconds


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
