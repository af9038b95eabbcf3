"""`IterativeBasisPruning` in real, tiny runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer, small_network

LAYERS = ("0.0", "0.2")


class Steered(Classifier):
    """Logs the given values as ``val_accuracy``, one per epoch."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", self.values[min(self.current_epoch, len(self.values) - 1)])


def fit(
    module: LightningModule, pruning: IterativeBasisPruning, folder: Path, *others: Callback, **options: Any
) -> Trainer:
    trainer = make_trainer(folder, [pruning, BasisDecomposition(), *others], **{"max_epochs": 5, **options})
    trainer.fit(module, datamodule=Stripes())
    return trainer


def ranks(module: LightningModule) -> list[int]:
    return [pair.rank for pair in bsdp.named_pairs(module).values()]


def rows(trainer: Trainer) -> list[dict[str, str]]:
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


BUDGETS = [(kind, schedule) for kind in ("params", "macs", "bases") for schedule in ("geometric", "cubic", "constant")]


@pytest.mark.parametrize(("kind", "schedule"), slow_but(BUDGETS[::2], BUDGETS))
def test_budget_is_met_after_the_last_round(tmp_path: Path, kind: Any, schedule: Any) -> None:
    module = Classifier()
    pruning = IterativeBasisPruning(
        warmup_epochs=1, target=0.6, target_kind=kind, rounds=3, schedule=schedule, tolerance=None
    )
    fit(module, pruning, tmp_path, max_epochs=4)
    record = pruning.record
    kept = [record.kept(r, kind) for r in record.rounds]
    expected = [bsdp.kept_share(i, rounds=3, target=0.6, schedule=schedule) for i in range(4)]
    assert [r.epoch for r in record.rounds] == [0, 1, 2, 3]
    for share, bound in zip(kept, expected, strict=True):
        assert share is not None
        assert bound - 0.1 < share <= bound
    # the record's numbers are those of the folded network
    folded = bsdp.fold(module.network)
    assert record.rounds[-1].params == sum(p.numel() for p in folded.parameters())


def test_rounds_fill_the_epochs(tmp_path: Path) -> None:
    pruning = IterativeBasisPruning(target=0.5, tolerance=None, warmup_epochs=2, epochs_per_round=2)
    fit(Classifier(), pruning, tmp_path, max_epochs=7)
    assert [r.epoch for r in pruning.record.rounds] == [0, 2, 4]


