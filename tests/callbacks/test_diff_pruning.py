"""`DiffPruning` in real fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import bsdp
from bsdp.callbacks import BasisDecomposition, DiffPruning, PruningReport
from bsdp.diff_pruning import expected_l0, size_of
from bsdp.task import TransferTask
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer
from tests.helpers.resuming import StopAt, Stopped, differences


class Net(Classifier):
    """Has a batch norm and momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].insert(1, nn.BatchNorm2d(16))  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)]


def pruning(**options: Any) -> DiffPruning:
    return DiffPruning(**{"density": 0.1, "gate_epochs": 2, "penalty": 1e-3, **options})


def fit(folder: Path, module: Any, *callbacks: Any, resume: Path | None = None, **options: Any) -> Trainer:
    trainer = make_trainer(folder, list(callbacks), **{"max_epochs": 4, **options})
    trainer.fit(module, datamodule=Stripes(), ckpt_path=resume)
    return trainer


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


def test_a_fit_leaves_a_small_file_that_gives_the_trained_model(tmp_path: Path) -> None:
    module, plain, callback, report = net(), net().eval(), pruning(), PruningReport(latency_repeats=0)
    fit(tmp_path, module, callback, report)
    images = torch.randn(2, 1, 8, 8)
    assert callback.delta_path is not None
    before = plain.network(images)
    with bsdp.load_delta(plain.network, callback.delta_path) as applied:
        assert applied.entries == round(0.1 * size_of(bsdp.named_deltas(module)))
        assert torch.equal(plain.network(images), module.eval().network(images))
        assert not torch.equal(plain.network(images), before)
    folder = callback.delta_path.parent
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["params_kept"] == summary["macs_kept"] == 1.0
    assert summary["delta_kept"] == pytest.approx(0.1, abs=1e-3)
    assert summary["delta_file_bytes"] == callback.delta_path.stat().st_size
    assert summary["file_bytes_pruned"] == summary["file_bytes_original"]
    assert summary["accuracy_pruned"] is not None and summary["accuracy_reference"] is not None
    loaded = bsdp.load(net().network, folder / "pruned.safetensors")
    assert torch.equal(loaded(images), module.network(images))


