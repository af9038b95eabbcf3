"""Scores that need more than gradients, in real runs: curvature, single examples, averages over rounds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import bsdp
from bsdp.callbacks import BasisDecomposition, DoublePruning, IterativeBasisPruning
from bsdp.callbacks._curvature import add_curvature
from bsdp.callbacks._monitoring import watched
from bsdp.importance import ScoreAccumulator
from tests.helpers.outcomes import run
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer, small_network
from tests.helpers.resuming import differences


class Traceful(Classifier):
    """Leaves a trace wherever a training step can leave one."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].insert(1, nn.BatchNorm2d(16))  # type: ignore[operator]
        self.network[0].insert(2, nn.Dropout(0.2))  # type: ignore[operator]
        self.accuracy = MulticlassAccuracy(4)
        self.outputs: list[Tensor] = []
        self._steps = 0

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch[0] * (1.0 + 0.1 * random.random() + 0.1 * np.random.rand()))
        loss = F.cross_entropy(logits, batch[1])
        self.outputs.append(loss.detach())
        self._steps += 1
        self.accuracy(logits, batch[1])
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"train_loss": loss}, on_step=True, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"own": float(self._steps)}, step=self._steps)
        return {"loss": loss}


class Drawn(Stripes):
    """Shuffles by a generator of its own, or by the global one."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__(batch_size=32)
        self.generator = generator

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, 32, shuffle=True, generator=self.generator)


class Measure(Callback):
    """Takes curvature between the batches and epochs, for nothing."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = ScoreAccumulator(bsdp.named_pairs(pl_module), importance="second_order")
        add_curvature(trainer, pl_module, scores, batches=2, seed=3)
        assert scores.steps == 2
        self.seen.append(scores.compute())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(trainer, pl_module)
        self._measure(trainer, pl_module)


@pytest.mark.parametrize("own_generator", [False, True])
def test_taking_curvature_leaves_no_trace(own_generator: bool, tmp_path: Path) -> None:
    results = []
    for measure in (None, Measure()):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        module, data = Traceful(), Drawn(torch.Generator().manual_seed(5) if own_generator else None)
        others = [] if measure is None else [measure]
        folder = tmp_path / str(len(results))
        trainer = make_trainer(folder, [*others, BasisDecomposition(batch_norm="all")], max_epochs=2)
        trainer.fit(module, datamodule=data)
        (csv,) = folder.rglob("metrics.csv")
        results.append(
            {
                "state": dict(module.state_dict()),
                "optimizer": trainer.optimizers[0].state_dict(),
                "csv": csv.read_text(),
                "outputs": module.outputs,
                "steps": module._steps,
                "random": (torch.get_rng_state(), random.random(), float(np.random.rand())),
                "grads": [p.grad for p in module.parameters() if p.grad is not None],
            }
        )
        assert "log" not in vars(module)
    assert differences(results[0], results[1]) == []
    assert measure is not None
    first, again, later, _ = measure.seen
    assert all(torch.equal(first[name], again[name]) for name in first)  # the same batches, noise and signs
    assert not all(torch.equal(first[name], later[name]) for name in first)


class Types(Classifier):
    """Notes in which type it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, bool]] = set()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        trained = self.trainer.state.stage is not None and "log" not in vars(self)
        TYPES.add((logits.dtype, trained))
        return F.cross_entropy(logits.float(), batch[1])


TYPES: set[tuple[torch.dtype, bool]] = set()
RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"importance": "second_order", "score_momentum": 0.5}, {"precision": "bf16-mixed"}),
    ({"importance": "second_order", "curvature_batches": 2}, {"precision": "bf16-true"}),
    ({"importance": "second_order", "target_kind": "macs"}, {"accumulate_grad_batches": 2}),
    ({"importance": "fisher", "score_momentum": 0.5}, {"precision": "bf16-mixed"}),
    ({"importance": "fisher", "mean_to_bias": False}, {"precision": "64-true"}),
]


@pytest.mark.parametrize(("pruning", "options"), RUNS, ids=lambda value: "-".join(str(v) for v in value.values()))
def test_runs_prune_and_learn_in_every_precision(
    pruning: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    TYPES.clear()
    _, callback, _ = run(Types(), tmp_path, pruning={"tolerance": 0.9, **pruning}, **options)
    trained, measured = ({dtype for dtype, train in TYPES if train is wanted} for wanted in (True, False))
    if pruning["importance"] == "second_order":
        mixed = options.get("precision") == "bf16-mixed"
        assert measured == ({torch.float32} if mixed else trained)
    assert callback.record.chosen == 2


class Counts(Callback):
    """Notes the sums and counts of the scores at the end of every epoch."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.steps: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scores = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner.stages["basis"].scores
        self.sums.append(scores._sum.clone())
        self.steps.append(scores.steps)


class Still(Classifier):
    """Learns nothing."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def test_every_example_of_a_short_epoch_counts_whatever_is_accumulated(tmp_path: Path) -> None:
    counts = []
    for name, options in (("one", {}), ("three", {"accumulate_grad_batches": 3})):
        torch.manual_seed(0)
        counts.append(Counts())
        pruning = IterativeBasisPruning(
            warmup_epochs=1, target=0.5, rounds=1, tolerance=None, importance="fisher", mean_to_bias=False
        )
        callbacks = [pruning, BasisDecomposition(), counts[-1]]
        trainer = make_trainer(tmp_path / name, callbacks, max_epochs=2, **options)  # type: ignore[arg-type]
        trainer.fit(Still(), datamodule=Stripes(batch_size=16))
    assert counts[0].steps == counts[1].steps == [96, 96]
    for one, three in zip(counts[0].sums, counts[1].sums, strict=True):
        torch.testing.assert_close(one, three)


class Hooked(Callback):
    """Notes on which batches of the first epoch the terms of bases and channels, and features, were watched."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"bases": [], "channels": [], "features": []}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stages = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner.stages
        now = {
            "bases": stages["basis"].scores.steps,
            "channels": int(stages["channel"].scores._steps.max()),
            "features": int(max(stages["basis"].statistics.counts.values(), default=0)),
        }
        if batch_idx == 0:
            self.last = dict.fromkeys(now, 0)
        for name, value in now.items() if trainer.current_epoch == 0 else ():
            if value > self.last[name]:
                self.seen[name].append(batch_idx)
        self.last = now


