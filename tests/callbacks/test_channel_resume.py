"""Runs that prune channels, or bases and channels, are stopped and resumed, and end as if they never were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import bsdp
from bsdp.resume import LastCheckpoint, RunState
from bsdp.task import TransferTask
from tests.helpers.channel_runs import ResidualClassifier, Shuffled, check, fit, widths
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import make_trainer
from tests.helpers.resuming import SaveAt, Stopped, differences

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed",
        "Be aware that when using `ckpt_path`",
        "You're resuming from a checkpoint that ended before the epoch ended",
    )
]

RUNS: dict[str, dict[str, Any]] = {
    "taylor_2019": {"pruning": {"criterion": "taylor_2019"}},
    "taylor_2016": {"pruning": {"criterion": "taylor_2016", "macs_penalty": 0.001}},
    "activation_cumsum": {"pruning": {"criterion": "activation_cumsum", "theta": 0.4}},
    "channel_scaling": {"pruning": {"criterion": "channel_scaling", "l1": 0.01}},
    "transtailor": {"pruning": {"criterion": "transtailor"}},
    "random": {"pruning": {"criterion": "random"}},
    # Bases as they are: with those by the loss the first cut would be one of bases.
    "double": {
        "double": True,
        "pruning": {"probe_batches": 1, "rebase": "never"},
        "decomposition": {"batch_norm": "all"},
    },
}
FEWER = ("taylor_2019", "channel_scaling", "random", "double")  # where one of each kind will do
# Cuts are made as the epochs 2 and 3 begin.
MOMENTS: dict[str, Any] = {
    "after a cut": ("on_train_epoch_end", 2),
    "before any": ("on_train_epoch_end", 1),
    "mid-epoch": ("on_train_batch_end", 2, 1),
}


def go(folder: Path, name: str, *others: Callback, ckpt: Path | None = None, **options: Any) -> Any:
    """A run of five epochs with a warm-up of two; another seed does no harm to a resumed one."""
    torch.manual_seed(5 if ckpt is None else 6)
    settings = dict(RUNS[name])
    pruning = {"tolerance": 0.9, "warmup_epochs": 2, **settings.pop("pruning"), **options.pop("pruning", {})}
    module = ResidualClassifier(optimizer="adamw", schedule="cosine", values=options.pop("values", None))
    call = {"datamodule": Shuffled(), "ckpt_path": ckpt, "weights_only": None if ckpt is None else True}
    trainer, callback, watch = fit(
        module, folder, *others, pruning=pruning, call=call, **settings, **{"max_epochs": 5, **options}
    )
    return module, callback, trainer, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs without a stop leave, and their checkpoints of all `MOMENTS`."""
    made: dict[str, Any] = {}

    def make(name: str) -> tuple[dict[str, Any], dict[str, Path]]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            saving = [SaveAt(*moment, file=f"{key}.ckpt", go_on=True) for key, moment in MOMENTS.items()]
            module, callback, trainer, watch = go(folder, name, *saving)
            check(module, callback, watch)
            made[name] = outcome(module, callback, trainer), {key: folder / f"{key}.ckpt" for key in MOMENTS}
        return made[name]

    return make


def outcome(module: Any, callback: Any, trainer: Any) -> dict[str, Any]:
    state = callback.state_dict()
    return {
        "weights": dict(module.state_dict()),
        "structure": bsdp.structure_of(module),
        "optimizer": trainer.optimizers[0].state_dict(),
        "rounds": state["record"]["rounds"],
        "random": state["random"],
        "file": bsdp.read_metadata(callback.weights_path),
        "changes": state.get("changes"),
    }


@pytest.mark.parametrize(
    ("name", "moment"),
    slow_but(
        [*((name, "after a cut") for name in (*FEWER, "activation_cumsum"))],
        [*((name, "after a cut") for name in RUNS), ("double", "before any")],
    ),
)
def test_ends_as_if_it_never_stopped(name: str, moment: str, whole: Any, tmp_path: Path) -> None:
    expected, saved = whole(name)
    module, callback, trainer, _ = go(tmp_path, name, ckpt=saved[moment])
    assert differences(expected, outcome(module, callback, trainer)) == []


