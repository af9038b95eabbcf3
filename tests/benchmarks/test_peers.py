"""Peers really get to their size, train on, and report what they are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks._peer_runs import Peer, parameters
from benchmarks._peers import LightningModelPruning, TorchPruning, renew
from benchmarks._runs import pruned_values, read_csv
from bsdp.datamodules import DigitsDataModule
from bsdp.task import TransferTask
from tests.helpers.marks import slow_but

pytest.importorskip("torch_pruning")


def fit(
    folder: Path, callback: Peer, *, epochs: int = 4, backbone: str = "bsdp:resnet20"
) -> tuple[Trainer, TransferTask]:
    """Train on a few digits of 8 pixels; the run folder is ``folder/run``."""
    module = TransferTask(backbone, 10, weights="none", channels_last=True)
    data = DigitsDataModule(image_size=8, batch_size=32, samples_per_class=8, val_fraction=0.3)
    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name="", version="run"),
        callbacks=[callback],
        enable_checkpointing=False,
        limit_val_batches=2,
        limit_test_batches=2,
        **options,
    )
    trainer.fit(module, datamodule=data)
    return trainer, module


def validations(folder: Path) -> list[float]:
    """Validation accuracy by epoch."""
    rows = read_csv(folder / "run" / "metrics.csv")
    return [float(row["val_accuracy"]) for row in rows if row.get("val_accuracy")]


@pytest.mark.parametrize("importance", slow_but(["taylor", "l1"], ["taylor", "l1", "fpgm"]))
def test_torch_pruning_gets_to_the_size_and_trains_what_is_left(importance: Any, tmp_path: Path) -> None:
    callback = TorchPruning(importance=importance, target=0.6, rounds=2, warmup_epochs=1, steps=80)
    trainer, module = fit(tmp_path, callback)
    row = pruned_values(tmp_path / "run")
    assert 0.33 < row["params_ratio"] <= 0.4
    assert row["params_ratio"] == parameters(module) / parameters(callback.original)
    assert 0.0 < row["macs_ratio"] < 1.0
    assert row["latency_ratio"] > 0.0
    assert 0.0 <= row["accuracy"] <= 1.0 and 0.0 <= row["accuracy_reference"] <= 1.0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [entry["epoch"] for entry in summary["rounds"]] == [1, 2]
    assert summary["rounds"][0]["params_kept"] <= 0.475  # cubic: seven eighths of 0.6 in the first of two
    seen = validations(tmp_path)
    assert row["validation_reference"] == pytest.approx(seen[0])
    assert row["validation"] == pytest.approx(max(seen[2:]))  # the best epoch of the final structure
    (optimizer,) = trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert all(p in optimizer.state for p in module.parameters())  # every one of them has been stepped since


def test_what_torch_pruning_does_not_follow_is_refused_until_the_layers_are_ignored(tmp_path: Path) -> None:
    plain = TorchPruning(target=0.5, rounds=1, steps=20)
    with pytest.raises(ValueError, match=r"torch-pruning does not follow bsdp:resnet20_pad: .*`ignored`"):
        fit(tmp_path / "a", plain, backbone="bsdp:resnet20_pad")
    ignoring = TorchPruning(target=0.5, rounds=1, steps=20, ignored=["conv1", "layer*.conv2"])
    _, module = fit(tmp_path / "b", ignoring, epochs=2, backbone="bsdp:resnet20_pad")
    assert pruned_values(tmp_path / "b" / "run")["params_ratio"] <= 0.5
    streams = [m.out_channels for name, m in module.network.named_modules() if name.endswith(".conv2")]
    assert cast(nn.Conv2d, module.network.conv1).out_channels == 16
    assert streams == [16] * 3 + [32] * 3 + [64] * 3


def test_rounds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`rounds`: 3 x `epochs_per_round=1` .* do not fit into 3 epochs"):
        fit(tmp_path, TorchPruning(rounds=3, warmup_epochs=1), epochs=3)


def test_taylor_gradients_are_those_of_the_sum_over_the_batches() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(12, 5), torch.randint(3, (12,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    layer, callback = nn.Linear(5, 3), TorchPruning(score_batches=2)
    trainer = SimpleNamespace(train_dataloader=loader, strategy=SimpleNamespace(batch_to_device=lambda batch: batch))
    callback._accumulate_gradients(cast(Trainer, trainer), cast(Any, layer))
    assert layer.weight.grad is not None
    loss = sum(F.cross_entropy(layer(images[i : i + 4]), labels[i : i + 4]) for i in (0, 4))
    (expected,) = torch.autograd.grad(cast(torch.Tensor, loss), layer.weight)
    assert torch.allclose(layer.weight.grad, expected, atol=1e-6)


def test_a_renewed_optimizer_holds_the_new_parameters_in_the_old_groups_without_momentum() -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    names = {id(p): name for name, p in layer.named_parameters()}
    layer.weight = nn.Parameter(layer.weight[:2])
    layer.bias = nn.Parameter(layer.bias[:2])
    renew(optimizer, names, dict(layer.named_parameters()))
    assert all(group["params"][0] is p for group, p in zip(optimizer.param_groups, layer.parameters(), strict=True))
    assert not optimizer.state
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_model_pruning_leaves_zeros_and_its_row_says_that_nothing_got_smaller(tmp_path: Path) -> None:
    _, module = fit(tmp_path, LightningModelPruning(target=0.6, rounds=2, warmup_epochs=1))
    row = pruned_values(tmp_path / "run")
    assert (row["params_ratio"], row["macs_ratio"]) == (1.0, 1.0)
    assert row["nonzero_ratio"] == pytest.approx(0.4, abs=0.002)
    zeros = sum(int((p == 0).sum()) for p in module.network.parameters())
    assert row["nonzero_ratio"] == pytest.approx(1.0 - zeros / parameters(module.network))
    assert not any(name.endswith(("_mask", "_orig")) for name in module.state_dict())
    seen = validations(tmp_path)
    assert row["validation"] == pytest.approx(max(seen[2:]))
    assert row["validation_reference"] == pytest.approx(seen[0])


def test_more_zeros_than_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`target`: only 9\d\.\d% of the parameters can be masked"):
        fit(tmp_path, LightningModelPruning(target=0.9999, rounds=1), epochs=2)