def test_learning_goes_on_and_momentum_is_kept(tmp_path: Path) -> None:
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.AdamW(  # type: ignore[method-assign]
        [{"params": [p for p in module.parameters() if p.requires_grad], "name": "all"}], lr=0.01
    )
    seen: list[dict[str, Any]] = []

    class Watch(Callback):
        """Runs after the pruning callback of the same hook."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            optimizer = trainer.optimizers[0]
            held = {id(p) for g in optimizer.param_groups for p in g["params"]}
            pairs = bsdp.named_pairs(pl_module)
            seen.append(
                {
                    "held": all(id(p.scaling.delta) in held for p in pairs.values()),
                    "delta": {n: p.scaling.delta.detach().clone() for n, p in pairs.items()},
                    "state": {n: optimizer.state.get(p.scaling.delta, {}) for n, p in pairs.items()},
                    "average": {
                        n: optimizer.state[p.scaling.delta]["exp_avg"].clone()
                        for n, p in pairs.items()
                        if p.scaling.delta in optimizer.state
                    },
                }
            )

    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=None)
    fit(module, pruning, tmp_path, Watch(), max_epochs=3)
    assert all(s["held"] for s in seen)
    for epoch in (1, 2):  # right after a cut: momentum of the survivors is there, in the new size
        for name, average in seen[epoch]["average"].items():
            assert average.shape == seen[epoch]["delta"][name].shape
            assert average.any()
    for name, pair in bsdp.named_pairs(module).items():  # and the last epoch moved what is left
        assert pair.scaling.delta.shape == seen[2]["delta"][name].shape
        assert not torch.equal(pair.scaling.delta, seen[2]["delta"][name])


def test_smallest_tolerated_model_is_left_even_when_later_ones_fail(tmp_path: Path) -> None:
    # epoch 0 warms up, rounds at epochs 1 to 4: good, good, bad, and never run
    module = Steered([0.9, 0.895, 0.8901, 0.5, 0.95])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.7, rounds=4, tolerance=0.01)
    trainer = fit(module, pruning, tmp_path, max_epochs=5)
    record = pruning.record
    assert trainer.current_epoch == 4  # stopped after the first failed round
    assert record.chosen == 2
    assert ranks(module) == list(record.rounds[2].ranks.values())
    assert ranks(module) != list(record.rounds[3].ranks.values())
    saved = bsdp.load(small_network, Path(str(trainer.log_dir)) / "pruned.safetensors")
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(saved(images), module.eval()(images), rtol=1e-4, atol=1e-5)
    fresh = Classifier()
    bsdp.load_checkpoint(fresh, str(Path(str(trainer.log_dir)) / "pruned.ckpt"))
    assert ranks(fresh) == ranks(module)


def test_patience_lets_a_round_recover(tmp_path: Path) -> None:
    module = Steered([0.9, 0.5, 0.895, 0.5, 0.895])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.7, rounds=4, tolerance=0.01, patience_rounds=2)
    fit(module, pruning, tmp_path, max_epochs=5)
    assert pruning.record.chosen == 4


def test_unpruned_model_comes_back_when_nothing_is_tolerated(tmp_path: Path) -> None:
    module = Steered([0.9, 0.1])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.7, rounds=2, tolerance=0.01)
    with pytest.warns(UserWarning, match="no pruned model was within"):
        fit(module, pruning, tmp_path, max_epochs=3)
    assert pruning.record.chosen == 0
    assert ranks(module) == [9, 24]


def test_lower_is_better_with_mode_min(tmp_path: Path) -> None:
    module = Steered([0.3, 0.305, 0.6, 0.1])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=3, tolerance=0.01, mode="min")
    fit(module, pruning, tmp_path, max_epochs=4)
    assert pruning.record.chosen == 1


def test_restore_best_off_keeps_the_last_structure(tmp_path: Path) -> None:
    module = Steered([0.9, 0.1])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=1, tolerance=0.01, restore_best=False)
    fit(module, pruning, tmp_path, max_epochs=2)
    assert ranks(module) == list(pruning.record.rounds[1].ranks.values())


def test_logged_keys(tmp_path: Path) -> None:
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=None)
    trainer = fit(Classifier(), pruning, tmp_path, max_epochs=3)
    kinds = [f"bsdp/{kind}{end}" for kind in ("bases", "params", "macs") for end in ("", "_kept")]
    expected = {
        "bsdp/round",
        "bsdp/accuracy_before",
        "bsdp/accuracy_after",
        *kinds,
        *(f"bsdp/rank/{n}" for n in LAYERS),
    }
    logged = rows(trainer)
    assert {key for key in logged[0] if key.startswith("bsdp/")} == expected
    per_epoch = {int(r["epoch"]): r for r in logged if r["bsdp/params"]}
    for record in pruning.record.rounds:
        assert float(per_epoch[record.epoch]["bsdp/params"]) == record.params
        assert float(per_epoch[record.epoch]["bsdp/rank/0.2"]) == record.ranks["0.2"]
    cuts = [r for r in logged if r["bsdp/accuracy_after"]]
    assert [float(r["bsdp/accuracy_after"]) for r in cuts] == pytest.approx(
        [r.accuracy_after for r in pruning.record.rounds[1:]]
    )


def test_no_checkpoint_carries_a_structure_under_an_old_metric(tmp_path: Path) -> None:
    module = Steered([0.9, 0.8, 0.7])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=None)
    keeper = ModelCheckpoint(tmp_path / "all", monitor="val_accuracy", mode="max", save_top_k=-1, filename="{epoch}")
    fit(module, pruning, tmp_path, keeper, max_epochs=3, enable_checkpointing=True)
    for record in pruning.record.rounds:
        checkpoint = torch.load(tmp_path / "all" / f"epoch={record.epoch}.ckpt", weights_only=True)
        saved = [entry["rank"] for entry in checkpoint["bsdp"]["pairs"].values()]
        assert saved == list(record.ranks.values())


def test_scores_once_per_optimizer_step(tmp_path: Path) -> None:
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None, epochs_per_round=2)
    steps: list[int] = []

    class Count(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert pruning.pruner is not None
            steps.append(pruning.pruner.scores.steps)

    # 3 batches an epoch in accumulation steps of 2: two optimizer steps; since the cut they add up
    fit(Classifier(), pruning, tmp_path, Count(), max_epochs=3, accumulate_grad_batches=2)
    assert steps == [2, 2, 4]


def test_test_of_a_larger_checkpoint_after_more_pruning(tmp_path: Path) -> None:
    module = Steered([0.9, 0.8, 0.7])
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=None)
    keeper = ModelCheckpoint(tmp_path / "best", monitor="val_accuracy", mode="max")
    trainer = fit(module, pruning, tmp_path, keeper, max_epochs=3, enable_checkpointing=True)
    assert ranks(module) == list(pruning.record.rounds[2].ranks.values())
    trainer.test(module, datamodule=Stripes(), ckpt_path="best", weights_only=True, verbose=False)
    assert ranks(module) == [9, 24]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_goes_on_with_ranks_schedule_and_record(tmp_path: Path) -> None:
    def settings() -> IterativeBasisPruning:
        return IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=3, tolerance=0.9)

    whole = settings()
    torch.manual_seed(0)
    reference = Classifier()
    fit(reference, whole, tmp_path / "whole", max_epochs=4)

    class Stop(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    torch.manual_seed(0)
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    with pytest.raises(SystemExit):
        fit(Classifier(), settings(), tmp_path / "half", keeper, Stop(), max_epochs=4, enable_checkpointing=True)
    resumed, module = settings(), Classifier()
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    callbacks = [resumed, BasisDecomposition(), keeper]
    trainer = make_trainer(tmp_path / "rest", callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, datamodule=Stripes(), ckpt_path=tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert resumed.record.rounds == whole.record.rounds
    for name, value in reference.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_second_fit_starts_with_its_own_warm_up(tmp_path: Path) -> None:
    module = Classifier()
    trainer = make_trainer(tmp_path, [BasisDecomposition()], max_epochs=2)
    trainer.fit(module, datamodule=Stripes())
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=0.9)
    trainer.callbacks.append(pruning)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, datamodule=Stripes())
    assert [r.epoch for r in pruning.record.rounds] == [0, 3]
    assert pruning.record.reference is not None


def test_files_of_an_earlier_run_are_not_overwritten(tmp_path: Path) -> None:
    for _ in range(2):
        fit(
            Classifier(),
            IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None),
            tmp_path,
            max_epochs=2,
            logger=False,
        )
    assert {p.name for p in tmp_path.glob("pruned*")} == {
        *("pruned.ckpt", "pruned.safetensors", "pruned-v1.ckpt", "pruned-v1.safetensors")
    }


def test_fast_dev_run_cuts_nothing(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, IterativeBasisPruning(warmup_epochs=1), tmp_path, fast_dev_run=True)
    assert ranks(module) == [9, 24]


def test_nan_gradients_remove_nothing(tmp_path: Path) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch == 0 else 1.0)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.current_epoch == 0:  # keep the weights sound
                optimizer.zero_grad()

    module = Broken()
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.6, rounds=2, tolerance=None)
    with pytest.warns(UserWarning, match="pruning round 1 is skipped: no finite gradient"):
        fit(module, pruning, tmp_path, max_epochs=3)
    # the second cut works again and reaches the target
    assert [r.epoch for r in pruning.record.rounds] == [0, 2]


def test_macs_need_an_example_only_when_asked_for(tmp_path: Path) -> None:
    class Odd(Classifier):
        def forward(self, images: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
            return self.rest(self.first(images + extra))  # type: ignore[no-any-return]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.forward(batch[0], torch.zeros(1)), batch[1])

        def _evaluate(self, batch: Any, stage: str) -> None:
            self.log(f"{stage}_accuracy", (self(batch[0], torch.zeros(1)).argmax(1) == batch[1]).float().mean())

    def pruning(**options: Any) -> IterativeBasisPruning:
        return IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=1, tolerance=None, **options)

    silent = pruning()
    with pytest.warns(UserWarning, match="MACs are not reported"):
        fit(Odd(spread=True), silent, tmp_path, max_epochs=2)
    assert silent.record.rounds[-1].macs is None
    with pytest.raises(ValueError, match="`target_kind: macs` needs the MACs"):
        fit(Odd(spread=True), pruning(target_kind="macs"), tmp_path, max_epochs=2)
    told, asked = Odd(spread=True), pruning(target_kind="macs")
    told.example_input_array = (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1))
    fit(told, asked, tmp_path, max_epochs=2)
    assert asked.record.input_shapes == [[1, 1, 8, 8], [1, 1]]


class Reading(nn.Module):
    """Uses the weight of its second layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read, self.head = nn.Linear(64, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, images: Tensor, extra: Any) -> Tensor:
        features = self.first(images.flatten(1) + (extra[0] if isinstance(extra, list) else extra)).relu()
        return self.head(nn.functional.linear(features, self.read.weight, self.read.bias).relu())