class Look(Callback):
    """Takes what the trainer has as the training starts."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pruner = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner
        self.pruner = pruner.state_dict()
        self.weights = {key: value.clone() for key, value in pl_module.state_dict().items()}
        self.structure = bsdp.structure_of(pl_module)
        self.fits = all(
            value.shape == parameter.shape
            for parameter, state in trainer.optimizers[0].state.items()
            for value in state.values()
            if value.dim() > 0
        )


@pytest.mark.parametrize("name", FEWER)
def test_everything_is_restored_in_mid_epoch(name: str, whole: Any, tmp_path: Path) -> None:
    _, checkpoints = whole(name)
    saved = torch.load(checkpoints["mid-epoch"], weights_only=True)
    look = Look()
    go(tmp_path, name, look, ckpt=checkpoints["mid-epoch"])
    state = saved["callbacks"]["DoublePruning" if name == "double" else "ChannelPruning"]
    assert differences({key: state[key] for key in look.pruner}, look.pruner) == []
    assert differences(dict(saved["state_dict"]), look.weights) == []
    assert look.structure == saved["bsdp"] and "widths" in saved["bsdp"] and look.fits


@pytest.mark.parametrize("name", slow_but(["double"], ["taylor_2019", "double"]))
def test_a_better_checkpoint_from_before_further_cuts_can_be_tested(name: str, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path / "kept", monitor="steered", mode="max", filename="best")
    values = [0.5, 0.6, 0.9, 0.7, 0.8]  # the best epoch is that of the first cut
    module, callback, trainer, _ = go(tmp_path, name, keeper, values=values, enable_checkpointing=True)
    small = sum(p.numel() for p in bsdp.fold(module.network).parameters())
    loaded = trainer.test(module, datamodule=Shuffled(), ckpt_path="best", verbose=False, weights_only=True)
    first = callback.record.rounds[1]
    assert sum(p.numel() for p in bsdp.fold(module.network).parameters()) == first.params > small
    assert 0 <= loaded[0]["test_accuracy"] <= 1
    fresh = make_trainer(tmp_path, []).test  # no callback that could tell the widths
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        fresh(ResidualClassifier(), datamodule=Shuffled(), ckpt_path=tmp_path / "kept" / "best.ckpt", verbose=False)


class Task(TransferTask):
    """Reads the images of `Stripes` as if they had colours."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("double", slow_but([True], [False, True]))
def test_task_from_a_checkpoint_without_callbacks(double: bool, tmp_path: Path) -> None:
    task = Task("bsdp:resnet20", num_classes=4, weights="none")
    keeper = ModelCheckpoint(tmp_path / "kept", save_weights_only=True, filename="last")
    pruning = {"criterion": "l1", "target": 0.7} | ({"importance": "magnitude"} if double else {})
    options: dict[str, Any] = {"enable_checkpointing": True, "max_epochs": 3, "limit_train_batches": 1}
    _, callback, _ = fit(task, tmp_path, keeper, double=double, pruning=pruning, **options)
    images = torch.randn(2, 1, 8, 8)
    expected = task.eval()(images)
    for path in (callback.checkpoint_path, tmp_path / "kept" / "last.ckpt"):
        loaded = Task.load_from_checkpoint(path)
        torch.testing.assert_close(loaded.eval()(images), expected)
        assert bsdp.structure_of(loaded) == bsdp.structure_of(task)
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
            Task("bsdp:resnet20", num_classes=4, weights="none").load_state_dict(torch.load(path)["state_dict"])


@pytest.mark.filterwarnings("ignore:training ended after 1 of 2 pruning rounds")
def test_early_stopping_stays(tmp_path: Path) -> None:
    def parts() -> list[Callback]:
        return [EarlyStopping("steered", mode="max", patience=3), RunState(), LastCheckpoint()]

    options: dict[str, Any] = {"values": [0.9, 0.8, 0.8, 0.8, 0.8], "enable_checkpointing": True}
    pruning = {"rounds": 2, "warmup_epochs": 3, "tolerance": None}
    with pytest.raises(Stopped):
        go(tmp_path, "taylor_2019", *parts(), SaveAt("on_train_end", 4), pruning=pruning, **options)
    (last,) = tmp_path.rglob("last.ckpt")
    _, callback, trainer, _ = go(tmp_path, "taylor_2019", *parts(), ckpt=last, pruning=pruning, **options)
    assert trainer.global_step == 24 and callback.checkpoint_path.is_file()


@pytest.mark.parametrize("name", slow_but(["taylor_2019", "double"], FEWER))
def test_epochs_that_are_added_train_the_final_structure(name: str, tmp_path: Path) -> None:
    pruning = {"rounds": None}
    first, before, _, _ = go(tmp_path, name, LastCheckpoint(), pruning=pruning, enable_checkpointing=True)
    (last,) = tmp_path.rglob("last.ckpt")
    options: dict[str, Any] = {"pruning": pruning, "enable_checkpointing": True, "max_epochs": 6}
    module, callback, trainer, _ = go(tmp_path, name, LastCheckpoint(), ckpt=last, **options)
    assert trainer.global_step == 36 and widths(module) == widths(first)
    assert bsdp.structure_of(module) == bsdp.structure_of(first)
    assert [r.channels for r in callback.record.rounds] == [r.channels for r in before.record.rounds]
