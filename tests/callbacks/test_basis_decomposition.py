"""`BasisDecomposition` in real, tiny runs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.pruning_runs import Classifier, Stripes, make_trainer, small_network


class WithBatchNorm(Classifier):
    """The same with a batch norm behind the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.network[0].insert(1, nn.BatchNorm2d(16))


class Late(Classifier):
    """Builds its network in `configure_model`."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.network: Any = None

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def configure_model(self) -> None:
        if self.network is None:
            self.network = small_network()


class TooLate(Late):
    """Builds its network where no callback can see it."""

    def configure_model(self) -> None:
        pass


class Signals(Classifier):
    """1-d convolutions on the rows of the images."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims
        conv = nn.Conv1d if dims == 1 else nn.Conv3d
        pool = nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool3d
        first = conv(8 if dims == 1 else 1, 12, 3, padding=1)
        second = conv(12, 12, 3, padding=1)
        self.network = nn.Sequential(first, nn.ReLU(), second, pool(1), nn.Flatten(), nn.Linear(12, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.flatten(1, 2) if self.dims == 1 else images.unsqueeze(2))


def fit(module: LightningModule, callbacks: list[Callback], folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, callbacks, **{"max_epochs": 1, **options})
    trainer.fit(module, datamodule=Stripes())
    return trainer


def test_only_scales_and_head_train(tmp_path: Path) -> None:
    module = Classifier()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, [BasisDecomposition()], tmp_path)
    pairs = bsdp.named_pairs(module)
    assert list(pairs) == ["network.0.0", "network.0.2"]
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.scaling.delta" for name in pairs} | {"network.3.weight", "network.3.bias"}
    assert all(pair.scaling.delta.abs().max() > 1e-4 for pair in pairs.values())
    assert not torch.equal(module.network[3].weight, before["network.3.weight"])
    # what is frozen is bit for bit what the decomposition of the same layer gives
    for name, pair in pairs.items():
        layer = nn.Conv2d(before[f"{name}.weight"].shape[1], len(before[f"{name}.weight"]), 3, padding=1)
        layer.load_state_dict({"weight": before[f"{name}.weight"], "bias": before[f"{name}.bias"]})
        fresh = bsdp.pair_from_layer(layer)
        assert torch.equal(pair.scaling.weight, fresh.scaling.weight)
        assert torch.equal(pair.basis.weight, fresh.basis.weight)


def test_outputs_do_not_change_before_training(tmp_path: Path) -> None:
    module, images = Classifier(), torch.randn(2, 1, 8, 8)
    expected = module(images)
    fit(module, [BasisDecomposition()], tmp_path, max_epochs=0)
    torch.testing.assert_close(module(images), expected)


def test_activation_metric_keeps_the_function_and_reorders_the_bases(tmp_path: Path) -> None:
    module, images = Classifier(), torch.randn(2, 1, 8, 8)
    expected = module(images)
    seen: list[float] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not seen:
                seen.append((pl_module(images) - expected).abs().max().item())

    fit(module, [BasisDecomposition(metric="activation", calibration_batches=2), Look()], tmp_path)
    assert seen[0] < 1e-5
    basis = bsdp.named_pairs(module)["network.0.2"].basis.weight.flatten(1)
    assert not torch.allclose(basis @ basis.T, torch.eye(len(basis)), atol=1e-3)


MODES = [("frozen", 0, 0), ("stats", 1, 0), ("affine", 0, 1), ("all", 1, 1)]


@pytest.mark.parametrize(("mode", "stats", "affine"), MODES)
def test_batch_norm_modes(tmp_path: Path, mode: Any, stats: bool, affine: bool) -> None:
    module = WithBatchNorm()
    norm = module.network[0][1]

    class Rude(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.train()

    fit(module, [BasisDecomposition(batch_norm=mode), Rude()], tmp_path)
    assert bool(norm.running_mean.any()) is bool(stats)
    assert (not torch.equal(norm.weight, torch.ones(16))) is bool(affine)


def test_frozen_batch_norms_stay_so_when_synchronised(tmp_path: Path) -> None:
    module = WithBatchNorm()

    def optimizer() -> torch.optim.Optimizer:  # `sync_batchnorm` replaces them right before this
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.2)

    module.configure_optimizers = optimizer  # type: ignore[method-assign]
    fit(module, [BasisDecomposition()], tmp_path)
    assert isinstance(module.network[0][1], nn.SyncBatchNorm)
    assert not module.network[0][1].running_mean.any()


def test_train_bias(tmp_path: Path) -> None:
    module = Classifier()
    before = module.network[0][0].bias.detach().clone()
    fit(module, [BasisDecomposition(train_bias=True)], tmp_path)
    assert not torch.equal(module.network[0][0].bias, before)


