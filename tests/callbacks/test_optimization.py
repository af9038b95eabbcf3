"""Whatever steps the weights: optimizers, schedules, manual optimization, several optimizers, those of the CLI."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

import bsdp
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.channel_runs import ResidualClassifier, fit
from tests.helpers.marks import slow_but
from tests.helpers.outcomes import Watch, check, run
from tests.helpers.pruning_runs import Batch, Classifier, Stripes, make_trainer, small_network


class Lookahead(Optimizer):
    """Steps with another optimizer, and goes half of the way at every second step; both remember something."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.steps = inner, 0
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        for parameter in parameters:
            self.state[parameter].setdefault("slow", parameter.detach().clone())
        loss = self.inner.step(closure)
        self.steps += 1
        for parameter in parameters if self.steps % 2 == 0 else []:
            slow = self.state[parameter]["slow"]
            parameter.copy_(slow.add_(parameter - slow, alpha=0.5))
        return loss


OPTIMIZERS: dict[str, Any] = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.005),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adam in a wrapper": lambda p: Lookahead(torch.optim.Adam(p, lr=0.01)),
}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizer_with_state_per_element(make: Any, tmp_path: Path) -> None:
    module = Classifier()
    module.configure_optimizers = lambda: make(trainable(module))  # type: ignore[method-assign]
    trainer, _, _ = run(module, tmp_path)
    state = trainer.optimizers[0].state
    for pair in bsdp.named_pairs(module).values():
        sizes = {v.numel() for v in state[pair.scaling.delta].values() if isinstance(v, Tensor) and v.dim() > 0}
        assert sizes == {pair.rank}


# States of every kind lose channels; those of more or fewer dimensions than the weight lose bases, too.
CUTS = list(itertools.product(["bases", "channels", "both"], OPTIMIZERS))
QUICK_CUTS = [
    (cut, name)
    for cut, name in CUTS
    if cut == "channels" or name in ("AdamW amsgrad", "Adafactor", "Adam in a wrapper")
]


@pytest.mark.parametrize(("cut", "name"), slow_but(QUICK_CUTS, CUTS))
def test_all_weights_train_on_after_cuts(cut: str, name: str, tmp_path: Path) -> None:
    module = ResidualClassifier()
    module.configure_optimizers = lambda: OPTIMIZERS[name](trainable(module))  # type: ignore[method-assign]
    short: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 2}
    if cut == "bases":
        callbacks = [
            BasisDecomposition(train="weights"),
            IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None),
        ]
        trainer = make_trainer(tmp_path, callbacks, **short)
        trainer.fit(module, datamodule=Stripes(batch_size=16))
    else:
        double: dict[str, Any] = {"double": True, "decomposition": {"train": "weights"}} if cut == "both" else {}
        pruning = {"order": "channel_then_basis", "split": 0.5} if double else {}
        trainer, _, _ = fit(module, tmp_path, pruning=pruning, **double, **short)
    for parameter, state in trainer.optimizers[0].state.items():
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
        assert tensors and all(value.expand(parameter.shape).isfinite().all() for value in tensors)


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 4),
    "one-cycle": lambda o: {"scheduler": schedulers.OneCycleLR(o, [0.3, 0.2], 24), "interval": "step"},
    "plateau": lambda o: {"scheduler": schedulers.ReduceLROnPlateau(o, patience=0), "monitor": "val_loss"},
    "warm-up, then decay": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "per group": lambda o: schedulers.LambdaLR(o, [lambda e: 1.0, lambda e: 0.5**e]),
}


MONITORED = [(name, early) for early in (False, True) for name in SCHEDULERS]


