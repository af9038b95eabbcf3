"""`ChannelPruning` in real, tiny runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.channel_settings import ALL_CRITERIA
from bsdp.scale_hooks import scales_of
from bsdp.task import TransferTask
from tests.callbacks.test_precision import CpuScaler
from tests.helpers.channel_runs import ResidualClassifier, ResidualNet, check, fit, widths
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Stripes

EXTRA: dict[str, dict[str, Any]] = {
    "activation_cumsum": {"theta": 0.4},
    "bn_scale": {"l1": 0.001},
    "channel_scaling": {"l1": 0.01},
    "taylor_2016": {"macs_penalty": 0.001},
}


def same_outputs(module: Any, callback: Any) -> None:
    """The written network computes what the module does."""
    images = torch.randn(3, 1, 8, 8)
    written = bsdp.load(ResidualNet, callback.weights_path)
    torch.testing.assert_close(written(images), module.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ALL_CRITERIA)
def test_criterion(criterion: str, tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, watch = fit(module, tmp_path, pruning={"criterion": criterion, **EXTRA.get(criterion, {})})
    check(module, callback, watch)
    same_outputs(module, callback)


@pytest.mark.parametrize("kind", ["macs", "channels"])
def test_budget_in_other_kinds(kind: str, tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, callback, watch = fit(module, tmp_path, pruning={"target_kind": kind, "schedule": "constant"})
    check(module, callback, watch)
    record = callback.record
    kept = [record.kept(entry, kind) for entry in record.rounds]
    for share, bound in zip(kept, (1.0, 0.75, 0.5), strict=True):
        assert share is not None and bound - 0.1 < share <= bound
    folded = bsdp.fold(module.network)
    assert record.rounds[-1].params == sum(p.numel() for p in folded.parameters())
    if kind == "channels":
        assert sum(record.rounds[-1].channels.values()) == sum((*widths(module), widths(module)[0]))


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "cosine"), ("adamw", "onecycle")])
def test_momentum_and_schedule_go_on(optimizer: str, schedule: str, tmp_path: Path) -> None:
    averages: list[list[Tensor]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and trainer.current_epoch > 0:
                key = "exp_avg" if optimizer == "adamw" else "momentum_buffer"
                state = trainer.optimizers[0].state
                averages.append([state[p][key].clone() for p in pl_module.parameters()])
                assert [a.shape for a in averages[-1]] == [p.shape for p in pl_module.parameters()]

    module = ResidualClassifier(optimizer=optimizer, schedule=schedule)
    trainer, callback, watch = fit(module, tmp_path, Look())
    check(module, callback, watch)
    assert averages[0][3].shape != (16, 12, 3, 3) and all(a.any() for entry in averages for a in entry)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 24


def kernels(weight: Tensor) -> set[tuple[float, ...]]:
    return {tuple(kernel.flatten().tolist()) for kernel in weight.detach().flatten(0, 1)}


def test_frozen_weights_stay_frozen(tmp_path: Path) -> None:
    module = ResidualClassifier()
    module.network.conv1.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = kernels(module.network.conv1.weight)  # type: ignore[arg-type]
    _, callback, watch = fit(module, tmp_path)
    check(module, callback, watch)
    assert "network.conv1.weight" not in watch.starts[0]
    assert kernels(module.network.conv1.weight) < before  # type: ignore[arg-type]


FACTORS = [("channel_scaling", False), ("channel_scaling", True), ("transtailor", False), ("transtailor", True)]


@pytest.mark.parametrize(("criterion", "early"), slow_but(FACTORS[::3], FACTORS))
def test_only_factors_and_head_train(criterion: str, early: bool, tmp_path: Path) -> None:
    module = ResidualClassifier(early=early)
    before = kernels(module.network.conv2.weight)  # type: ignore[arg-type]
    trainer, callback, watch = fit(module, tmp_path, pruning={"criterion": criterion, **EXTRA.get(criterion, {})})
    check(module, callback, watch)
    assert watch.starts[0].keys() == {"network.head.weight", "network.head.bias", "network.channel_scales.weight"}
    assert kernels(module.network.conv2.weight) < before  # type: ignore[arg-type]
    assert not module.network.bn1.running_mean.any()  # type: ignore[union-attr, operator]
    scales = scales_of(module.network)
    assert scales is not None and len(scales.weight) == sum(widths(module))
    assert trainer.optimizers[0].state[scales.weight]["momentum_buffer"].shape == scales.weight.shape


def test_freezing_can_be_chosen(tmp_path: Path) -> None:
    module = ResidualClassifier()
    _, _, watch = fit(module, tmp_path, pruning={"criterion": "transtailor", "freeze": False})
    assert "network.conv1.weight" in watch.starts[0] and module.network.bn1.running_mean.any()  # type: ignore[operator, union-attr]
    frozen = ResidualClassifier()
    _, callback, watch = fit(frozen, tmp_path, pruning={"criterion": "taylor_2019", "freeze": True})
    check(frozen, callback, watch)
    assert watch.starts[0].keys() == {"network.head.weight", "network.head.bias"}


@pytest.mark.parametrize("criterion", ["bn_scale", "channel_scaling"])
def test_penalty_is_added_before_clipping(criterion: str, tmp_path: Path) -> None:
    class Plain(ResidualClassifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1.0)

    steps: list[float] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            moved = [p.detach() - self.before[n] for n, p in pl_module.named_parameters()]
            part = [m for m, (n, _) in zip(moved, pl_module.named_parameters(), strict=True) if "bn" in n or "sca" in n]
            steps.append(float(torch.cat([m.flatten() for m in moved]).norm()))
            steps.append(float(torch.cat([m.flatten() for m in part]).norm()))

    fit(
        Plain(),
        tmp_path,
        Look(),
        pruning={"criterion": criterion, "l1": 1e4, "rounds": 1},
        gradient_clip_val=0.01,
        max_epochs=2,
    )
    # The penalty outweighs the loss by far, so that it is all of the clipped step.
    assert steps[0] == pytest.approx(0.01, rel=1e-3) and steps[1] == pytest.approx(0.01, rel=1e-3)


class AfterCut(Callback):
    """Notes the pairs' momentum, the folded function and whether bases train, right after the first cut."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 1:
            state = trainer.optimizers[0].state
            pairs = bsdp.named_pairs(pl_module).values()
            self.momentum = [pair.scaling.delta in state for pair in pairs]
            self.deltas = [float(pair.scaling.delta.detach().abs().max()) for pair in pairs]


