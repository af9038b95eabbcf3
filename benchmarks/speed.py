"""What the callbacks cost: an epoch with a pruning callback against the same epoch without it.

    python benchmarks/speed.py [--method basis] [--backbone bsdp:resnet20] [--image-size 32] [--repeats 5]

Both trainers train the same network on random images, in turn, so that both see the same machine: decomposed and frozen
for `basis`, `channel` and `double`, plain with all weights for the criteria of `ChannelPruning`.
Times are processor times of this process, which other load on the machine disturbs less than wall times. No cut is
made.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, IterativeBasisPruning
from bsdp.task import TransferTask

FRAME = {"basis": IterativeBasisPruning, "channel": ChannelPruning, "double": DoublePruning}
CRITERIA = ("taylor_2019", "taylor_2016", "activation_cumsum", "l1")


class Clock(Callback):
    """Processor seconds of every epoch but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start = time.process_time()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*FRAME, *CRITERIA], default="basis")
    parser.add_argument("--backbone", default="bsdp:resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    images = torch.randn(options.images, 3, options.image_size, options.image_size)
    data = TensorDataset(images, torch.randint(10, (options.images,)))
    task = TransferTask(options.backbone, 10, weights="none")
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(options.repeats):
        for name, times in seconds.items():
            clock = Clock()
            # Two epochs of warm-up and rounds that never come: scores and statistics are gathered, nothing is cut.
            pruning = [_pruning(options.method)] if name == "with" else []
            frame = [BasisDecomposition()] if options.method in FRAME else []
            trainer = Trainer(
                max_epochs=3,
                callbacks=[clock, StopAfter(2), *frame, *pruning],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(task, DataLoader(data, options.batch_size))
            times.append(clock.seconds[1])
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    for name, times in seconds.items():
        print(f"{name:>8}: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f}")
    print(f"{options.method}: ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def _pruning(method: str) -> Callback:
    settings: dict[str, Any] = {"target": 0.1, "warmup_epochs": 2, "rounds": 1, "tolerance": None, "save_pruned": False}
    if method == "double":
        settings["split"] = 0.5  # the loop has no validation
    return FRAME[method](**settings) if method in FRAME else ChannelPruning(criterion=method, **settings)


class StopAfter(Callback):
    """Ends the fit after some epochs, before the cut."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


if __name__ == "__main__":
    main()