@pytest.mark.parametrize(("name", "early"), slow_but([*MONITORED[:5], MONITORED[7]], MONITORED))
def test_scheduler_and_its_monitor(name: str, early: bool, tmp_path: Path) -> None:
    """An optimizer built in `__init__` holds the weights of before, as one of the command line does."""
    module = Classifier()

    def optimizer() -> Any:
        scales = [p for name, p in module.named_parameters() if p.requires_grad and ".0." in name]
        rest = [p for name, p in module.named_parameters() if p.requires_grad and ".0." not in name]
        groups = [{"params": scales, "name": "scales"}, {"params": rest, "name": "head"}]
        return torch.optim.SGD(groups, lr=0.2, momentum=0.9)

    built = optimizer() if early else None
    module.configure_optimizers = lambda: [  # type: ignore[method-assign]
        [used := built or optimizer()],
        [SCHEDULERS[name](used)],
    ]
    trainer, _, _ = run(module, tmp_path, LearningRateMonitor(log_momentum=True))
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["scales", "head"]
    keys = (Path(str(trainer.log_dir)) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"lr-SGD/scales", "lr-SGD/head"} <= set(keys)


class Manual(Classifier):
    """Accumulates over two batches by hand, clips by hand and steps a schedule by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=10.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(trainable(self), lr=0.2)
        return [optimizer], [schedulers.ExponentialLR(optimizer, 0.9)]


def test_manual_optimization(tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(Watch):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            steps.append(next(c for c in trainer.callbacks if hasattr(c, "pruner")).pruner.scores.steps)

    run(Manual(), tmp_path, Count())
    assert steps == [3, 3, 3, 6]  # once per step, since the last cut


class Adversarial(Classifier):
    """A classifier that has to fool a critic as well; two optimizers that take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        critic_optimizer, optimizer = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(critic_optimizer)
        loss = self.critic(self(batch[0])).mean() - self.critic(torch.randn(8, 4)).mean()
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        self.untoggle_optimizer(critic_optimizer)
        with self.toggled_optimizer(optimizer):
            logits = self(batch[0])
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(logits, batch[1]) - 0.001 * self.critic(logits).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        network = torch.optim.SGD(trainable(self.network), lr=0.2, momentum=0.9)
        return [torch.optim.Adam(self.critic.parameters(), lr=0.001), network]


def test_several_optimizers_of_which_one_holds_the_scales(tmp_path: Path) -> None:
    module = Adversarial()
    trainer, pruning, _ = run(
        module, tmp_path, LearningRateMonitor(), decomposition={"backbone": "network", "exclude": ["3"]}
    )
    assert trainer.global_step == 48
    assert list(bsdp.named_pairs(module)) == ["network.0.0", "network.0.2"]
    assert pruning.pruner is not None and pruning.pruner.scores.needs_gradients


def test_steps_of_manual_optimization_do_not_tell_the_rounds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`rounds` must be given"):
        run(Manual(), tmp_path, max_epochs=-1, max_steps=12, pruning={"rounds": None})
    run(Manual(), tmp_path, max_epochs=-1, max_steps=12)


class Bare(Classifier):
    """Leaves its optimizer to the command line."""

    configure_optimizers = LightningModule.configure_optimizers  # type: ignore[assignment]

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.network = small_network()


@pytest.mark.filterwarnings("ignore:.*LightningCLI.s args parameter is intended")
@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer=AdamW", "--optimizer.lr=0.01", "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=4"],
        [
            "--optimizer=SGD",
            "--optimizer.lr=0.2",
            "--lr_scheduler=ReduceLROnPlateau",
            "--lr_scheduler.monitor=val_loss",
        ],
    ],
    ids=["AdamW, cosine", "SGD, plateau"],
)
def test_optimizer_and_scheduler_of_the_command_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lightning's command line still calls what newer versions of jsonargparse have renamed.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    pruning, watch = IterativeBasisPruning(warmup_epochs=1, target=0.5, rounds=2, tolerance=None), Watch()
    defaults = {
        "callbacks": [pruning, BasisDecomposition(), watch],
        "max_epochs": 4,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    cli = LightningCLI(
        Bare,
        Stripes,
        args=["fit", "--data.batch_size=16", *words],
        trainer_defaults=defaults,
        save_config_callback=None,
        seed_everything_default=0,
    )
    check(cli.model, pruning, watch)
    held = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held <= {id(p) for p in cli.model.parameters()}