def test_decomposed_module(tmp_path: Path) -> None:
    module, look = ResidualClassifier(), AfterCut()
    _, callback, watch = fit(
        module, tmp_path, look, decomposition={"batch_norm": "all"}, pruning={"target": 0.6, "ranking": "local"}
    )
    check(module, callback, watch)
    assert not any(look.momentum) and not any(look.deltas)
    assert set(callback.record.rounds[-1].ranks) == {"stem", "conv1", "conv2"}
    assert not any(p.basis.weight.requires_grad for p in bsdp.named_pairs(module).values())  # type: ignore[union-attr]
    same_outputs(module, callback)


def test_accumulation_cuts_as_a_big_batch_does(tmp_path: Path) -> None:
    records = []
    for batch_size, factor in ((48, 1), (16, 3)):
        torch.manual_seed(0)
        module = ResidualClassifier(norm=False)
        call = {"datamodule": Stripes(batch_size=batch_size)}
        _, callback, watch = fit(module, tmp_path, call=call, accumulate_grad_batches=factor)
        check(module, callback, watch)
        records.append([entry.channels for entry in callback.record.rounds])
    assert records[0] == records[1]


class EndsEpochs(ResidualClassifier):
    """Ends every epoch as the fifth batch starts, on which features are watched."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx >= 4 else None


class Hooks(Callback):
    """Counts the forward hooks at the end of every epoch; it must stand behind the pruning callback."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pl_module.modules()))


