"""Bases chosen anew in the course of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import bsdp
from bsdp.callbacks import BasisDecomposition, DoublePruning, IterativeBasisPruning
from tests.helpers.compare import relative_error
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def callbacks(**options: Any) -> list[Callback]:
    settings = {"target": 0.4, "rounds": 2, "warmup_epochs": 2, "tolerance": None, "calibration_batches": 2}
    return [BasisDecomposition(), IterativeBasisPruning(**{**settings, "save_pruned": False, **options})]


def look_into(pl_module: Any) -> tuple[Tensor, Tensor]:
    """The outputs, and the weight of one basis layer."""
    with torch.no_grad():
        outputs = pl_module(IMAGES)
    return outputs, bsdp.named_pairs(pl_module)["network.0.2"].basis.weight.detach().clone()


class Before(Callback):
    """Looks at the module as epochs start, before the pruning callback does anything."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(look_into(pl_module))


class After(Before):
    """Looks at it when the first batch is about to train, and at the momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.momentum: list[bool] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(look_into(pl_module))
            delta = bsdp.named_pairs(pl_module)["network.0.2"].scaling.delta
            self.momentum.append(delta in trainer.optimizers[0].state)


class Momentum(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("metric", ["euclidean", "activation", "kfac"])
def test_bases_change_before_the_scored_epochs_and_the_function_does_not(tmp_path: Path, metric: str) -> None:
    before, after = Before(), After()
    prune = callbacks(rebase="every_round", metric=metric, centred=metric == "activation")
    trainer = make_trainer(tmp_path, [before, *prune, after], max_epochs=4)
    trainer.fit(Momentum(), datamodule=Stripes())
    # 0: nothing; 1: new bases; 2: a cut and new bases; 3: the last cut
    same = [relative_error(b[0], a[0]) < 1e-5 for b, a in zip(before.seen, after.seen, strict=True)]
    assert same == [True, True, False, False]
    assert torch.equal(before.seen[0][1], after.seen[0][1])
    assert not torch.equal(before.seen[1][1], after.seen[1][1])
    assert after.momentum == [False, False, False, True]
    kept = {tuple(row.flatten().tolist()) for row in before.seen[2][1]}
    survivors = [tuple(row.flatten().tolist()) in kept for row in after.seen[2][1]]
    assert not any(survivors)
    kept = {tuple(row.flatten().tolist()) for row in before.seen[3][1]}
    assert all(tuple(row.flatten().tolist()) in kept for row in after.seen[3][1])
    assert len(prune[1].record.rounds) == 3  # type: ignore[attr-defined]


def run(folder: Path, *, ckpt_path: Path | None = None, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Momentum()
    keeper = ModelCheckpoint(folder / "kept", save_top_k=-1, filename="{epoch}")
    kept = [keeper] if ckpt_path is None else []
    prune = callbacks(rebase="every_round", metric="kfac", **options)
    trainer = make_trainer(folder, [*prune, *kept], max_epochs=4, enable_checkpointing=bool(kept))
    trainer.fit(module, datamodule=Stripes(), ckpt_path=ckpt_path, weights_only=True)
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed one writes no checkpoints
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    for epoch in (0, 1):  # before new bases, and with scores of them before a cut
        rest = run(tmp_path / f"from_{epoch}", ckpt_path=tmp_path / "whole" / "kept" / f"epoch={epoch}.ckpt")
        assert rest.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(rest[key], value), (epoch, key)


def test_double_pruning_chooses_bases_anew_too(tmp_path: Path) -> None:
    before, after = Before(), After()
    settings: dict[str, Any] = {"target": 0.4, "rounds": 2, "warmup_epochs": 2, "tolerance": None, "split": 0.5}
    prune = DoublePruning(**settings, calibration_batches=2, rebase="auto", save_pruned=False)
    trainer = make_trainer(tmp_path, [before, BasisDecomposition(), prune, after], max_epochs=4)
    trainer.fit(Momentum(), datamodule=Stripes())
    assert relative_error(before.seen[1][0], after.seen[1][0]) < 1e-5
    assert torch.equal(before.seen[0][1], after.seen[0][1]) and not torch.equal(before.seen[1][1], after.seen[1][1])
    assert after.momentum[:2] == [False, False]
    with pytest.raises(ValueError, match=r"`rebase` must be one of 'auto', 'never'"):
        DoublePruning(rebase="once")  # type: ignore[arg-type]


def test_fast_dev_run_changes_no_basis(tmp_path: Path) -> None:
    before, after = Before(), After()
    prune = callbacks(rebase="every_round", metric="activation", warmup_epochs=1)
    make_trainer(tmp_path, [before, *prune, after], fast_dev_run=2).fit(Classifier(), datamodule=Stripes())
    assert torch.equal(before.seen[0][1], after.seen[0][1])


def test_kfac_needs_logits(tmp_path: Path) -> None:
    class Binary(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :1]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    module = Binary()
    module.own = torch.nn.Linear(1, 1)  # with which the network is the whole module
    trainer = make_trainer(tmp_path, callbacks(rebase="warmup", metric="kfac"), max_epochs=4)
    with pytest.raises(ValueError, match=r"needs logits \[batch, classes, ...\] of two classes or more"):
        trainer.fit(module, datamodule=Stripes())


def test_kfac_takes_the_logits_that_the_module_puts_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cool(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * 0.05

    class Nested(Classifier):
        def forward(self, images: Tensor) -> Any:
            return {"logits": super().forward(images)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0])["logits"], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    seen: list[Tensor] = []

    def look(outputs: Any, *_: Any) -> Tensor:
        seen.append(outputs.detach())
        return outputs.sum()  # type: ignore[no-any-return]

    monkeypatch.setattr("bsdp.gradient_moments.loss_of", look)
    trainer = make_trainer(tmp_path, callbacks(rebase="warmup", metric="kfac"), max_epochs=4)
    trainer.fit(Cool(), datamodule=Stripes())
    assert seen and all(outputs.abs().max() < 0.2 for outputs in seen)
    trainer = make_trainer(tmp_path, callbacks(rebase="warmup", metric="kfac"), max_epochs=4)
    with pytest.raises(ValueError, match=r"needs logits .* the model gave dict"):  # before any training
        trainer.fit(Nested(), datamodule=Stripes())
    assert trainer.global_step == 0


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="`metric: kfac` weighs bases by the loss"):
        BasisDecomposition(metric="kfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`shrinkage` must be between 0 and 1"):
        BasisDecomposition(shrinkage=2.0)
    with pytest.raises(ValueError, match="`calibration_batches` must be at least 1"):
        IterativeBasisPruning(warmup_epochs=1, calibration_batches=0)
    with pytest.raises(ValueError, match="`warmup_epochs` of at least 2"):
        IterativeBasisPruning(rebase="warmup", metric="kfac", warmup_epochs=1)


def test_centred_bases_from_the_start(tmp_path: Path) -> None:
    seen: list[LightningModule] = []
    for centred in (False, True):
        torch.manual_seed(0)
        module = Classifier()
        options: Any = {"metric": "activation", "centred": centred, "shrinkage": 0.0, "calibration_batches": 1}
        trainer = make_trainer(tmp_path, [BasisDecomposition(**options)], max_epochs=1, limit_train_batches=1)
        trainer.fit(module, datamodule=Stripes())
        seen.append(module)
    bases = [bsdp.named_pairs(module)["network.0.2"].basis.weight.detach() for module in seen]
    assert relative_error(*bases) > 0.05
