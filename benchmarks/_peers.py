"""Peers of a comparison: other libraries' pruning in their own recommended use, as callbacks of a configuration.

`TorchPruning` leaves every decision to torch-pruning: its graph, importance classes, global ranking and removal.
`LightningModelPruning` is Lightning's `ModelPruning`. All weights train before, between and after the cuts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks._peer_runs import Peer, network_of, parameters
from bsdp._checks import check_at_least, check_choice, check_patterns, matches
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import own_iterator

IMPORTANCES = ("taylor", "l1", "l2", "fpgm")


class TorchPruning(Peer):
    """Channel pruning by torch-pruning 1.6 as its README and its CIFAR script use it.

    One `BasePruner` with the classifier ignored steps through ``iterative_steps`` small removals, by default of the
    same share in every layer as in the README; each round steps until its share of the parameters is gone. Gradients
    for the Taylor score are those of the loss, accumulated over `score_batches` batches in eval mode by plain
    ``backward`` calls. After a cut the optimizer goes on with the new parameters and no momentum, as one that is built
    anew.

    Args:
        importance: ``taylor`` (`GroupTaylorImportance`), ``l1`` and ``l2`` (`GroupMagnitudeImportance`) or ``fpgm``
            (`FPGMImportance`), with the library's defaults.
        steps: Removals in which the library could take everything; a round ends between two of them.
        score_batches: Training batches for the Taylor score of a round.
        max_pruning_ratio: Largest share of a layer's channels that is removed, as in the library.
        global_pruning: Rank the channels of all layers together. Without a `max_pruning_ratio` that leaves single
            channels in some layers of MobileNetV2, from which fine-tuning does not recover.
        ignored: Name patterns of layers of the network whose channels stay, besides the classifier.
        target: See `Peer`, as all others.
        target_kind: See `Peer`.
        rounds: See `Peer`.
        schedule: See `Peer`.
        warmup_epochs: See `Peer`.
        epochs_per_round: See `Peer`.
    """

    def __init__(
        self,
        *,
        importance: Literal["taylor", "l1", "l2", "fpgm"] = "taylor",
        steps: int = 400,
        score_batches: int = 16,
        max_pruning_ratio: float = 1.0,
        global_pruning: bool = False,
        ignored: list[str] | None = None,
        target: float = 0.5,
        target_kind: Literal["params", "macs"] = "params",
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = 1,
        epochs_per_round: int = 1,
    ) -> None:
        super().__init__(
            target=target,
            target_kind=target_kind,
            rounds=rounds,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
        )
        check_choice("importance", importance, IMPORTANCES)
        check_at_least("steps", steps, 1)
        check_at_least("score_batches", score_batches, 1)
        self.importance, self.steps, self.score_batches = importance, steps, score_batches
        self.max_pruning_ratio, self.global_pruning, self.ignored = max_pruning_ratio, global_pruning, ignored
        self.pruner: Any = None

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a network that the library's graph does not follow: half of the channels of a copy are removed."""
        import torch_pruning as tp

        copied = copy.deepcopy(network_of(pl_module)).eval()
        head = pl_module.head_name
        try:
            with torch.random.fork_rng(devices=[]):
                pruner = self._pruner(copied, str(head), tp.importance.RandomImportance(), ratio=0.5, steps=1)
                pruner.step()
            copied(self.example.repeat(2, 1, 1, 1))
        except Exception as error:  # whatever its tracer, or the network it leaves, raises
            raise ValueError(
                f"torch-pruning does not follow {pl_module.backbone}: {type(error).__name__}: {error}. Name the layers "
                "at fault in `ignored`, or leave this method out."
            ) from error
        self.pruner = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the cut that is due."""
        if self.due(trainer, trainer.current_epoch):
            self._cut(trainer, pl_module)

    def _cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network, budget = network_of(pl_module), self.budget()
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        network.eval()
        if self.pruner is None:
            self.pruner = self._pruner(network, str(pl_module.head_name), self._scorer(), ratio=1.0, steps=self.steps)
        pl_module.zero_grad()
        if self.importance == "taylor":
            self._accumulate_gradients(trainer, pl_module)
        while self.size(network) > budget and self.pruner.current_step < self.steps:
            self.pruner.step()
        pl_module.zero_grad()
        network.train()
        kept = self.size(network) / self.sizes[self.target_kind]
        if self.size(network) > budget:
            raise ValueError(f"`target`: torch-pruning comes down to {kept:.1%} of the {self.target_kind} at most.")
        if pl_module.hparams.get("channels_last"):
            network.to(memory_format=torch.channels_last)
        for optimizer in trainer.optimizers:
            renew(optimizer, names, dict(pl_module.named_parameters()))
        self.cut_made(trainer.current_epoch, kept)
        rank_zero_info(f"torch-pruning: round {self.done} leaves {kept:.1%} of the {self.target_kind}")

    def _pruner(self, network: nn.Module, head: str, scorer: Any, *, ratio: float, steps: int) -> Any:
        import torch_pruning as tp

        names = [name for name, _ in network.named_modules() if name]
        patterns = check_patterns("ignored", self.ignored, names)
        ignored = [module for name, module in network.named_modules() if name == head or matches(name, patterns)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tp.pruner.BasePruner(
                network,
                self.example,
                importance=scorer,
                global_pruning=self.global_pruning,
                pruning_ratio=ratio,
                iterative_steps=steps,
                max_pruning_ratio=self.max_pruning_ratio,
                ignored_layers=ignored,
            )

    def _scorer(self) -> Any:
        import torch_pruning as tp

        if self.importance == "taylor":
            return tp.importance.GroupTaylorImportance()
        if self.importance == "fpgm":
            return tp.importance.FPGMImportance()
        return tp.importance.GroupMagnitudeImportance(p=1 if self.importance == "l1" else 2)

    def _accumulate_gradients(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.enable_grad(), random_state_kept():
            for batch in islice(own_iterator(trainer.train_dataloader), self.score_batches):
                images, labels = trainer.strategy.batch_to_device(batch)
                F.cross_entropy(pl_module(images), labels).backward()  # type: ignore[no-untyped-call]


class LightningModelPruning(Peer, ModelPruning):
    """Lightning's `ModelPruning`: the smallest weights of all layers together are masked, round by round.

    The network keeps its shapes: what is stored and computed stays as it was, which is what the summary says. The share
    of parameters that are not zero stands beside it as ``nonzero_ratio``. `target` counts zeros among all parameters.

    Args:
        target: See `Peer`, as all others.
        rounds: See `Peer`.
        schedule: See `Peer`.
        warmup_epochs: See `Peer`.
        epochs_per_round: See `Peer`.
    """

    def __init__(
        self,
        *,
        target: float = 0.5,
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = 1,
        epochs_per_round: int = 1,
    ) -> None:
        Peer.__init__(
            self,
            target=target,
            rounds=rounds,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
        )
        ModelPruning.__init__(
            self,
            "l1_unstructured",
            parameter_names=["weight"],
            amount=self._amount,
            use_lottery_ticket_hypothesis=False,
        )
        self.nonzero_ratio: float | None = None
        self._due, self._next_amount = False, 0.0

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store weights one after another: torch's pruning of all layers together takes no other layout."""
        network_of(pl_module).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        """Weights of convolutions and linear layers; a norm's are few and none of them is small."""
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        return [(module, name) for module, name in parameters_to_prune if isinstance(module, kinds)]

    def _amount(self, epoch: int) -> float:
        """Share of the weights that are left to mask as `epoch` ends; 0 for none."""
        return self._next_amount if self._due else 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask what is due before the next epoch."""
        self._due = self.due(trainer, trainer.current_epoch + 1)
        if self._due:
            masked = sum(getattr(module, name).numel() for module, name in self._parameters_to_prune)
            zeros = self.sizes["params"] - self.budget()
            if zeros >= masked:
                raise ValueError(f"`target`: only {masked / self.sizes['params']:.1%} of the parameters can be masked.")
            already = self.sizes["params"] * (1.0 - (self.history[-1]["params_kept"] if self.history else 1.0))
            self._next_amount = (zeros - already) / (masked - already)
            self.cut_made(trainer.current_epoch + 1, 1.0 - zeros / self.sizes["params"])
        ModelPruning.on_train_epoch_end(self, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the best epoch in the module, and the masks in its weights."""
        Peer.on_train_end(self, trainer, pl_module)
        ModelPruning.on_train_end(self, trainer, pl_module)
        network = network_of(pl_module)
        self.nonzero_ratio = sum(int(p.count_nonzero()) for p in network.parameters()) / parameters(network)

    def details(self) -> dict[str, Any]:
        """The share of parameters that are not zero."""
        return {"nonzero_ratio": self.nonzero_ratio}


def renew(optimizer: Optimizer, names: Mapping[int, str], parameters: Mapping[str, Tensor]) -> None:
    """Give an optimizer the parameters that now have the names of its own, and no momentum.

    Groups are changed in place, so that a scheduler goes on.

    Args:
        optimizer: The optimizer.
        names: Names of the parameters it holds, by `id`.
        parameters: Parameters by name, as they are now.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"] = [parameters[names[id(parameter)]] for parameter in group["params"]]