@pytest.mark.parametrize("double", [False, True])
def test_nothing_stays_attached_when_the_module_ends_an_epoch(double: bool, tmp_path: Path) -> None:
    module, hooks = EndsEpochs(), Hooks()
    _, callback, watch = fit(module, tmp_path, hooks, double=double, pruning={"target": 0.3, "rounds": 1})
    check(module, callback, watch)
    assert hooks.counts == [0] * 4


class Still(ResidualClassifier):
    """Learns nothing, from losses that it accumulates itself.

    Args:
        manual: Step by itself after so many batches; 0: leave that to the trainer.
    """

    def __init__(self, *, manual: int = 0) -> None:
        super().__init__(norm=False)
        self.automatic_optimization, self.manual = not manual, manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if not self.manual:
            return loss
        self.manual_backward(loss / self.manual)
        if (batch_idx + 1) % self.manual == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def build(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


class FirstEpoch(Callback):
    """Notes the scores of channels and their number of steps at the end of the first epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            callback = next(c for c in trainer.callbacks if hasattr(c, "pruner"))  # type: ignore[attr-defined]
            scores = callback.pruner.stages["channel"].scores
            self.steps, self.scores = scores._steps.tolist(), scores.compute()


def scores_of(folder: Path, batch_size: int, *, manual: int = 0, double: bool = False, **options: Any) -> FirstEpoch:
    torch.manual_seed(0)
    first, pruning = FirstEpoch(), {"target": 0.3, "rounds": 1, **options.pop("pruning", {})}
    if double:
        pruning["split"] = 0.0
        options["decomposition"] = {"metric": "euclidean"}
    call = {"datamodule": Stripes(batch_size=batch_size)}
    fit(Still(manual=manual), folder, first, double=double, pruning=pruning, call=call, max_epochs=2, **options)
    return first


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"manual": 2}], ids=["trainer", "manual"])
def test_scores_by_hooks_are_those_of_whole_steps(options: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = scores_of(tmp_path, 12, double=True), scores_of(tmp_path, 6, double=True, **options)
    assert whole.steps == parts.steps and set(whole.steps) == {8.0}  # those by hooks and those by weights
    for name, score in whole.scores.items():
        torch.testing.assert_close(parts.scores[name], score)


def test_all_steps_of_a_short_epoch_are_scored_the_last_shorter_one_too(tmp_path: Path) -> None:
    pruning = {"criterion": "taylor_2016"}
    assert set(scores_of(tmp_path, 8, pruning=pruning).steps) == {12.0}
    assert set(scores_of(tmp_path, 8, pruning=pruning, accumulate_grad_batches=5).steps) == {3.0}


class InTurns(Still):
    """Has one optimizer for the head and one for the rest.

    Args:
        head_first: Step the head first.
        two: Have two optimizers.
    """

    def __init__(self, *, two: bool, head_first: bool = False) -> None:
        super().__init__(manual=1)
        self.two, self.head_first = two, head_first

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(ResidualClassifier.training_step(self, batch, batch_idx))
        for optimizer in self.optimizers() if self.two else [self.optimizers()]:  # type: ignore[union-attr]
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        head = [*self.network.head.parameters()]
        rest = [p for p in self.parameters() if not any(p is other for other in head)]
        parts = ([head, rest] if self.head_first else [rest, head]) if self.two else [[*self.parameters()]]
        return [torch.optim.SGD(part, lr=0.0) for part in parts]


TAYLOR = [(False, "taylor_2016"), (False, "taylor_2019"), (True, "taylor_2016"), (True, "taylor_2019")]


@pytest.mark.parametrize(("head_first", "criterion"), slow_but(TAYLOR[::3], TAYLOR))
def test_every_group_is_scored_once_by_one_of_several_optimizers(
    head_first: bool, criterion: str, tmp_path: Path
) -> None:
    found = []
    for two in (False, True):
        torch.manual_seed(0)
        first, pruning = FirstEpoch(), {"target": 0.3, "rounds": 1, "criterion": criterion}
        fit(InTurns(two=two, head_first=head_first), tmp_path, first, pruning=pruning, max_epochs=2)
        found.append(first)
    one, several = found
    assert one.steps == several.steps and set(one.steps) == {6.0}
    for name, score in one.scores.items():
        torch.testing.assert_close(several.scores[name], score)


class Scores(Callback):
    """Copies the scores after the first step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        pruner = next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner  # type: ignore[attr-defined]
        if trainer.global_step == 1:
            self.first = torch.cat(list(pruner.stage.scores.compute().values()))


@pytest.mark.parametrize("criterion", slow_but(["taylor_2016"], ["taylor_2016", "taylor_2019"]))
def test_scaled_gradients_are_unscaled(criterion: str, tmp_path: Path) -> None:
    found = []
    for options in ({"precision": "bf16-mixed"}, {"plugins": [CpuScaler()]}):
        torch.manual_seed(0)
        module, scores = ResidualClassifier(), Scores()
        pruning = {"criterion": criterion, "normalize": "none"}
        _, callback, watch = fit(module, tmp_path, scores, pruning=pruning, **options)
        check(module, callback, watch)
        found.append(scores.first)
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02 * float(found[0].max()))


