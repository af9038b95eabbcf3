"""What the peers of a comparison do alike: rounds, the best epoch of the final model, the same measurements as ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bsdp._checks import check_at_least, check_choice, check_share
from bsdp.callbacks._comparison import latencies
from bsdp.callbacks._evaluation import evaluate, random_state_kept
from bsdp.callbacks._measuring import first_example
from bsdp.callbacks._run_folder import run_folder
from bsdp.probing import first_tensor
from bsdp.report import write_summary
from bsdp.round_settings import default_rounds
from bsdp.schedules import SCHEDULES, kept_share
from bsdp.stats import count_macs

KINDS = ("params", "macs")


@dataclass(frozen=True)
class BestEpoch:
    """The weights of the best validation of one structure.

    Attributes:
        value: Monitored value.
        state: State dict of the whole module.
    """

    value: float
    state: dict[str, Tensor]


class Peer(Callback):
    """Base of the peers: a network of `TransferTask` is cut in rounds while all of its weights train.

    After the fit both the network before its first cut and the final one, each at its best validation, are tested once,
    and ``summary.json`` is written with the keys that a row of a comparison needs. Such a run cannot be resumed.

    Args:
        target: Share of the original network to remove, in (0, 1).
        target_kind: What `target` counts: ``params`` or ``macs``.
        rounds: Number of cuts; None for as many as fit.
        schedule: How the removal is spread over the rounds, see `bsdp.schedules.kept_share`.
        warmup_epochs: Epochs before the first cut.
        epochs_per_round: Epochs of training after each cut; epochs left at the end train the final structure.
        monitor: Name of the logged validation metric; higher is better.
        latency_repeats: Timed passes per network; 0 measures no latency.
    """

    def __init__(
        self,
        *,
        target: float,
        target_kind: Literal["params", "macs"] = "params",
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = 1,
        epochs_per_round: int = 1,
        monitor: str = "val_accuracy",
        latency_repeats: int = 30,
    ) -> None:
        check_share("target", target)
        check_choice("target_kind", target_kind, KINDS)
        check_choice("schedule", schedule, SCHEDULES)
        if rounds is not None:
            check_at_least("rounds", rounds, 1)
        check_at_least("warmup_epochs", warmup_epochs, 0)
        check_at_least("epochs_per_round", epochs_per_round, 1)
        self.target, self.target_kind, self.rounds = target, target_kind, rounds
        self.schedule, self.warmup_epochs, self.epochs_per_round = schedule, warmup_epochs, epochs_per_round
        self.monitor, self.latency_repeats = monitor, latency_repeats
        self.done = self.planned = 0
        self.reference: BestEpoch | None = None
        self.final: BestEpoch | None = None
        self.history: list[dict[str, Any]] = []

    # --- what the peers add -------------------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before the first step, a network that this peer cannot prune."""

    def details(self) -> dict[str, Any]:
        """What this peer adds to the summary."""
        return {}

    # --- rounds -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the network as it was."""
        if trainer.world_size > 1:
            raise ValueError(f"`{type(self).__name__}` runs in one process; set `devices: 1`.")
        self.done, self.history = 0, []
        self.reference = self.final = None
        self.original = copy.deepcopy(network_of(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the rounds into the epochs, and see what the network is called with."""
        with random_state_kept():  # the same order of the data as in the other methods
            images = first_tensor(first_example(trainer))
        assert images is not None
        self.example = torch.zeros_like(images[:1], dtype=torch.float32)
        self.sizes = {"params": parameters(self.original), "macs": count_macs(self.original, self.example)}
        self.prepare(trainer, pl_module)
        epochs = trainer.max_epochs or 0
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        each = self.epochs_per_round
        fitting = default_rounds(epochs=epochs, warmup_epochs=self.warmup_epochs, epochs_per_round=each)
        self.planned = fitting if self.rounds is None else self.rounds
        if not 1 <= self.planned <= fitting:
            raise ValueError(
                f"`rounds`: {max(self.planned, 1)} x `epochs_per_round={each}` after `warmup_epochs="
                f"{self.warmup_epochs}` do not fit into {epochs} epochs."
            )

    def due(self, trainer: Trainer, epoch: int) -> bool:
        """Whether a cut has to be made before `epoch` trains."""
        if trainer.fast_dev_run or self.done >= self.planned:  # type: ignore[attr-defined]
            return False
        return epoch >= self.warmup_epochs + self.done * self.epochs_per_round

    def budget(self) -> float:
        """What may remain after the next cut, in units of `target_kind`."""
        kept = kept_share(self.done + 1, rounds=self.planned, target=self.target, schedule=self.schedule)
        return kept * self.sizes[self.target_kind]

    def cut_made(self, epoch: int, kept: float) -> None:
        """Note a cut and what it left."""
        self.done += 1
        self.final = None
        self.history.append({"round": self.done, "epoch": epoch, f"{self.target_kind}_kept": kept})

    def size(self, network: nn.Module) -> int:
        """Size of a network in units of `target_kind`."""
        return parameters(network) if self.target_kind == "params" else count_macs(network, self.example)

    # --- the best epoch and the report --------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights of the best validation before the first cut, and of the best one after the last."""
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if 0 < self.done < self.planned:
            return
        value = float(trainer.callback_metrics[self.monitor])
        best = self.final if self.done else self.reference
        if best is not None and value <= best.value:
            return
        kept = BestEpoch(value, {k: v.detach().to("cpu", copy=True) for k, v in pl_module.state_dict().items()})
        if self.done:
            self.final = kept
        else:
            self.reference = kept

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the best epoch of the final structure in the module."""
        if self.final is not None:
            pl_module.load_state_dict(self.final.state)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test, measure, and write ``summary.json``."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with random_state_kept():
            summary = self.summary(trainer, pl_module)
        path = write_summary(summary, run_folder(trainer) / "summary.json")
        print(f"written: {path}", flush=True)

    def summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Accuracies, sizes and latencies of the final and the original network."""
        test = self.monitor.replace("val", "test")
        network = network_of(pl_module)
        accuracy = evaluate(trainer, pl_module)[test]
        reference = None
        if self.reference is not None:
            try:
                pl_module.network = self.original
                pl_module.load_state_dict(self.reference.state)
                reference = evaluate(trainer, pl_module)[test]
            finally:
                pl_module.network = network
        networks = {"original": self.original.eval(), "pruned": copy.deepcopy(network).eval()}
        sizes = {f"params_{name}": parameters(net) for name, net in networks.items()}
        sizes |= {f"macs_{name}": count_macs(net, self.example) for name, net in networks.items()}
        shapes, device = [list(self.example.shape)], trainer.strategy.root_device
        times = {"latency_ms_original": None, "latency_ms_pruned": None}
        if self.latency_repeats:
            times = latencies(networks, shapes, batch_size=1, repeats=self.latency_repeats, device=device)
        return {
            "accuracy_reference": reference,
            "accuracy_pruned": accuracy,
            "validation_reference": self.reference.value if self.reference else None,
            "validation_pruned": self.final.value if self.final else None,
            **sizes,
            **times,
            "target": self.target,
            "target_kind": self.target_kind,
            "rounds": self.history,
            **self.details(),
        }


def network_of(pl_module: LightningModule) -> nn.Module:
    """The network of a `TransferTask`."""
    network = getattr(pl_module, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"peers prune the `network` of a TransferTask; {type(pl_module).__name__} has none.")
    return network


def parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
