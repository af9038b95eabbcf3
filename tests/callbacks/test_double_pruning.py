"""`DoublePruning` in real, tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader

import bsdp
from bsdp import cli
from bsdp.artifacts import load_artifact
from bsdp.callbacks import BasisDecomposition, ChannelPruning, DoublePruning, PruningReport
from bsdp.callbacks._measuring import spread_batches
from bsdp.task import TransferTask
from tests.callbacks.test_precision import CpuScaler
from tests.helpers.channel_runs import ResidualClassifier, ResidualNet, check, fit
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Stripes, make_trainer

SPLITS = [
    (order, split) for order in ("basis_then_channel", "channel_then_basis", "alternate") for split in ("auto", 0.5)
]


@pytest.mark.parametrize(
    ("order", "split"), slow_but([SPLITS[0], ("channel_then_basis", 0.5), ("alternate", "auto")], SPLITS)
)
def test_orders_and_splits(order: str, split: Any, tmp_path: Path) -> None:
    module, report = ResidualClassifier(), PruningReport(latency_repeats=0, plot=False)
    pruning = {"order": order, "split": split, "target": 0.6, "schedule": "constant"}
    _, callback, watch = fit(
        module, tmp_path, report, double=True, pruning=pruning, decomposition={"batch_norm": "affine"}
    )
    check(module, callback, watch)
    images = torch.randn(3, 1, 8, 8)
    written = bsdp.load(ResidualNet, callback.weights_path)
    torch.testing.assert_close(written(images), module.eval()(images), rtol=1e-4, atol=1e-5)
    assert report.summary is not None
    layers = {row["name"]: row for row in report.summary["layers"]}
    for name, pair in bsdp.named_pairs(module.network).items():
        assert (layers[name]["rank"], layers[name]["channels"]) == (pair.rank, pair.out_channels)
        assert layers[name]["kind"] in ("pair", "fused")
    stages = [entry["stage"] for entry in report.summary["rounds"]]
    assert stages[0] == "" and set(stages[1:]) <= {"basis", "channel", "basis and channel"}
    if split != "auto" and order == "channel_then_basis":
        assert stages[1] == "channel"


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"plugins": [CpuScaler()]}])
def test_mixed_precision_and_accumulation(options: dict[str, Any], tmp_path: Path) -> None:
    module = ResidualClassifier(optimizer="adamw", schedule="onecycle")
    _, callback, watch = fit(
        module, tmp_path, double=True, decomposition={"batch_norm": "all"}, accumulate_grad_batches=2, **options
    )
    check(module, callback, watch)


def test_the_probe_is_the_validation_images(tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, _ = fit(module, tmp_path, double=True, pruning={"probe_batches": 1})
    data = Stripes()
    data.setup("fit")
    torch.testing.assert_close(callback.pruner.probe(), module.eval()(data.examples.tensors[0][::2]))


class OwnBatches(BatchSampler):
    """Batches that must stay whole."""


def test_the_probe_is_from_all_over_the_loader() -> None:
    values = torch.arange(12)
    plain = DataLoader(values, 3)
    assert [batch.tolist() for batch in spread_batches(plain, 2)] == [[0, 2, 4], [6, 8, 10]]
    assert [batch.tolist() for batch in spread_batches([plain], 9)] == [batch.tolist() for batch in plain]
    whole = DataLoader(values, batch_sampler=OwnBatches(range(12), 3, False))
    assert [batch.tolist() for batch in spread_batches(whole, 2)] == [[0, 1, 2], [6, 7, 8]]
    assert [value.tolist() for value in spread_batches(DataLoader(values, None), 2)] == [0, 1]
    assert list(spread_batches("abc", 2)) == ["a", "b"]


def test_channels_are_ranked_alike_with_and_without_a_trainer() -> None:
    settings = bsdp.DoublePruningSettings(target=0.5)
    assert settings.channel_ranking == DoublePruning().settings.channel_ranking == "per_cost"


class Shifted(DataLoader[Any]):
    """Does something to every batch of its own."""

    def __iter__(self) -> Any:
        return (batch + 100 for batch in super().__iter__())


def test_the_probe_is_read_as_the_loader_reads() -> None:
    loader = Shifted(torch.arange(12), 3)
    assert [batch.tolist() for batch in spread_batches(loader, 1)] == [[100, 104, 108]]
    assert len(list(loader)) == 4  # the loader itself is left alone


def fit_alone(module: LightningModule, folder: Path) -> Any:
    """Fit without a `Watch`, which wants class scores from ``forward``."""
    callback = DoublePruning(target=0.5, rounds=2, warmup_epochs=1, tolerance=None, save_pruned=False)
    trainer = make_trainer(folder, [callback, BasisDecomposition()], limit_train_batches=2)
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    return callback


def test_bases_are_chosen_by_the_loss_unless_the_warm_up_is_too_short(tmp_path: Path) -> None:
    choices = {}
    for warmup in (1, DoublePruning().settings.warmup_epochs):
        options = {"split": 1.0, "rounds": 1, "warmup_epochs": warmup, "save_pruned": False}
        _, callback, _ = fit(ResidualClassifier(), tmp_path, double=True, pruning=options, max_epochs=3)
        settings = callback.pruner.settings
        choices[warmup] = (settings.rebase, settings.metric, callback.pruner.rebased_for)
    assert choices == {1: ("never", "activation", 0), 2: ("warmup", "kfac", 1)}


class WithInput(ResidualClassifier):
    """Returns more than one tensor, the first of which no cut changes."""

    def forward(self, images: Tensor) -> Any:
        return {"input": images.flatten(1), "logits": self.network(images)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])["logits"], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0])["logits"].argmax(1) == batch[1]).float().mean())


def test_all_outputs_are_compared(tmp_path: Path) -> None:
    callback = fit_alone(WithInput(), tmp_path)
    changes = callback.pruner.changes.values()
    assert changes and all(change > 0 for change in changes)


class WithoutForward(ResidualClassifier):
    """Calls its network in the steps."""

    forward = LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_module_without_forward(tmp_path: Path) -> None:
    callback = fit_alone(WithoutForward(), tmp_path)
    assert len(callback.record.rounds) == 3


def test_the_first_cut_may_come_before_the_first_validation(tmp_path: Path) -> None:
    options = {"check_val_every_n_epoch": 3, "max_epochs": 3, "limit_train_batches": 2}
    _, callback, _ = fit(ResidualClassifier(), tmp_path, double=True, **options)
    assert len(callback.record.rounds) == 3


class Untrainable(ResidualClassifier):
    """Says so when a step is made after all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step was made")


