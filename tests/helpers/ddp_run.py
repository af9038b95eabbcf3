"""Runs under DDP with two processes on the CPU; `tests.callbacks.test_ddp` starts it and reads what it writes.

``python -m tests.helpers.ddp_run FOLDER SCENARIO...`` writes ``SCENARIO-RANK.pt`` for each scenario and process.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

import bsdp
from bsdp.callbacks import (
    BasisDecomposition,
    ChannelPruning,
    DoublePruning,
    IterativeBasisPruning,
    PruningReport,
    _recalibration,
)
from tests.helpers.channel_runs import ResidualClassifier
from tests.helpers.outcomes import loss_of
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer


class Module(Classifier):
    """Has momentum, and drops steps whose gradients are not finite, as a gradient scaler does.

    Args:
        broken: Epochs and batches in which process 1 sees nothing but NaN.
        steered: Value of ``val_accuracy`` per process and epoch.
        unused: Have a parameter that no step uses.
        norm: Have a batch norm.
    """

    def __init__(
        self,
        *,
        broken: tuple[tuple[int, int], ...] = (),
        steered: list[list[float]] | None = None,
        unused: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.broken, self.steered = broken, steered
        if norm:
            self.network[0].insert(1, nn.BatchNorm2d(16))  # type: ignore[operator]
        if unused:
            self.network.spare = nn.Parameter(torch.ones(3))
            self.network.forward = nn.Sequential(*self.network).forward  # type: ignore[method-assign]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.global_rank == 1 and (self.current_epoch, batch_idx) in self.broken:
            images = images * float("nan")
        return super().training_step((images, labels), batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not all(gradient.isfinite().all() for gradient in gradients):
            optimizer.zero_grad()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.steered is None:
            super().validation_step(batch, batch_idx)
        else:
            self.log("val_accuracy", self.steered[self.global_rank][self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2, momentum=0.9)


class Spy(Callback):
    """Notes what goes into the decision and what comes out, on its own process.

    Args:
        pruning: The pruning callback.
        uneven: Treble the scores of process 1 before they are averaged; after the averaging of gradients by DDP they
            are the same everywhere.
    """

    def __init__(self, pruning: IterativeBasisPruning, *, uneven: bool = False) -> None:
        self.pruning, self.uneven = pruning, uneven
        self.reductions: list[dict[str, Any]] = []
        self.momentum: list[dict[str, Any]] = []
        self.monitored: list[float] = []
        self.steps: list[int] = []
        self.losses: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = self.pruning.pruner
        assert pruner is not None
        inner = pruner.reduce

        def reduce(function: Any) -> None:
            if self.uneven and trainer.global_rank == 1 and pruner.scores._sum is not None:
                pruner.scores._sum = pruner.scores._sum * 3
            before = self._sums()
            inner(function)
            self.reductions.append({"before": before, "after": self._sums()})

        cut = pruner.cut

        def noted_cut(*args: Any, **kwargs: Any) -> bool:
            self.steps.append(pruner.scores.steps)
            return cut(*args, **kwargs)

        pruner.reduce = reduce  # type: ignore[method-assign]
        pruner.cut = noted_cut  # type: ignore[method-assign]

    def _sums(self) -> dict[str, Any]:
        pruner = self.pruning.pruner
        assert pruner is not None
        scores = None if pruner.scores._sum is None else pruner.scores._sum.clone()
        return {"scores": scores, "squares": {k: v.clone() for k, v in pruner.statistics.squares.items()}}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.losses:
            self.losses.append(loss_of(pl_module))
        if batch_idx == 0 and trainer.current_epoch > 0:
            state = trainer.optimizers[0].state
            deltas = [pair.scaling.delta for pair in bsdp.named_pairs(pl_module).values()]
            buffers = [state[delta].get("momentum_buffer") for delta in deltas]
            fits = all(b is not None and b.shape == d.shape for b, d in zip(buffers, deltas, strict=True))
            self.momentum.append({"fits": fits, "any": fits and all(bool(b.any()) for b in buffers)})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitored.append(float(trainer.callback_metrics["val_accuracy"]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses.append(loss_of(pl_module))


def fit(
    folder: Path,
    module: Module,
    *others: Callback,
    pruning: dict[str, Any] | None = None,
    decomposition: dict[str, Any] | None = None,
    uneven: bool = False,
    ckpt_path: Path | None = None,
    model: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """One run, and what this process saw of it."""
    callback = IterativeBasisPruning(
        **{"target": 0.5, "rounds": 2, "warmup_epochs": 1, "tolerance": None, **(pruning or {})}
    )
    spy = Spy(callback, uneven=uneven)
    callbacks = [callback, BasisDecomposition(**(decomposition or {})), spy, *others]
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 4, **options}
    trainer = make_trainer(folder, callbacks, **options)
    data = Stripes(batch_size=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module if model is None else model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    record, inside = callback.record, named(module)
    return {
        "ranks": [pair.rank for pair in inside.values()],
        "rounds": record.state_dict()["rounds"],
        "chosen": record.chosen,
        "stopped": callback.pruner is not None and callback.pruner.stopped,
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "files": [str(callback.checkpoint_path), str(callback.weights_path)],
        "warnings": [str(entry.message) for entry in caught],
        "world_size": trainer.world_size,
        **{key: getattr(spy, key) for key in ("reductions", "momentum", "monitored", "steps", "losses")},
    }


def named(module: LightningModule) -> dict[str, bsdp.BasisPair]:
    return bsdp.named_pairs(module)


def plain(folder: Path) -> dict[str, Any]:
    keeper = ModelCheckpoint(folder / "kept", save_top_k=-1, filename="{epoch}", monitor="val_accuracy", mode="max")
    report = PruningReport(latency_repeats=1)
    options: dict[str, Any] = {"decomposition": {"metric": "activation"}, "enable_checkpointing": True, "uneven": True}
    pruning = {"tolerance": 0.9}
    result = fit(folder, Module(), keeper, report, pruning=pruning, **options)
    resumed = fit(folder / "resumed", Module(), pruning=pruning, ckpt_path=folder / "kept" / "epoch=1.ckpt", **options)
    return {**result, "resumed": resumed, "summary": report.summary}


def measured(folder: Path, *, broken: bool) -> dict[str, Any]:
    """Bases by gradients and chosen anew, a teacher, and batch norms that are recalibrated after every cut.

    Args:
        folder: Of the run.
        broken: The first batches that process 1 reads to recalibrate give no statistics.
    """
    inner, calls = _recalibration.recalibrate_by_running, 0

    def recalibrate(model: nn.Module, runs: Any) -> list[str]:
        nonlocal calls
        calls += 1
        if broken and calls == 1 and torch.distributed.get_rank() == 1:
            raise ValueError("no statistics here")
        return inner(model, runs)

    _recalibration.recalibrate_by_running = recalibrate
    try:
        return fit(
            folder,
            Module(norm=True),
            max_epochs=5,
            decomposition={"batch_norm": "stats"},
            pruning={
                "warmup_epochs": 2,
                "distillation": 0.5,
                "recalibration_batches": 2,
                "metric": "kfac",
                "rebase": "every_round",
                "calibration_batches": 2,
            },
        )
    finally:
        _recalibration.recalibrate_by_running = inner


def channels(folder: Path, *, double: bool, **options: Any) -> dict[str, Any]:
    """Channels are cut, and the processes see other images of training and validation."""
    callbacks: list[Any] = [BasisDecomposition(batch_norm="all")] if double else []
    pruning: Any = DoublePruning if double else ChannelPruning
    callback = pruning(target=0.5, rounds=2, warmup_epochs=1, tolerance=None, **options.pop("pruning", {}))
    trainer = make_trainer(folder, [callback, *callbacks], strategy="ddp", devices=2, max_epochs=3, **options)
    module, sums, tried = ResidualClassifier(), [], []

    class Note(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            scores = callback.pruner.stages["channel"].scores.state_dict()["sum"]
            sums.append(None if scores is None else scores.clone())
            tried.append(dict(getattr(callback.pruner, "changes", {})))

    trainer.callbacks.append(Note())  # type: ignore[attr-defined]
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    return {
        "ranks": callback.pruner.ranks,
        "rounds": callback.record.state_dict()["rounds"],
        "chosen": callback.record.chosen,
        "stopped": callback.pruner.stopped,
        "state": {key: value.clone() for key, value in module.state_dict().items()},
        "files": [str(callback.checkpoint_path), str(callback.weights_path)],
        "warnings": [],
        "world_size": trainer.world_size,
        "sums": sums,
        "tried": tried,
        "own": None if not double else float(callback.pruner.probe().sum()),
    }


SCENARIOS: dict[str, Any] = {
    "plain": plain,
    "unused": lambda folder: fit(folder, Module(unused=True), strategy="ddp_find_unused_parameters_true"),
    "energy": lambda folder: fit(
        folder,
        Module(),
        pruning={"importance": "energy"},
        strategy=DDPStrategy(gradient_as_bucket_view=True),
        accumulate_grad_batches=2,
    ),
    "norm": lambda folder: fit(
        folder,
        Module(norm=True),
        decomposition={"batch_norm": "stats"},
        strategy=DDPStrategy(static_graph=True),
    ),
    "nan": lambda folder: fit(
        folder, Module(broken=((0, 0), (1, 0), (1, 1), (1, 2))), max_epochs=5, pruning={"rounds": 3}
    ),
    "disagree": lambda folder: fit(
        folder,
        Module(steered=[[0.9, 0.95, 0.9, 0.9], [0.9, 0.5, 0.9, 0.9]]),
        pruning={"tolerance": 0.1, "rounds": 3},
    ),
    "curvature": lambda folder: fit(
        folder,
        Module(),
        pruning={"importance": "second_order", "score_momentum": 0.5, "curvature_batches": 2},
        decomposition={"batch_norm": "stats"},
    ),
    "examples": lambda folder: fit(folder, Module(), pruning={"importance": "fisher"}),
    "measured": lambda folder: measured(folder, broken=False),
    "broken": lambda folder: measured(folder, broken=True),
    "channel": lambda folder: channels(folder, double=False, pruning={"criterion": "activation_cumsum", "theta": 0.4}),
    "factors": lambda folder: channels(folder, double=False, pruning={"criterion": "transtailor"}),
    "double": lambda folder: channels(folder, double=True),
}


def main() -> None:
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        torch.manual_seed(0)
        result = SCENARIOS[name](folder / name)
        rank = torch.distributed.get_rank()
        torch.save(result, folder / f"{name}-{rank}.pt")
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
