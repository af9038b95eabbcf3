"""`TransferTask` in a real trainer: what it logs, what it trains at which rate, what its checkpoints hold."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.cifar_nets import CifarResNet
from bsdp.structure import structure_of
from bsdp.task import TransferTask
from bsdp.training import cosine_factor, onecycle_factor

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class TinyData(LightningDataModule):
    """Random images; `classes` is what it claims, `labels` what it holds."""

    def __init__(self, classes: int | None = 3, *, labels: int = 3) -> None:
        super().__init__()
        if classes is not None:
            self.num_classes = classes
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(12, 3, 8, 8, generator=generator)
        self.data = TensorDataset(images, torch.arange(12) % labels)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def task(**kwargs: Any) -> TransferTask:
    return TransferTask(**{"backbone": "bsdp:resnet20", "num_classes": 3, "weights": "none", **kwargs})


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=folder, **{**defaults, **kwargs})


def groups(model: TransferTask) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in model.parameter_groups()}


def test_logged_keys_and_values(tmp_path: Path) -> None:
    model, data = task(), TinyData()
    run = trainer(tmp_path)
    run.fit(model, data)
    assert set(run.logged_metrics) == {"train_loss", "val_loss", "val_accuracy"}

    images, labels = data.data.tensors
    with torch.no_grad():
        logits = model.eval()(images)
    (tested,) = run.test(model, data, verbose=False)
    assert set(tested) == {"test_loss", "test_accuracy"}
    assert tested["test_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert tested["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_training_moves_every_parameter_and_lowers_the_loss(tmp_path: Path) -> None:
    model, data = task(optimizer=lambda p: torch.optim.Adam(p, lr=0.01), lr_scheduler="constant"), TinyData()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = F.cross_entropy(model.eval()(data.data.tensors[0]), data.data.tensors[1]).item()
    run = trainer(tmp_path, max_epochs=8)
    run.fit(model.train(), data)

    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    assert run.callback_metrics["train_loss"] < loss


def test_only_the_network_has_parameters() -> None:
    names = [name for name, child in task().named_children() if list(child.parameters())]
    assert names == ["network"]


def test_predictions_are_probabilities_and_labels(tmp_path: Path) -> None:
    model = task()
    batches = trainer(tmp_path).predict(model, TinyData())
    assert batches is not None
    for batch in batches:
        assert batch["probabilities"].sum(1) == pytest.approx(torch.ones(4))
        assert torch.equal(batch["labels"], batch["probabilities"].argmax(1))
    assert model.eval().predict_step(torch.zeros(2, 3, 8, 8), 0)["labels"].shape == (2,)


def test_label_smoothing_is_for_training_only() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    model = task(label_smoothing=0.3).eval()
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = model.training_step((images, labels), 0)

    soft = 0.7 * F.one_hot(labels, 3) + 0.1
    assert loss.item() == pytest.approx(-(soft * model(images).log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = task()
    bsdp.decompose(model.network)
    model.network.get_submodule("bn1").requires_grad_(False)
    held = [p for group in model.parameter_groups() for p in group["params"]]

    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    assert list(groups(model)) == ["backbone_no_decay", "head", "head_no_decay", "scales"]


def test_decay_and_rates_of_the_groups() -> None:
    model = task(head_lr=0.5, scale_lr=0.02)
    pairs = bsdp.decompose(model.network, include=["layer1.*"]).replaced
    found = groups(model)

    assert {name: group.get("lr") for name, group in found.items()} == {
        "backbone": None,
        "backbone_no_decay": None,
        "head": 0.5,
        "head_no_decay": 0.5,
        "scales": 0.02,
    }
    assert {name for name, group in found.items() if group.get("weight_decay") == 0.0} == {
        "backbone_no_decay",
        "head_no_decay",
        "scales",
    }
    assert len(found["scales"]["params"]) == len(pairs) == 6
    assert {p.ndim for p in found["backbone"]["params"]} == {4}
    assert [p.shape for p in found["head"]["params"]] == [(3, 64)]


def test_rates_reach_the_optimizer(tmp_path: Path) -> None:
    model = task(
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3), head_lr=0.7, lr_scheduler="constant"
    )
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, TinyData())

    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in run.optimizers[0].param_groups}
    assert found == {
        "backbone": (0.1, 0.3),
        "backbone_no_decay": (0.1, 0.0),
        "head": (0.7, 0.3),
        "head_no_decay": (0.7, 0.0),
    }


def test_nothing_trainable_is_refused() -> None:
    model = task()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        model.parameter_groups()


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_named_schedules_stretch_over_the_whole_training(tmp_path: Path, schedule: str) -> None:
    model = task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=schedule, head_lr=0.2)
    rates: list[tuple[float, float]] = []

    def step(optimizer: Any, *_: Any, **__: Any) -> None:
        by_name = {group["name"]: group["lr"] for group in optimizer.param_groups}
        rates.append((by_name["backbone"], by_name["head"]))

    model.on_before_optimizer_step = step  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=4, limit_val_batches=0).fit(model, TinyData())

    assert len(rates) == 12
    assert max(rate for rate, _ in rates) == pytest.approx(0.1, rel=0.01)
    assert rates[-1][0] < 0.01
    assert all(head == pytest.approx(2 * rate) for rate, head in rates)
    assert rates.index(max(rates)) == (0 if schedule == "cosine" else 3)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_named_schedules_start_anew_at_an_epoch(tmp_path: Path, schedule: str) -> None:
    rates: list[float] = []

    def step(optimizer: Any, *_: Any, **__: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    def run(epochs: int, **options: Any) -> list[float]:
        model = task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_scheduler=schedule, **options)
        model.on_before_optimizer_step = step  # type: ignore[method-assign]
        rates.clear()
        trainer(tmp_path, max_epochs=epochs, limit_val_batches=0).fit(model, TinyData())
        return list(rates)

    assert run(6, lr_restart_epoch=2) == pytest.approx(run(2) + run(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_restart_epoch": 0}, "`lr_restart_epoch` must be .*1"),
        ({"lr_restart_epoch": 2, "lr_scheduler": "constant"}, "`lr_restart_epoch=2` goes with `lr_scheduler` 'cosine'"),
    ],
)
def test_restarts_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options)


def test_restart_after_the_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`lr_restart_epoch=3` must be below `max_epochs` of the trainer, 3"):
        trainer(tmp_path, max_epochs=3).fit(task(lr_restart_epoch=3), TinyData())


def test_cosine_factor_rises_falls_and_stays_at_zero() -> None:
    factors = [cosine_factor(step, total=100, warmup=0.1) for step in range(130)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:100] == sorted(factors[10:100], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100:] == [0.0] * 30
    assert cosine_factor(0, total=1) == 1.0


@pytest.mark.parametrize("total", [1, 3, 10, 47])
def test_onecycle_factor_is_that_of_the_scheduler(total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, cycle_momentum=False)
    for step in range(total):
        assert onecycle_factor(step, total=total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    assert onecycle_factor(2 * total, total=total) == pytest.approx(4e-6)


def test_scheduler_classes_step_as_told(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    for interval, steps in (("epoch", 2), ("step", 6)):
        model = task(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), lr_scheduler=schedule, lr_interval=interval)
        run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
        run.fit(model, TinyData())
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**steps)


def test_plateau_scheduler_watches_the_validation_loss(tmp_path: Path) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)

    model = task(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), lr_scheduler=schedule)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, TinyData())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)  # two losses, none counts as better


def test_endless_training_needs_a_constant_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=-1, max_time="00:00:00:01")
    with pytest.raises(ValueError, match=r"`lr_scheduler: cosine` stretches.*`trainer.max_epochs`"):
        run.fit(task(), TinyData())


def test_learning_rate_monitor_names_the_groups(tmp_path: Path) -> None:
    run = trainer(tmp_path, logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor("step")], log_every_n_steps=1)
    run.fit(task(), TinyData())
    assert {key for key in run.callback_metrics if key.startswith("lr")} == {
        f"lr-SGD/{name}" for name in ("backbone", "backbone_no_decay", "head", "head_no_decay")
    }


def test_wrong_number_of_classes_is_refused_before_training(tmp_path: Path) -> None:
    model = task(num_classes=5)
    steps: list[int] = []
    model.training_step = lambda *args: steps.append(1)  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ValueError, match=r"`num_classes` is 5, but TinyData has 3 classes"):
        trainer(tmp_path).fit(model, TinyData())
    assert steps == []


def test_labels_beyond_the_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`num_classes` is 3, but a batch has the label 3: labels must be in 0..2"):
        trainer(tmp_path).fit(task(), TinyData(None, labels=5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"lr_scheduler": "cosin"}, "`lr_scheduler` must be 'constant', 'cosine', 'onecycle' or a scheduler class"),
        ({"head_lr": 0.0}, "`head_lr` must be above 0"),
        ({"scale_lr": -1.0}, "`scale_lr` must be above 0"),
        ({"num_classes": 1}, "`num_classes` must be at least 2"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\)"),
        ({"backbone": "bsdp:resnet21"}, "`backbone`: unknown"),
    ],
)
def test_refusals(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        task(**arguments)


def test_channels_last_changes_the_layout_only() -> None:
    torch.manual_seed(1)
    plain = task().eval()
    torch.manual_seed(1)
    last = task(channels_last=True).eval()
    images = torch.randn(2, 3, 8, 8)

    assert last.network.get_submodule("conv1").weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]
    assert torch.allclose(plain(images), last(images), atol=1e-5)


def fitted(folder: Path, model: TransferTask) -> tuple[Path, Tensor, Tensor]:
    """Train for an epoch and save; gives the file, some images and their class scores."""
    run = trainer(folder)
    run.fit(model, TinyData())
    run.save_checkpoint(folder / "task.ckpt")
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        return folder / "task.ckpt", images, model.eval()(images)


def test_checkpoint_loads_without_the_pretrained_file(tmp_path: Path) -> None:
    weights = tmp_path / "pretrained.pth"
    torch.save(CifarResNet(3).state_dict(), weights)
    path, images, expected = fitted(
        tmp_path, task(weights=str(weights), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    )
    weights.unlink()
    loaded = TransferTask.load_from_checkpoint(path)

    assert torch.equal(loaded.eval()(images), expected)
    assert (loaded.num_classes, loaded.hparams["weights"]) == (3, str(weights))
    with pytest.raises(FileNotFoundError, match=r"pretrained\.pth"):
        task(weights=str(weights))


def test_checkpoints_tell_of_the_images(tmp_path: Path) -> None:
    for image_shape, names in ((None, None), ((3, 8, 8), None), ((3, 8, 8), ["a", "b", "c"])):
        data = TinyData()
        if image_shape is not None:
            data.image_shape = image_shape
        if names is not None:
            data.class_names = names
        run = trainer(tmp_path, max_epochs=0)
        run.fit(task(), data)
        run.save_checkpoint(tmp_path / "x.ckpt")
        images = torch.load(tmp_path / "x.ckpt", weights_only=True).get("bsdp_images")
        assert images == (None if image_shape is None else {"shape": list(image_shape), "class_names": names})


def test_checkpoint_with_weights_only_still_tells_the_structure(tmp_path: Path) -> None:
    module = task()
    bsdp.decompose(module.network, include=["layer1*"])
    for pair in bsdp.named_pairs(module).values():
        pair.keep(torch.arange(2))
    run = trainer(tmp_path, max_epochs=0)
    run.fit(module, TinyData())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)  # what `save_weights_only` of a keeper does
    loaded = TransferTask.load_from_checkpoint(tmp_path / "weights.ckpt")
    assert {pair.rank for pair in bsdp.named_pairs(loaded).values()} == {2}
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_checkpoint_keeps_what_the_weight_file_told(tmp_path: Path) -> None:
    known = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    weights = bsdp.save(CifarResNet(3, num_classes=3), tmp_path / "net.safetensors", metadata=known)
    path, _, _ = fitted(tmp_path, task(weights=str(weights), num_classes=None))
    weights.unlink()
    loaded = TransferTask.load_from_checkpoint(path)

    assert (loaded.normalization, loaded.num_classes) == (known, 3)


def test_hyperparameters_are_plain(tmp_path: Path) -> None:
    path, _, _ = fitted(tmp_path, task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))
    saved = torch.load(path, weights_only=True)["hyper_parameters"]
    assert saved == {
        "backbone": "bsdp:resnet20",
        "num_classes": 3,
        "weights": "none",
        "head": "original",
        "lr_scheduler": "cosine",
        "lr_interval": "epoch",
        "lr_restart_epoch": None,
        "head_lr": None,
        "scale_lr": None,
        "label_smoothing": 0.0,
        "channels_last": False,
        "normalization": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
    }


def test_structure_of_a_pruned_checkpoint_is_rebuilt(tmp_path: Path) -> None:
    model = task()
    bsdp.decompose(model.network)
    for pair in bsdp.named_pairs(model.network).values():
        pair.keep(torch.arange(max(1, pair.rank // 3)))
    model.on_save_checkpoint = lambda checkpoint: checkpoint.update(bsdp=structure_of(model))  # type: ignore[method-assign]
    path, images, expected = fitted(tmp_path, model)
    loaded = TransferTask.load_from_checkpoint(path)

    assert structure_of(loaded) == structure_of(model)
    assert torch.equal(loaded.eval()(images), expected)
    (tested,) = trainer(tmp_path).test(task(), TinyData(), ckpt_path=str(path), verbose=False, weights_only=True)
    (direct,) = trainer(tmp_path).test(loaded, TinyData(), verbose=False)
    assert tested == direct


def test_default_optimizer_is_sgd_with_decay() -> None:
    build: Callable[..., torch.optim.Optimizer] = task().optimizer
    optimizer = build([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["weight_decay"] == 5e-4 and not math.isnan(optimizer.defaults["lr"])


def test_nothing_is_read_from_the_network_when_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images, expected = fitted(tmp_path, task(backbone="torchvision:mobilenet_v3_small"))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["weights"] = "default"
    torch.save(checkpoint, path)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(TransferTask.load_from_checkpoint(path).eval()(images), expected)