class Spread(ResidualClassifier):
    """Holds the layers itself."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in list(self.network.named_children()):
            setattr(self, name, child)
        del self.network

    def forward(self, images: Tensor) -> Tensor:
        return ResidualNet.forward(self, images)  # type: ignore[arg-type]


class Late(ResidualClassifier):
    """Builds its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.network

    def configure_model(self) -> None:
        if "network" not in self._modules:
            self.network = ResidualNet()  # type: ignore[assignment]


KINDS = [(kind, name) for kind in ("spread", "late", "loaders", "example") for name in ("taylor_2019", "transtailor")]


@pytest.mark.parametrize(("kind", "criterion"), slow_but(KINDS[1::2], KINDS))
def test_kinds_of_modules_and_data(kind: str, criterion: str, tmp_path: Path) -> None:
    module = Spread() if kind == "spread" else Late() if kind == "late" else ResidualClassifier()
    call: dict[str, Any] = {}
    if kind == "loaders":
        data = Stripes(batch_size=16)
        data.setup("fit")
        call = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    if kind == "example":
        module.example_input_array = torch.zeros(2, 1, 8, 8)
    _, callback, watch = fit(module, tmp_path, pruning={"criterion": criterion}, call=call)
    check(module, callback, watch)
    assert callback.record.network == ("" if kind == "spread" else "network")


@pytest.mark.parametrize(("values", "expected"), [([0.9, 0.895, 0.5, 0.5], 1), ([0.9, 0.1, 0.1, 0.1], 0)])
def test_smallest_tolerated_model_is_left(values: list[float], expected: int, tmp_path: Path) -> None:
    module = ResidualClassifier(values=values)
    pruning = {"tolerance": 0.01, "monitor": "steered", "target": 0.7}
    if expected == 0:
        with pytest.warns(UserWarning, match="no pruned model was within"):
            _, callback, _ = fit(module, tmp_path, pruning=pruning)
    else:
        _, callback, _ = fit(module, tmp_path, pruning=pruning)
    assert callback.record.chosen == expected
    channels = callback.record.rounds[expected].channels
    assert widths(module) == (channels["stem"], channels["conv1"])
    assert (widths(module) == (12, 16)) == (expected == 0)
    same_outputs(module, callback)
    fresh = ResidualClassifier()
    bsdp.load_checkpoint(fresh, callback.checkpoint_path)
    assert widths(fresh) == widths(module)


def test_what_is_logged(tmp_path: Path) -> None:
    trainer, callback, _ = fit(ResidualClassifier(), tmp_path, pruning={"round_to": 4})
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["bsdp/channels"]]
    for entry in callback.record.rounds:
        row = next(row for row in rows if int(row["epoch"]) == entry.epoch)
        assert float(row["bsdp/channels"]) == sum(entry.channels.values())
        assert {n: float(row[f"bsdp/channels/{n}"]) for n in entry.channels} == entry.channels
        assert all(count % 4 == 0 for count in entry.channels.values())


