"""What training costs: the callbacks, scale-only steps against fine-tuning all weights, and their memory."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from benchmarks._speed_common import CLASSES, Row, build, milliseconds
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning
from bsdp.task import TransferTask

FRAME = {"basis": IterativeBasisPruning, "channel": ChannelPruning, "double": DoublePruning}
CRITERIA = ("taylor_2019", "taylor_2016", "activation_cumsum", "l1")
SHARES = (1.0, 0.75, 0.5, 0.25)


class Clock(Callback):
    """Processor seconds of every epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


class StopAfter(Callback):
    """Ends the fit after some epochs, before the cut."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def callbacks(options: argparse.Namespace) -> Iterator[Row]:
    """An epoch with a pruning callback against the same epoch without it, on the same network and images.

    The network is decomposed and frozen for `basis`, `channel` and `double`, plain with all weights for the criteria of
    `ChannelPruning`. The first epoch warms up, the second counts; before the third, bases are chosen anew where the
    callback does that once in a fit: what that costs is given in steps of training, for it reads 16 batches, however
    long an epoch is. No cut is made.
    """
    for backbone, size, batch in options.networks or (("bsdp:resnet20", 32, 64), ("torchvision:resnet18", 64, 32)):
        images = torch.randn(options.batches * batch, 3, size, size)
        data = TensorDataset(images, torch.randint(CLASSES, (len(images),)))
        task = TransferTask(backbone, CLASSES, weights="none")
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        once: list[float] = []
        for _ in range(options.repeats):
            for name, times in seconds.items():
                second, third = _epochs(task, DataLoader(data, batch), options.method, prune=name == "with")
                times.append(second)
                if name == "with" and options.method in ("basis", "double"):
                    once.append((third - second) / second * options.batches)
        ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        yield {
            "part": "callbacks",
            "network": backbone,
            "image_size": size,
            "batch_size": batch,
            "method": options.method,
            "seconds_without": medians["without"],
            "seconds_with": medians["with"],
            "ratio": medians["with"] / medians["without"],
            "ratio_lowest": min(ratios),
            "ratio_highest": max(ratios),
            "ratio_of_lowest": min(seconds["with"]) / min(seconds["without"]),  # what other load adds is not in it
            "batches": options.batches,
            "once_in_steps": statistics.median(once) if once else None,
            "repeats": options.repeats,
        }


def _epochs(task: TransferTask, loader: Any, method: str, *, prune: bool) -> tuple[float, float]:
    """Processor seconds of the second and of the third epoch."""
    clock = Clock()
    # Three epochs of warm-up and rounds that never come: scores and statistics are gathered, nothing is cut.
    pruning = [_pruning(method)] if prune else []
    frame = [BasisDecomposition()] if method in FRAME else []
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(max_epochs=4, callbacks=[clock, StopAfter(3), *frame, *pruning], **quiet)
        trainer.fit(task, loader)
    _, second, third = clock.seconds
    return second, third


def _pruning(method: str) -> Callback:
    settings: dict[str, Any] = {"target": 0.1, "warmup_epochs": 3, "rounds": 1, "tolerance": None, "save_pruned": False}
    if method == "double":
        settings["split"] = 0.5  # the loop has no validation
    return FRAME[method](**settings) if method in FRAME else ChannelPruning(criterion=method, **settings)  # type: ignore[arg-type]


def scales(options: argparse.Namespace) -> Iterator[Row]:
    """A training step of the scaling factors and the head alone against one of all weights, and peak memories.

    With lean norms, the frozen batch norms keep no input (see `bsdp.lean_batch_norms`).

    The decomposed network has its batch norms frozen, as `BasisDecomposition` leaves them, and keeps a share of every
    rank; the first basis vectors stay. Memory is that of tensors, as torch's own profiler sees them in the first step,
    gradients and momentum included; the weights that stand before the step are counted apart.
    """
    default = (
        ("bsdp:resnet20", 32, 64),
        ("torchvision:mobilenet_v2", 64, 32),
        ("torchvision:resnet18", 64, 32),
        ("torchvision:resnet50", 64, 16),
    )
    for backbone, size, batch in options.networks or default:
        images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
        networks = {"all weights": build(backbone)}
        for share in SHARES:
            networks[f"scales at {share:g} of the rank"] = _scales_only(networks["all weights"], share, images[:1])
        steps = {name: _step(network, images, labels) for name, network in networks.items()}
        for name, network in list(networks.items())[1:]:
            networks[f"{name}, lean norms"] = network
            steps[f"{name}, lean norms"] = _lean(network, steps[name])
        memory = {name: _peak_memory(step) for name, step in steps.items()}
        times = milliseconds(steps, repeats=options.repeats)
        base = "all weights"
        for name, network in networks.items():
            stored = sum(p.numel() * p.element_size() for p in network.parameters())
            yield {
                "part": "scales",
                "network": backbone,
                "image_size": size,
                "batch_size": batch,
                "trains": name,
                "ms_per_step": times[name],
                "time_ratio": times[name] / times[base],
                "peak_mb": memory[name] / 1e6,
                "memory_ratio": memory[name] / memory[base],
                "weights_mb": stored / 1e6,
                "repeats": options.repeats,
            }


def _scales_only(network: nn.Module, share: float, example: Tensor) -> nn.Module:
    network = copy.deepcopy(network)
    head = bsdp.decompose(network, example_input=example).skipped
    last = [name for name, reason in head.items() if reason.startswith("it is the head")]
    bsdp.freeze(network, trainable=last)
    for pair in bsdp.named_pairs(network).values():
        kept = torch.arange(math.ceil(share * pair.rank))
        pair.keep((kept[None] + pair.rank * torch.arange(pair.groups)[:, None]).flatten())
    return network


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of training: forward, backward, momentum."""
    network.train()
    if bsdp.named_pairs(network):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _lean(network: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """The same step with `bsdp.lean_batch_norms`."""

    def lean_step() -> None:
        with bsdp.lean_batch_norms(network.modules()):
            step()

    return lean_step


def _peak_memory(step: Callable[[], None]) -> int:
    """Most bytes that one call has allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