def test_backbone_leaves_the_rest_alone(tmp_path: Path) -> None:
    module = Classifier(spread=True)
    fit(module, [BasisDecomposition(backbone="first")], tmp_path)
    assert list(bsdp.named_pairs(module)) == ["first.0", "first.2"]
    assert all(p.requires_grad for p in module.rest.parameters())


def test_include_leaves_the_head_trainable(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, [BasisDecomposition(include=["network.0.2"])], tmp_path)
    assert list(bsdp.named_pairs(module)) == ["network.0.2"]
    assert all(p.requires_grad for p in module.network[3].parameters())
    assert not module.network[0][0].weight.requires_grad


def test_activation_metric_in_double_precision(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, [BasisDecomposition(metric="activation")], tmp_path, precision="64-true")
    assert bsdp.named_pairs(module)["network.0.2"].basis.weight.dtype == torch.float64


def test_calibration_leaves_the_epoch_whole(tmp_path: Path) -> None:
    batches: list[int] = []

    class Workers(Stripes):
        def train_dataloader(self) -> Any:
            return DataLoader(self.examples, 32, num_workers=1, persistent_workers=True)

    class Count(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            batches.append(1)

    trainer = make_trainer(tmp_path, [BasisDecomposition(metric="activation"), Count()], max_epochs=1)
    trainer.fit(Classifier(), datamodule=Workers())
    assert len(batches) == 3


def test_trainable_patterns_thaw(tmp_path: Path) -> None:
    module = WithBatchNorm()
    fit(module, [BasisDecomposition(trainable=["network.0.1"])], tmp_path)
    assert module.network[0][1].weight.requires_grad
    assert module.network[0][1].running_mean.any()


class WithTemperature(WithBatchNorm):
    """Scales its scores with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.temperature


@pytest.mark.parametrize("named", [True, False])
def test_a_parameter_trains_when_it_is_named(named: bool, tmp_path: Path) -> None:
    module = WithTemperature()
    fit(module, [BasisDecomposition(trainable=["temperature"] if named else None)], tmp_path)
    assert module.temperature.requires_grad is named
    assert (module.temperature.item() != 1) is named
    assert not module.network[0][1].weight.requires_grad


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(tmp_path: Path, dims: int) -> None:
    module = Signals(dims)
    fit(module, [BasisDecomposition()], tmp_path)
    assert list(bsdp.named_pairs(module)) == ["network.0", "network.2"]


def test_network_of_configure_model(tmp_path: Path) -> None:
    module = Late()
    fit(module, [BasisDecomposition()], tmp_path)
    assert list(bsdp.named_pairs(module)) == ["network.0.0", "network.0.2"]


def test_optimizer_built_before_setup_adopts_the_scales(tmp_path: Path) -> None:
    module = Classifier()
    weights = [p for p in module.parameters() if p.dim() > 1]
    biases = [p for p in module.parameters() if p.dim() == 1]
    early = torch.optim.AdamW([{"params": weights, "lr": 0.05}, {"params": biases}], lr=0.01, weight_decay=0.0)
    module.configure_optimizers = lambda: early  # type: ignore[method-assign]
    fit(module, [BasisDecomposition()], tmp_path)
    held = {id(p) for group in early.param_groups for p in group["params"]}
    assert held <= {id(p) for p in module.parameters()}
    for pair in bsdp.named_pairs(module).values():
        assert any(pair.scaling.delta is p for p in early.param_groups[0]["params"])
        assert pair.scaling.delta.any()


def test_second_fit_goes_on_with_the_same_pairs(tmp_path: Path) -> None:
    module = Classifier()
    fit(module, [BasisDecomposition()], tmp_path)
    pairs = bsdp.named_pairs(module)
    fit(module, [BasisDecomposition()], tmp_path)
    assert all(bsdp.named_pairs(module)[name] is pair for name, pair in pairs.items())


def test_checkpoint_carries_the_structure(tmp_path: Path) -> None:
    module = Classifier()
    trainer = fit(module, [BasisDecomposition()], tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint["bsdp"]["pairs"]["network.0.2"] == {"rank": 24}
    fresh, images = Classifier(), torch.randn(2, 1, 8, 8)
    bsdp.load_checkpoint(fresh, str(tmp_path / "a.ckpt"))
    torch.testing.assert_close(fresh.eval()(images), module.eval()(images))


class TestRefusals:
    def test_lbfgs(self, tmp_path: Path) -> None:
        module = Classifier()
        module.configure_optimizers = lambda: torch.optim.LBFGS(  # type: ignore[method-assign]
            [p for p in module.parameters() if p.requires_grad]
        )
        with pytest.raises(ValueError, match="LBFGS is not supported"):
            fit(module, [BasisDecomposition()], tmp_path)

    def test_optimizer_without_any_scale(self, tmp_path: Path) -> None:
        module = Classifier()
        head = module.network[3]
        module.configure_optimizers = lambda: torch.optim.SGD(head.parameters(), lr=0.1)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"no optimizer holds the scaling factors of 2 layers"):
            fit(module, [BasisDecomposition()], tmp_path)

    def test_averaging(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="weight averaging keeps a copy"):
            fit(Classifier(), [BasisDecomposition(), StochasticWeightAveraging(swa_lrs=0.1)], tmp_path)

    def test_no_network(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="build the network in `__init__` or `configure_model`"):
            fit(TooLate(), [BasisDecomposition()], tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"backbone": "netwrk"}, "is no submodule of Classifier; its children are"),
            ({"include": ["conv*"]}, "`include` has the pattern 'conv\\*', which matches no layer"),
            ({"exclude": ["conv*"]}, "`exclude` has the pattern"),
            ({"trainable": ["conv*"]}, "`trainable` has the pattern"),
            ({"exclude": ["network.0"]}, "could decompose no layer"),
        ],
    )
    def test_names(self, tmp_path: Path, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit(Classifier(), [BasisDecomposition(**options)], tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metric": "activations"}, "`metric` must be one of 'euclidean', 'activation'"),
            ({"batch_norm": "none"}, "`batch_norm` must be one of"),
            ({"calibration_batches": 0}, "`calibration_batches` must be at least 1"),
            ({"centred": True}, "`centred` is about bases chosen by what they put out"),
            ({"shrinkage": 0.0}, "`shrinkage` is about bases chosen by what they put out"),
        ],
    )
    def test_settings(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BasisDecomposition(**options)

    @pytest.mark.parametrize("manual", [False, True])
    def test_calibration_without_float_inputs(self, tmp_path: Path, manual: bool) -> None:
        class Whole(Stripes):
            def train_dataloader(self) -> Any:
                images, labels = self.examples.tensors
                return DataLoader(TensorDataset((images * 10).long(), labels), 32)

        class Converting(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.cross_entropy(self(batch[0].float()), batch[1])

        module = Converting()
        module.automatic_optimization = not manual
        trainer = make_trainer(tmp_path, [BasisDecomposition(metric="activation")], max_epochs=1)
        with pytest.raises(ValueError, match="first floating-point tensor") if manual else nullcontext():
            trainer.fit(module, datamodule=Whole())


def test_weights_of_a_pair_that_the_first_batch_cuts_train_in_that_epoch(tmp_path: Path) -> None:
    class Tuned(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module, frozen = Tuned(), set[str]()

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                frozen.update(name for name, p in pl_module.named_parameters() if not p.requires_grad)

    pruning = IterativeBasisPruning(
        target=0.5, target_kind="macs", importance="magnitude", warmup_epochs=0, rounds=1, tolerance=None
    )
    decomposition = BasisDecomposition(metric="activation", train="weights")
    trainer = make_trainer(tmp_path, [decomposition, pruning, Look()], max_epochs=1)
    trainer.fit(module, datamodule=Stripes(batch_size=16))
    cut = [n for n, pair in bsdp.named_pairs(module).items() if pair.rank < pair.full_rank]
    assert cut and not {name for name in frozen if name.startswith(tuple(cut))}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_all_weights_train_and_their_momentum_follows_the_cuts(tmp_path: Path, optimizer: Any) -> None:
    class Tuned(Classifier):
        def configure_optimizers(self) -> Any:
            extra = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
            return optimizer(self.parameters(), lr=0.01, **extra)

    module = Tuned()
    pruning = IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None, rounds=2)
    decomposition = BasisDecomposition(metric="activation", train="weights")
    weights: dict[str, Any] = {}

    class Note(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for name, pair in bsdp.named_pairs(pl_module).items():
                weights[name] = (pair.basis, pair.basis.weight, pair.basis.weight.detach().clone())

    trainer = make_trainer(tmp_path, [decomposition, Note(), pruning], max_epochs=3)
    trainer.fit(module, datamodule=Stripes())
    assert pruning.record.rounds[-1].params <= 0.5 * pruning.record.cost.original()
    state = trainer.optimizers[0].state
    assert decomposition.batch_norm == "all"
    for name, pair in bsdp.named_pairs(module).items():
        basis, parameter, before = weights[name]
        assert pair.basis is basis
        assert basis.weight is parameter
        for trained in (parameter, pair.scaling.weight, pair.scaling.delta, pair.scaling.bias):
            moments = [v for v in state[trained].values() if isinstance(v, Tensor) and v.dim() > 0]
            assert moments
            assert all(value.shape == trained.shape for value in moments)
        kept = len(parameter)
        assert kept <= len(before)
        assert not any(torch.equal(row, old) for row in parameter for old in before)