def test_fast_dev_run_cuts_nothing(tmp_path: Path) -> None:
    module = ResidualClassifier()
    fit(module, tmp_path, fast_dev_run=True, pruning={"criterion": "channel_scaling"})
    assert widths(module) == (12, 16)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({"norm": False, "pruning": {"criterion": "bn_scale"}}, "needs batch norm .* choose l1 or taylor_2019"),
    "frozen": (
        {"decomposition": {}, "pruning": {"criterion": "bn_scale"}},
        "`criterion: bn_scale` .* all of them are frozen: let them train",
    ),
    "factors": ({"decomposition": {}, "pruning": {"criterion": "transtailor"}}, "leave `BasisDecomposition` out"),
    "target": ({"pruning": {"target": 0.9, "min_channels": 6}}, r"`target=0.9` is out of reach: with 6 channel\(s\)"),
    "empty": ({"pruning": {"min_channels": 0}}, "`min_channels` must be at least 1"),
    "all": ({"pruning": {"max_group_ratio": 1.0}}, "`max_group_ratio` is a share"),
    "layer": ({"pruning": {"exclude": ["conv9"]}}, "conv9"),
}


class Untrainable(ResidualClassifier):
    """Says so when a step is made after all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a step was made")


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_the_first_step(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = dict(settings)
    module = Untrainable(norm=settings.pop("norm", True))
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, **settings)


@pytest.mark.parametrize("case", ["absent", "frozen", "target"])
def test_a_fast_dev_run_finds_what_cannot_be_pruned(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    settings = dict(settings)
    module = Untrainable(norm=settings.pop("norm", True))
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, fast_dev_run=True, **settings)


def test_factors_need_images_to_find_their_place(tmp_path: Path) -> None:
    numbers = DataLoader(TensorDataset(torch.zeros(4, 1, 8, 8, dtype=torch.long), torch.zeros(4).long()), 2)
    with pytest.raises(ValueError, match=r"no floating-point tensor .* set `example_input_array`"):
        fit(
            Untrainable(),
            tmp_path,
            call={"train_dataloaders": numbers, "val_dataloaders": numbers},
            pruning={"criterion": "channel_scaling"},
        )


def test_a_folded_network(tmp_path: Path) -> None:
    module = ResidualClassifier()
    bsdp.decompose(module.network)
    for pair in bsdp.named_pairs(module.network).values():
        pair.keep(torch.arange(4))
    module.network = bsdp.fold(module.network)  # type: ignore[assignment]
    assert not bsdp.named_pairs(module.network)
    _, callback, watch = fit(module, tmp_path)
    check(module, callback, watch)
    assert widths(module)[1] < 16


@pytest.mark.parametrize("criterion", slow_but(["channel_scaling"], ["l1", "channel_scaling"]))
def test_a_model_that_cannot_be_traced_is_named(criterion: str, tmp_path: Path) -> None:
    task = TransferTask("bsdp:resnet20_pad", num_classes=4, weights="none")
    data = DataLoader(TensorDataset(torch.randn(4, 3, 16, 16), torch.randint(4, (4,))), 2)
    call = {"train_dataloaders": data, "val_dataloaders": data}
    with pytest.raises(ValueError, match=r"CifarResNet.*(basis pruning|IterativeBasisPruning)"):
        fit(task, tmp_path, call=call, pruning={"criterion": criterion})
    assert task.trainer.global_step == 0


def test_a_network_that_is_built_twice(tmp_path: Path) -> None:
    class Forgetful(ResidualClassifier):
        def configure_model(self) -> None:
            self.network = ResidualNet()  # type: ignore[assignment]

    with pytest.raises(ValueError, match="the channel factors are gone"):
        fit(Forgetful(), tmp_path, pruning={"criterion": "channel_scaling"})