def test_features_are_watched_on_fewer_batches_than_scores(tmp_path: Path) -> None:
    hooked = Hooked()
    pruning = DoublePruning(target=0.4, rounds=1, warmup_epochs=1, tolerance=None, split=0.5, importance="fisher")
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition(), hooked], max_epochs=2)
    trainer.fit(Classifier(), datamodule=Stripes(batch_size=12))
    assert hooked.seen == {"bases": list(range(8)), "channels": list(range(8)), "features": [0, 3, 6]}


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 4, 8, 20, 63, 64, 96, 128, 500, 5000])
def test_which_steps_of_an_epoch_are_watched(steps: int, scores: bool) -> None:
    trainer: Any = SimpleNamespace(num_training_batches=2 * steps)
    seen = [watched(trainer, step, parts=2, scores=scores) for step in range(steps)]
    scored, features = ({i for i in range(steps) if seen[i][name]} for name in ("scores", "statistics"))
    assert 0 in features and len(features) >= min(steps, 3 if steps < 32 else 7)
    assert len(features) <= max(7, min(20, steps // 4))
    for steps_of in (features, scored) if scores else (features,):
        assert len(steps_of) == 1 or {i % 2 for i in steps_of} == {0, 1}  # also layers that every other step calls
    assert scored == set() if not scores else features <= scored
    assert not scores or min(steps, 22) <= len(scored) <= 63


@pytest.mark.parametrize("scores", [True, False])
def test_steps_of_an_epoch_of_unknown_length_are_watched_now_and_then(scores: bool) -> None:
    trainer: Any = SimpleNamespace(num_training_batches=float("inf"))
    seen = [watched(trainer, step, scores=scores) for step in range(103)]
    assert [i for i, now in enumerate(seen) if now == {"scores": scores, "statistics": True}] == [0, 51, 102]
    assert not any(now["scores"] or now["statistics"] for i, now in enumerate(seen) if i % 51)


class Alternating(Classifier):
    """Trains one of two branches in every step, and evaluates both."""

    def __init__(self) -> None:
        super().__init__()
        del self.network
        self.a, self.b = small_network(), small_network()

    def forward(self, images: Tensor) -> Tensor:
        both: Tensor = self.a(images) + self.b(images)
        return both

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy((self.b if batch_idx % 2 else self.a)(batch[0]), batch[1])


def test_layers_that_every_other_step_calls_have_features(tmp_path: Path) -> None:
    pruning = DoublePruning(target=0.4, rounds=1, warmup_epochs=1, tolerance=None, split=0.5, importance="energy")
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], max_epochs=2)
    trainer.fit(Alternating(), datamodule=Stripes(batch_size=12))
    assert len(pruning.record.rounds) == 2


def test_double_pruning_takes_them_too(tmp_path: Path) -> None:
    pruning = DoublePruning(
        target=0.4, rounds=2, tolerance=None, importance="second_order", score_momentum=0.3, curvature_batches=1
    )
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()], max_epochs=4)
    trainer.fit(Classifier(), datamodule=Stripes())
    assert len(pruning.record.rounds) == 3


@pytest.mark.parametrize(("batch_size", "importance", "told"), [(32, "mean_square", 2), (24, "mean_square", 0)])
def test_a_cut_from_very_few_minibatches_is_told(
    batch_size: int, importance: str, told: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None, importance="mean_square")
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()])
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(Classifier(), datamodule=Stripes(batch_size=batch_size))
    texts = [record.getMessage() for record in caplog.records if "ranks by scores of" in record.getMessage()]
    assert len(texts) == told
    assert all("scores of 3 minibatches only" in text for text in texts)


# --- refusals


class Manual(Classifier):
    """Steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TakesIterator(Classifier):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


class Loaders(Stripes):
    """Gives something else than one loader."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        return {"a": loader, "b": loader} if self.kind == "two" else iter(list(loader))


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step")
@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Manual, Stripes, r"manual optimization .*`importance: fisher`"),
        (TakesIterator, Stripes, "takes `dataloader_iter`"),
        (Classifier, lambda: Loaders("two"), "needs one training loader, not a collection"),
        (Classifier, lambda: Loaders("once"), "can be read only once"),
    ],
)
def test_what_leaves_no_way_to_take_curvature_is_refused_before_training(
    module: type[Classifier], data: Any, message: str, tmp_path: Path
) -> None:
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None, importance="second_order")
    trainer = make_trainer(tmp_path, [pruning, BasisDecomposition()])
    loaded: LightningDataModule = data()
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(), datamodule=loaded)
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_that_the_step_skips_do_not_count(tmp_path: Path) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            scores = ScoreAccumulator(bsdp.named_pairs(pl_module), importance="second_order")
            add_curvature(trainer, pl_module, scores, batches=99, seed=0)
            seen.append(scores.steps)

    trainer = make_trainer(tmp_path, [BasisDecomposition(), Look()], max_epochs=1)
    trainer.fit(Skipping(), datamodule=Stripes())
    assert seen == [2]