def test_the_backbone_stays_and_the_gates_close(tmp_path: Path) -> None:
    module, callback = net(), pruning(penalty=1.0, gate_epochs=3, alpha_lr=1.0)
    before = {name: value.clone() for name, value in module.state_dict().items() if "3." not in name}
    spied: list[float] = []

    class Spy(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            spied.append(float(expected_l0(bsdp.named_deltas(module)).detach()))

    fit(tmp_path, module, callback, Spy())
    assert spied[8] < 0.9 * spied[0] < 0.9 * size_of(bsdp.named_deltas(module))
    bsdp.detach_deltas(module)
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name
    assert not any(p.requires_grad for n, p in module.named_parameters() if "network.0" in n)


def test_the_gradient_of_the_alphas_is_that_of_loss_plus_penalty(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Whole(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            deltas = bsdp.named_deltas(self)
            alpha = next(iter(deltas.values())).alpha
            if alpha is None:
                return loss
            (self.wanted,) = torch.autograd.grad(loss + 0.3 * expected_l0(deltas), alpha, retain_graph=True)
            return loss

    class Spying(DiffPruning):
        def _zero_alphas(self) -> None:
            alpha = self._alphas()[0] if self._alphas() else None
            if alpha is not None and alpha.grad is not None:
                seen.append((alpha.grad.clone(), module.wanted))
            super()._zero_alphas()

    module = Whole()
    fit(tmp_path, module, Spying(penalty=0.3, gate_epochs=1, save_pruned=False), max_epochs=2)
    assert len(seen) == 3
    for actual, wanted in seen:
        torch.testing.assert_close(actual, wanted)
        assert actual.abs().sum() > 0


def test_alphas_are_in_no_group_of_the_users_optimizer(tmp_path: Path) -> None:
    module, callback = net(), pruning(save_pruned=False)

    class Spy(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            deltas = bsdp.named_deltas(pl_module).values()
            assert all(id(d.value) in held and not held & {id(a) for a in d.alphas()} for d in deltas)
            assert {id(p) for p in pl_module.network[3].parameters()} <= held

    fit(tmp_path, module, callback, Spy(), max_epochs=3)


def state_of(module: Any, callback: DiffPruning) -> dict[str, Any]:
    return {"weights": module.state_dict(), "callback": callback.state_dict()}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize(
    ("epoch", "batch"), slow_but([(1, 1), (2, 0), (3, 0)], [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])
)
def test_a_stopped_run_ends_as_if_it_had_not_stopped(tmp_path: Path, epoch: int, batch: int) -> None:
    whole, callback = net(), pruning()
    fit(tmp_path / "whole", whole, callback)
    when: dict[str, Any] = {"every_n_train_steps": 1} if batch else {"save_on_train_epoch_end": True}
    saver = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, **when)
    with pytest.raises(Stopped):
        fit(
            tmp_path / "a",
            net(),
            pruning(),
            saver,
            StopAt("on_train_batch_start", epoch, batch),
            enable_checkpointing=True,
        )
    last = max(tmp_path.glob("steps/step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    torch.load(last, weights_only=True)
    module, resumed = net(), pruning()
    fit(tmp_path / "b", module, resumed, resume=last)
    wanted, actual = state_of(whole, callback), state_of(module, resumed)
    if batch:  # what Lightning loses in the middle of an epoch: its data order
        assert wanted["weights"].keys() == actual["weights"].keys()
        assert len(resumed.record.rounds) == 2
        return
    assert differences(wanted["weights"], actual["weights"]) == []
    assert torch.equal(wanted["callback"]["generator"], actual["callback"]["generator"])


def test_a_task_is_rebuilt_from_its_checkpoint(tmp_path: Path) -> None:
    class Digits(Stripes):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            images, labels = self.examples.tensors
            self.examples = torch.utils.data.TensorDataset(images[:8].expand(-1, 3, -1, -1), labels[:8])

    task = TransferTask("bsdp:resnet20", 4, weights="none", lr_scheduler="constant")
    callback = DiffPruning(density=0.01, gate_epochs=1)
    trainer = make_trainer(tmp_path, [callback], max_epochs=2)
    trainer.fit(task, datamodule=Digits())
    assert callback.checkpoint_path is not None
    loaded = TransferTask.load_from_checkpoint(callback.checkpoint_path, map_location="cpu")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(images), task.eval()(images))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    again = TransferTask.load_from_checkpoint(tmp_path / "weights.ckpt", map_location="cpu")
    assert torch.equal(again.eval()(images), task(images))
    tester = make_trainer(tmp_path, [DiffPruning()])
    fresh = TransferTask("bsdp:resnet20", 4, weights="none")
    tester.validate(fresh, datamodule=Digits(), ckpt_path=callback.checkpoint_path, verbose=False)
    assert torch.equal(fresh.eval()(images), task(images))


def test_the_next_fit_starts_from_the_backbone(tmp_path: Path) -> None:
    module, callback = net(), pruning(save_pruned=False)
    for folder in ("a", "b"):
        fit(tmp_path / folder, module, callback, max_epochs=3)
        assert len(callback.record.rounds) == 2
        assert expected_l0(bsdp.named_deltas(module)) == round(0.1 * size_of(bsdp.named_deltas(module)))


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for match, options in (
        ("`density`", {"density": 1.0}),
        ("`gate_epochs`", {"gate_epochs": 0}),
        ("`penalty`", {"penalty": -1.0}),
        ("`alpha_lr`", {"alpha_lr": -0.1}),
        ("`low`", {"low": 0.0}),
        ("`mode`", {"mode": "maximum"}),
    ):
        with pytest.raises(ValueError, match=match):
            DiffPruning(**options)  # type: ignore[arg-type]
    for match, callbacks in (
        ("`gate_epochs=4` leaves no epoch", [pruning(gate_epochs=4)]),
        ("is decomposed", [BasisDecomposition(), pruning()]),
        ("`head='tail'` is no module", [pruning(head="tail")]),
        ("`exclude`", [pruning(exclude=["nothing"])]),
    ):
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, net(), *callbacks)


def test_a_fit_that_ends_before_the_projection_writes_no_file(tmp_path: Path) -> None:
    callback = pruning()
    with pytest.warns(UserWarning, match="before the projection"):
        fit(tmp_path, net(), callback, StopEarly())
    assert callback.delta_path is None and callback.record.chosen is None


class StopEarly(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = True
