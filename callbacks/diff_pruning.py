"""`DiffPruning`: a task as a sparse delta on a frozen backbone, in a file of some kilobytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import bsdp
from bsdp._checks import check_at_least, check_choice, check_share, check_whole
from bsdp.callbacks._comparison import network_of
from bsdp.callbacks._measuring import measure_on_batch, only_network
from bsdp.callbacks._monitoring import loss_scale, monitored_value
from bsdp.callbacks._processes import rewrap
from bsdp.callbacks._pruned_files import write_delta, write_pruned
from bsdp.callbacks._scheduling import planned_epochs
from bsdp.callbacks._trainer_checks import holds, refuse_optimizers, refuse_unsupported
from bsdp.compiling import plain_name
from bsdp.decompose import find_head
from bsdp.diff_pruning import SparseDelta, expected_l0, keep_entries, size_of, strongest_entries
from bsdp.freezing import fixed_batch_norms
from bsdp.hard_concrete import check_stretch
from bsdp.optimizer_state import forget
from bsdp.record import PruningRecord, RoundRecord
from bsdp.snapshots import copy_values
from bsdp.structure import structure_of


class DiffPruning(Callback):
    """Learn a task as a difference to the frozen network of which only few entries are not 0.

    For the first epochs every entry of the difference has a gate, and the loss gets ``penalty`` times the expected
    number of open gates; then the largest entries are kept and train on alone. The head trains as it is and counts for
    nothing in the penalty. The network gets neither smaller nor faster: what shrinks is what is stored per task. The
    run folder gets ``delta.safetensors`` with the non-zero entries and the head (see `bsdp.load_delta`), beside
    ``pruned.ckpt`` and, as one plain network, ``pruned.safetensors``. Every fit starts from a delta of 0.

    PUBLISHED (Guo, Rush, Kim, arXiv 2012.07463; for BERT): the method and the defaults of `density`, `gate_epochs`,
    `penalty`, `low`, `high`, `alpha` and `alpha_lr`, with learning rates of 1e-5 for the delta and 5e-5 after the
    projection. OUR CHOICES: the delta trains at the rate of the user's optimizer and schedule; the alphas have an Adam
    of their own, without schedule and weight decay, for under SGD the tiny gradients of the penalty would not move
    them. So they are in no group of the user's optimizer, whose schedulers need not know of them, the penalty is added
    to their gradients in closed form, and the loss is the user's own. Batch norms keep the statistics of the backbone.
    The momentum of the delta starts anew at the projection. In distributed runs all processes draw the same gates.

    `penalty` must be chosen for the network: the published one belongs to a sum over 340 million entries.

    | logged key          | when        | what                                                            |
    | ------------------- | ----------- | --------------------------------------------------------------- |
    | ``bsdp/delta_kept`` | every epoch | expected share of entries that are not 0; exact once projected  |

    Args:
        density: Share of the entries that stay, in (0, 1).
        gate_epochs: Epochs with gates; the rest of the training has the mask fixed.
        penalty: Factor of the expected number of non-zero entries in the loss.
        low: Lower end of the gates' stretched interval, below 0.
        high: Upper end, above 1.
        alpha: Initial alpha of all gates; 5 means open.
        alpha_lr: Learning rate of the alphas.
        structured: Have one more gate for every weight and every bias as a whole.
        norms: Give weights and biases of normalisation layers deltas, too.
        exclude: Name patterns of modules without a delta; they stay as they are.
        head: Dotted name of the module that trains, and is stored, whole. Default: the last convolution or linear
            layer in module order.
        monitor: Validation metric to report.
        mode: ``max`` if more of it is better, else ``min``.
        seed: Seed of the gates.
        save_pruned: Write the three files at the end.

    Attributes:
        record: History for `PruningReport`; round 0 has gates, round 1 the projected delta.
        delta_path: The file of the task; None before it is written.
    """

    def __init__(
        self,
        *,
        density: float = 0.005,
        gate_epochs: int = 3,
        penalty: float = 1.25e-7,
        low: float = -1.5,
        high: float = 1.5,
        alpha: float = 5.0,
        alpha_lr: float = 0.1,
        structured: bool = True,
        norms: bool = True,
        exclude: list[str] | None = None,
        head: str | None = None,
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        seed: int = 0,
        save_pruned: bool = True,
    ) -> None:
        check_share("density", density)
        check_whole("gate_epochs", gate_epochs, 1)
        check_at_least("penalty", penalty, 0.0)
        check_at_least("alpha_lr", alpha_lr, 0.0)
        check_stretch(low, high)
        check_choice("mode", mode, ("max", "min"))
        self.density = density
        self.gate_epochs = gate_epochs
        self.penalty = penalty
        self.gates: dict[str, Any] = {"low": low, "high": high, "alpha": alpha, "structured": structured}
        self.alpha_lr = alpha_lr
        self.norms = norms
        self.exclude = exclude
        self.head = head
        self.monitor = monitor
        self.mode = mode
        self.seed = seed
        self.save_pruned = save_pruned
        self._reset()

    def _reset(self) -> None:
        self.record = PruningRecord(monitor=self.monitor, mode=self.mode)
        self.delta_path: Path | None = None
        self.checkpoint_path: Path | None = None
        self.weights_path: Path | None = None
        self.summary_details: dict[str, Any] = {}
        self._generator = torch.Generator().manual_seed(self.seed)
        self._optimizer: Optimizer | None = None
        self._first_epoch = 0
        self._loaded: dict[str, Any] | None = None
        self._deltas: dict[str, SparseDelta] = {}
        self._fixed_batch_norms: list[nn.Module] = []

    # --- set-up -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the deltas and freeze the rest, before optimizers and DDP exist."""
        refuse_unsupported(trainer, self)
        if bsdp.named_deltas(pl_module) and stage != "fit":
            return
        if not any(True for _ in pl_module.parameters()):
            pl_module.configure_model()
        bsdp.detach_deltas(pl_module)
        self._reset()
        network = only_network(pl_module)
        self.record.network = network
        self.record.cost = bsdp.measure_cost(network_of(pl_module, network), new_bias=False)
        head = self._head_name(pl_module)
        excluded = [*(self.exclude or ()), head]
        self._deltas = bsdp.attach_deltas(pl_module, exclude=excluded, norms=self.norms, **self.gates)
        ours = {id(p) for delta in self._deltas.values() for p in delta.parameters()}
        ours |= {id(p) for p in pl_module.get_submodule(head).parameters()}
        for parameter in pl_module.parameters():
            parameter.requires_grad_(id(parameter) in ours)
        if stage == "fit":
            rank_zero_info(
                f"bsdp: {size_of(self._deltas):,} entries of {len(self._deltas)} parameters get a delta; "
                f"{head!r} trains whole, everything else is frozen. Inference gets neither smaller nor faster"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the values into the user's optimizer and the alphas into one of our own; take up a resumed run."""
        refuse_optimizers(trainer.optimizers)
        if len(bsdp.named_deltas(pl_module)) < max(1, len(self._deltas)):
            raise ValueError(
                "layers with deltas were replaced after `setup`, by `sync_batchnorm` or a second `configure_model`: "
                "set `norms: false` for the first, and let `configure_model` return at once when the network is there."
            )
        self._deltas = bsdp.named_deltas(pl_module)
        batch_norms = {"trainable": [self._head_name(pl_module)], "batch_norm": "frozen"}
        self._fixed_batch_norms = fixed_batch_norms(pl_module, **batch_norms)  # type: ignore[arg-type]
        self._join(trainer.optimizers, pl_module)
        if self._loaded is not None:
            self._generator.set_state(self._loaded["generator"].cpu())
            self._first_epoch = self._loaded["first_epoch"]
            self.record.load_state_dict(self._loaded["record"])
        if self._alphas():
            self._optimizer = Adam(self._alphas(), lr=self.alpha_lr)
            if self._loaded is not None and self._loaded["alphas"] is not None:
                self._optimizer.load_state_dict(self._loaded["alphas"])

    def _join(self, optimizers: list[Optimizer], pl_module: LightningModule) -> None:
        """Take the alphas out of all groups, in place; let the values join the group of the weights they change."""
        alphas = {id(alpha) for alpha in self._alphas()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in alphas]
        successors = [(_frozen(pl_module, name), delta.value) for name, delta in self._deltas.items()]
        bsdp.adopt_parameters(optimizers, successors, pl_module)
        values = [delta.value for delta in self._deltas.values()]
        if not any(all(holds(optimizer, value) for value in values) for optimizer in optimizers):
            raise ValueError(
                "no optimizer holds the deltas of all layers, so they would not train together: give one optimizer "
                "all parameters (`self.parameters()`, or those with `requires_grad`) in `configure_optimizers`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the schedule before the first step."""
        self._zero_alphas()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._loaded is None:
            self._first_epoch = trainer.current_epoch
        self._loaded = None
        planned = planned_epochs(trainer)
        if planned is not None and planned - self._first_epoch <= self.gate_epochs:
            raise ValueError(
                f"`gate_epochs={self.gate_epochs}` leaves no epoch for the projected delta: the trainer stops after "
                f"{planned - self._first_epoch}. Train longer (`max_epochs`, `max_steps`), or lower `gate_epochs`."
            )
        if not self.record.rounds:
            self._add_round(trainer.current_epoch)

    # --- one epoch ----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project when it is time, so that no checkpoint carries the new structure under an old metric."""
        due = trainer.current_epoch - self._first_epoch >= self.gate_epochs
        if due and self._alphas() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._project(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw the gates of the step; keep the batch norms of the backbone in eval mode."""
        if batch_idx == 0:  # a resumed run may skip `on_train_epoch_start`
            self.on_train_epoch_start(trainer, pl_module)
        for module in self._fixed_batch_norms:
            if module.training:
                module.eval()
        for delta in self._deltas.values():
            delta.train()
            delta.draw(self._generator)
        if not self.record.input_shapes and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.record.input_shapes = self._input_shapes(pl_module, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty to that of the alphas, and let them make their step."""
        alphas = self._alphas()
        if self._optimizer is None or not alphas or not holds(optimizer, next(iter(self._deltas.values())).value):
            return
        scale = loss_scale(trainer)  # a scaler brings back only the gradients that the user's optimizer holds
        penalties = torch.autograd.grad(self.penalty * expected_l0(self._deltas), alphas)
        for alpha, gradient in zip(alphas, penalties, strict=True):
            alpha.grad = gradient if alpha.grad is None else alpha.grad / scale + gradient
        if all(bool(alpha.grad.isfinite().all()) for alpha in alphas if alpha.grad is not None):
            self._optimizer.step()
        self._zero_alphas()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the monitored value."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        value = monitored_value(trainer, self.monitor, needed=False, needed_by=self)
        if value is None or not self.record.rounds:
            return
        last = self.record.rounds[-1]
        sign = 1.0 if self.mode == "max" else -1.0
        better = last.accuracy_best is None or sign * value > sign * last.accuracy_best
        after = value if last.accuracy_after is None else last.accuracy_after
        self.record.update_last(accuracy_after=after, accuracy_best=value if better else last.accuracy_best)
        if better and last.round == 0:
            self.record.reference = value
            self.record.reference_state = copy_values(pl_module, device="cpu")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share of entries that are not 0."""
        if not trainer.fast_dev_run and not getattr(trainer, "barebones", False):  # type: ignore[attr-defined]
            share = float(expected_l0(self._deltas).detach()) / size_of(self._deltas)
            pl_module.log("bsdp/delta_kept", share, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")

    # --- the end ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of the task; the module keeps its deltas."""
        for module in self._fixed_batch_norms:
            module.train()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._alphas():
            rank_zero_warn(
                f"training ended before the projection after `gate_epochs={self.gate_epochs}` epochs (`max_time`, "
                "`EarlyStopping`, ...), so no delta is written. Let it train longer, or lower `gate_epochs`."
            )
            return
        self.record.chosen = len(self.record.rounds) - 1
        entries, size = int(expected_l0(self._deltas).detach()), size_of(self._deltas)
        self.summary_details = {"delta_entries": entries, "delta_size": size, "delta_kept": entries / size}
        if self.save_pruned:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = network_of(pl_module, self.record.network)
        self.checkpoint_path, self.weights_path = write_pruned(trainer, pl_module, bsdp.fold(network))
        head = self._head_name(pl_module).removeprefix(f"{self.record.network}.")
        self.delta_path = write_delta(trainer, pl_module, network, head=head)
        if trainer.is_global_zero:
            written = self.delta_path.stat().st_size
            whole = self.weights_path.stat().st_size
            self.summary_details |= {"delta_file_bytes": written, "delta_file_share": written / whole}
            rank_zero_info(
                f"bsdp: {self.delta_path.name} holds the task in {written:,} bytes, {written / whole:.1%} of a whole "
                f"network: {self.summary_details['delta_kept']:.2%} of the delta's entries, and the head"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a run that was stopped after its last epoch."""
        self.finish_resumed(trainer, pl_module)

    def finish_resumed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what `on_train_end` does, if a resumed run had nothing left to train, so that nobody called that hook."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self.record.rounds and self.record.chosen is None:
            self.on_train_end(trainer, pl_module)

    # --- state --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write which parameters have deltas, from which a module is rebuilt before its weights load."""
        checkpoint["bsdp"] = structure_of(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        if not self.record.rounds:
            return {}
        record = self.record.state_dict()
        if self.record.chosen is not None:
            record["reference_state"] = None  # a finished run needs it no more
        return {
            "record": record,
            "generator": self._generator.get_state(),
            "first_epoch": self._first_epoch,
            "alphas": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until `on_fit_start`."""
        self._loaded = state_dict or None

    # --- helpers ------------------------------------------------------------------------------------------------

    def _project(self, trainer: Trainer) -> None:
        """Keep the largest entries, as the first process sees them."""
        kept = strongest_entries(self._deltas, self.density).cpu()
        kept = trainer.strategy.broadcast(kept)
        keep_entries(self._deltas, kept)
        self._optimizer = None
        forget(trainer.optimizers, (delta.value for delta in self._deltas.values()))
        rewrap(trainer)
        self._add_round(trainer.current_epoch)
        rank_zero_info(
            f"bsdp: epoch {trainer.current_epoch}: the {kept.numel():,} largest of {size_of(self._deltas):,} entries "
            "of the delta are kept"
        )

    def _add_round(self, epoch: int) -> None:
        before = self.record.rounds[-1].accuracy_best if self.record.rounds else None
        params = self.record.cost.original("params")
        number = len(self.record.rounds)
        self.record.rounds.append(RoundRecord(number, epoch, {}, bases=0, params=params, accuracy_before=before))

    def _alphas(self) -> list[nn.Parameter]:
        return [alpha for delta in self._deltas.values() for alpha in delta.alphas()]

    def _zero_alphas(self) -> None:
        for alpha in self._alphas():
            alpha.grad = None  # the user's optimizer does not clear them

    def _head_name(self, pl_module: LightningModule) -> str:
        names = [name for name, _ in pl_module.named_modules() if name]
        head = next((n for n in names if plain_name(n) == self.head), None) if self.head else find_head(pl_module)
        if head is None:
            raise ValueError(
                f"`head={self.head!r}` is no module of {type(pl_module).__name__}."
                if self.head
                else f"{type(pl_module).__name__} has no convolution or linear layer: build the network in `__init__`."
            )
        return head

    def _input_shapes(self, pl_module: LightningModule, batch: Any) -> list[list[int]]:
        try:
            example = pl_module.example_input_array
            source = batch if example is None else example
            return measure_on_batch(pl_module, self.record.network, source, new_bias=False)[1]
        except ValueError as error:
            rank_zero_warn(f"MACs are not reported: {error}. Set `example_input_array` to one example.")
            return [[0]]


def _frozen(pl_module: LightningModule, name: str) -> Tensor:
    """The frozen parameter under a delta."""
    parent, _, child = name.rpartition(".")
    group: Any = pl_module.get_submodule(
        f"{parent}.parametrizations.{child}" if parent else f"parametrizations.{child}"
    )
    original: Tensor = group.original
    return original