@pytest.mark.parametrize("measured", [True, False])
def test_a_layer_whose_weight_is_read_stays_whole(
    tmp_path: Path, measured: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Module(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.network = Reading()

        def forward(self, images: Tensor) -> Tensor:
            extra = torch.zeros(1)
            return self.network(images, extra if measured else [extra])

    module, pruning = Module(), IterativeBasisPruning(warmup_epochs=1, target=0.3, rounds=1, tolerance=None)
    if measured:
        fit(module, pruning, tmp_path, max_epochs=2)
    else:
        with pytest.warns(UserWarning, match="MACs are not reported"):
            fit(module, pruning, tmp_path, max_epochs=2)
    told = [record.getMessage() for record in caplog.records if "kept whole" in record.getMessage()]
    assert told == ["bsdp: kept whole: read: the model reads their weight or bias, or passes more than the input"]
    assert pruning.record.rounds[-1].ranks["read"] == 24
    assert pruning.record.rounds[-1].ranks["first"] < 24
    loaded = bsdp.load(Reading(), tmp_path / "runs" / "version_0" / "pruned.safetensors")
    assert isinstance(loaded.read, nn.Linear)
    images, extra = torch.randn(3, 1, 8, 8), torch.zeros(1)
    assert torch.allclose(loaded(images, extra), module.network.eval()(images, extra), atol=1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": 1.0}, r"`target` is a share and must be in \(0, 1\)"),
            ({"target": 0}, "`target` is a share"),
            ({"target_kind": "flops"}, "`target_kind` must be one of 'params', 'macs', 'bases'"),
            ({"rounds": 0}, "`rounds` must be at least 1"),
            ({"schedule": "linear"}, "`schedule` must be one of"),
            ({"warmup_epochs": 0}, "`warmup_epochs` must be at least 1"),
            ({"epochs_per_round": 0}, "`epochs_per_round` must be at least 1"),
            ({"importance": "taylor"}, "`importance` must be one of"),
            ({"ranking": "sum"}, "`ranking` must be one of"),
            ({"tolerance": -0.01}, "`tolerance` must be at least 0"),
            ({"mode": "up"}, "`mode` must be one of"),
            ({"patience_rounds": 0}, "`patience_rounds` must be at least 1"),
            ({"min_rank": 0}, "`min_rank` must be at least 1"),
            ({"max_layer_ratio": 1.5}, "`max_layer_ratio` is a share"),
        ],
    )
    def test_settings(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            IterativeBasisPruning(**options)

    def test_not_decomposed(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, [IterativeBasisPruning(warmup_epochs=1)])
        with pytest.raises(ValueError, match=r"add `bsdp\.callbacks\.BasisDecomposition"):
            trainer.fit(Classifier(), datamodule=Stripes())

    def test_target_out_of_reach(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`target=0.99` is out of reach: .* below 0.\d+"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.99), tmp_path)

    def test_monitor_that_is_never_logged(self, tmp_path: Path) -> None:
        module = Classifier()
        with pytest.raises(ValueError, match=r"`IterativeBasisPruning\(monitor='val_acc'\)` is never logged"):
            fit(
                module,
                IterativeBasisPruning(warmup_epochs=1, monitor="val_acc", target=0.5),
                tmp_path,
                num_sanity_val_steps=1,
            )
        assert not any(p.scaling.delta.any() for p in bsdp.named_pairs(module).values())  # before any step

    def test_monitor_that_the_sanity_check_does_not_show(self, tmp_path: Path) -> None:
        class Quiet(Classifier):
            def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
                if not self.trainer.sanity_checking:
                    super().validation_step(batch, batch_idx)

        class Wrapped(Classifier):
            @property
            def quiet(self) -> bool:
                return any(flag() for flag in [lambda: bool(self.trainer.sanity_checking)])

            @torch.no_grad()
            def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
                if not self.quiet:
                    super().validation_step(batch, batch_idx)

        class Loud(Classifier):
            def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
                super().validation_step(batch, batch_idx)

        class Both(Stripes):
            def val_dataloader(self) -> Any:
                return [super().val_dataloader()] * 2

        options: dict[str, Any] = {"target": 0.3, "tolerance": 0.9, "save_pruned": False}
        cases = (Quiet(), Stripes(), ""), (Wrapped(), Stripes(), ""), (Loud(), Both(), "/dataloader_idx_1")
        for module, data, name in cases:
            pruning = IterativeBasisPruning(warmup_epochs=1, monitor=f"val_accuracy{name}", **options)
            trainer = make_trainer(tmp_path, [BasisDecomposition(), pruning], num_sanity_val_steps=1)
            trainer.fit(module, datamodule=data)
            assert pruning.record.rounds[-1].accuracy_best is not None

    def test_too_many_rounds(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"needs 11 epochs .* but the trainer stops after 5"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, rounds=10, target=0.5), tmp_path)

    def test_endless_trainer_without_rounds(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`rounds` must be given"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5), tmp_path, max_epochs=-1)

    def test_no_validation(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="needs a validation loader"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5), tmp_path, limit_val_batches=0)
        fit(
            Classifier(),
            IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None),
            tmp_path,
            limit_val_batches=0,
        )

    def test_validation_less_often_than_rounds(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="validates every 2 epochs"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5), tmp_path, check_val_every_n_epoch=2)
        pruning = IterativeBasisPruning(target=0.5, warmup_epochs=2, epochs_per_round=2)
        fit(Classifier(), pruning, tmp_path, max_epochs=4, check_val_every_n_epoch=2)
        assert pruning.record.reference is not None

    def test_lbfgs_and_scales_of_two_optimizers(self, tmp_path: Path) -> None:
        module = Classifier()
        module.automatic_optimization = False

        def two() -> Any:
            pairs = list(bsdp.named_pairs(module).values())
            return [torch.optim.SGD([pair.scaling.delta], lr=0.1) for pair in pairs]

        module.configure_optimizers = two  # type: ignore[method-assign]
        with pytest.raises(ValueError, match="no optimizer holds all scaling factors"):
            fit(module, IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None), tmp_path)

    def test_frozen_scales(self, tmp_path: Path) -> None:
        class Freeze(Callback):
            def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                next(iter(bsdp.named_pairs(pl_module).values())).scaling.delta.requires_grad_(False)

        with pytest.raises(ValueError, match=r"scaling factors of 1 layers \(first: '0.0'\) do not train"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None), tmp_path, Freeze())

    def test_barebones(self, tmp_path: Path) -> None:
        trainer = Trainer(
            barebones=True,
            max_epochs=3,
            accelerator="cpu",
            callbacks=[IterativeBasisPruning(warmup_epochs=1), BasisDecomposition()],
        )
        with pytest.raises(ValueError, match="barebones"):
            trainer.fit(Classifier(), datamodule=Stripes())

    def test_averaging(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="weight averaging keeps a copy"):
            fit(Classifier(), IterativeBasisPruning(warmup_epochs=1), tmp_path, StochasticWeightAveraging(swa_lrs=0.1))