class TakesPairs(Untrainable):
    """Does not take what is the first tensor of a validation batch."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 48:
            raise RuntimeError("a pair is expected")
        return super().forward(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", 1.0)


def test_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Untrainable()
    with pytest.raises(ValueError, match=r"`target=0.99` is out of reach"):
        fit(module, tmp_path, double=True, pruning={"target": 0.99, "min_channels": 8})
    with pytest.raises(ValueError, match=r"`split=0.0` of `target=0.8` cannot be met"):
        fit(Untrainable(), tmp_path, double=True, pruning={"target": 0.8, "split": 0.0, "min_channels": 8})
    with pytest.raises(ValueError, match="`split: auto` compares cuts on validation images, and there is no"):
        fit(Untrainable(), tmp_path, double=True, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"found no decomposed layer: add `bsdp.callbacks.BasisDecomposition\(\)`"):
        make_trainer(tmp_path, [DoublePruning(tolerance=None)]).fit(Untrainable(), datamodule=Stripes())
    with pytest.raises(ValueError, match=r"`criterion: bn_scale` .* all of them are frozen: let them train"):
        fit(Untrainable(), tmp_path, double=True, pruning={"criterion": "bn_scale"})
    with pytest.raises(ValueError, match=r"for the first floating-point tensor of .* failed \(RuntimeError: a pair is"):
        fit(TakesPairs(), tmp_path, double=True)
    fit(ResidualClassifier(), tmp_path, double=True, pruning={"split": 0.5}, limit_val_batches=0)


def test_the_largest_target_has_one_base_and_one_channel_everywhere(tmp_path: Path) -> None:
    """Inputs, outputs and one channel each: 9 + 1 and batch norm 2, twice 9 + 2, and 4 x 4 + 4 of the head are left."""
    left = (9 + 2) * 3 + 4 * 4 + 4
    largest = 1 - left / sum(p.numel() for p in ResidualNet().parameters())
    with pytest.raises(ValueError, match=rf"Choose a target below {largest:.3f}"):
        fit(Untrainable(), tmp_path, double=True, pruning={"target": largest + 1e-4})


def test_a_budget_of_multiply_adds(tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, watch = fit(module, tmp_path, double=True, pruning={"target_kind": "macs", "order": "alternate"})
    check(module, callback, watch)
    cost = bsdp.measure_cost(bsdp.fold(module.network), torch.randn(1, 1, 8, 8))
    whole = bsdp.measure_cost(ResidualNet(), torch.randn(1, 1, 8, 8))
    assert cost.original("macs") <= 0.5 * whole.original("macs")


class Task(TransferTask):
    """Reads the images of `Stripes` as if they had colours."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("double", "format"), slow_but([(True, "pt2")], [(True, "pt2"), (True, "onnx"), (False, "onnx")])
)
def test_report_and_commands_on_a_run_folder(
    double: bool, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, report = Task("bsdp:resnet20", num_classes=4, weights="none"), PruningReport(latency_repeats=1)
    pruning: dict[str, Any] = {"criterion": "l1", "target": 0.6, "rounds": 1}
    if double:
        pruning |= {"importance": "magnitude", "order": "alternate", "split": 0.0}
    _, callback, _ = fit(task, tmp_path, report, double=double, pruning=pruning, max_epochs=2, limit_train_batches=1)
    assert isinstance(callback, DoublePruning if double else ChannelPruning)
    run = callback.checkpoint_path.parent
    summary = json.loads((run / "summary.json").read_text())
    assert (run / "pruning_curves.png").stat().st_size > 1000
    assert summary["channels_pruned"] < summary["channels_original"] and summary["latency_ms_pruned"] > 0
    assert any(row["channels"] < row["channels_original"] for row in summary["layers"])

    artifact = load_artifact(run)
    assert sum(p.numel() for p in artifact.folded.parameters()) == summary["params_pruned"]
    images = torch.randn(2, 1, 8, 8)
    expected = task.eval()(images)
    torch.testing.assert_close(artifact.folded(images.expand(-1, 3, -1, -1)), expected, rtol=1e-3, atol=1e-4)
    for words in (
        ["describe", run],
        ["benchmark", "--ckpt", run, "--repeats", "1"],
        ["export", "--ckpt", run, "--format", format, "--check"],
    ):
        assert cli.main([str(word) for word in words]) == 0, capsys.readouterr().err
    assert (run / f"model.{format}").is_file()
    assert f"{summary['params_pruned']:,}" in capsys.readouterr().out
