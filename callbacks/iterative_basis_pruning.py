"""`IterativeBasisPruning`: remove the weakest bases round by round while any LightningModule trains."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

import bsdp
from bsdp._checks import check_at_least
from bsdp.callbacks._checkpoint_io import write_whole_checkpoints
from bsdp.callbacks._measuring import measure_module_cost, measure_on_batch, only_network
from bsdp.callbacks._monitoring import is_watched, log_around_cut, monitored_value
from bsdp.callbacks._processes import mean_over_processes, rewrap
from bsdp.callbacks._pruned_files import write_pruned
from bsdp.callbacks._random_states import random_states, restore_random_states
from bsdp.callbacks._records import describe_cut, structure_values
from bsdp.callbacks._scheduling import check_validation, scheduled_settings
from bsdp.callbacks._trainer_checks import check_scales, holds, refuse_optimizers, refuse_thawed, refuse_unsupported
from bsdp.compiling import forget_graphs
from bsdp.layers import named_pairs
from bsdp.pruner import IterativePruner, PruningSettings, largest_removable_share
from bsdp.record import PruningRecord
from bsdp.structure import structure_of


class IterativeBasisPruning(Callback):
    """Prune a decomposed module (see `BasisDecomposition`) while it trains, down to a budget or a tolerance.

    Scores of the scaling factors are accumulated once per optimizer step. At the start of an epoch the weakest bases of
    the whole model are removed, then the rest trains on. Pruning ends at the budget, or when the monitored value stays
    more than `tolerance` below the best value of the warm-up. The module then holds, and ``pruned.ckpt`` and
    ``pruned.safetensors`` in the run folder contain, the smallest model that met the tolerance.

    A step with a NaN or infinite gradient in any layer (in any process of a distributed run) counts for nothing, so one
    bad minibatch leaves the scores of the others alone. A round without sound scores is skipped with a warning, and the
    next one catches up. A model whose weights are NaN is never chosen. Scores are taken before gradient clipping, but
    in manual optimization after whatever the module does to its gradients before ``optimizer.step()``.

    Logged at every epoch:

    ============================ ===================================================================
    ``bsdp/round``               cuts made so far
    ``bsdp/bases``               live bases
    ``bsdp/params``              parameters of the folded network, head included
    ``bsdp/macs``                multiply-adds of the folded network for one example
    ``bsdp/bases_kept``, ...     the same as shares of the original (``params_kept``, ``macs_kept``)
    ``bsdp/rank/<layer>``        rank per group of each layer
    ``bsdp/accuracy_before``     monitored value at the last validation before a cut
    ``bsdp/accuracy_after``      monitored value at the first validation after it
    ============================ ===================================================================

    Args:
        target: Share of the original network to remove, in (0, 1): 0.7 means that 70 % are gone.
        target_kind: What `target` counts: ``params``, ``macs`` (multiply-adds) or ``bases``.
        rounds: Number of cuts. Default: as many as fit into the trainer's `max_epochs` when the run begins.
        schedule: How the removal is spread: ``cubic`` (much at first), ``geometric`` (the same share of what is left)
            or ``constant`` (the same share of the original).
        warmup_epochs: Epochs before the first cut; they give the reference value.
        epochs_per_round: Epochs of training after each cut; epochs left at the end train the final structure.
        importance: ``mean_square`` (Taylor terms squared per minibatch), ``mean_abs``, ``energy`` or ``magnitude``.
        ranking: ``importance`` removes the least important bases first, ``per_cost`` the least important per unit of
            cost, ``hull`` cuts a layer only where it gets below its break-even rank.
        tolerance: Largest allowed fall of the monitored value below the reference, as a fraction (0.01 = 1 point).
            null: prune to the budget whatever happens.
        monitor: Name of the logged validation metric.
        mode: ``max`` if a higher value is better, else ``min``.
        patience_rounds: Rounds in a row that may end below the tolerance; 1 stops after the first.
        mean_to_bias: Move the mean output of removed bases into biases.
        min_rank: Rank that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one round may remove.
        restore_best: End with the smallest model that met the tolerance; false: with the last one.
        save_pruned: Write ``pruned.ckpt`` and ``pruned.safetensors``.

    Attributes:
        checkpoint_path: The Lightning checkpoint of the final module, once it is written.
        weights_path: The folded network, once it is written.
    """

    def __init__(
        self,
        *,
        target: float = 0.7,
        target_kind: Literal["params", "macs", "bases"] = "params",
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = 1,
        epochs_per_round: int = 1,
        importance: Literal["mean_square", "mean_abs", "energy", "magnitude"] = "mean_square",
        ranking: Literal["importance", "per_cost", "hull"] = "per_cost",
        tolerance: float | None = 0.01,
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        patience_rounds: int = 1,
        mean_to_bias: bool = True,
        min_rank: int = 1,
        max_layer_ratio: float = 0.95,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        if rounds is not None:
            check_at_least("rounds", rounds, 1)
        self.settings = PruningSettings(
            target=target,
            target_kind=target_kind,
            rounds=rounds or 1,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
            importance=importance,
            ranking=ranking,
            tolerance=tolerance,
            mode=mode,
            patience_rounds=patience_rounds,
            mean_to_bias=mean_to_bias,
            min_rank=min_rank,
            max_layer_ratio=max_layer_ratio,
        )
        self.rounds = rounds
        self.monitor = monitor
        self.restore_best = restore_best
        self.save_pruned = save_pruned
        self.pruner: IterativePruner | None = None
        self.checkpoint_path: Path | None = None
        self.weights_path: Path | None = None
        self._loaded: dict[str, Any] | None = None
        self._watching = ExitStack()

    @property
    def record(self) -> PruningRecord:
        """What happened so far; empty before `fit`."""
        return PruningRecord() if self.pruner is None else self.pruner.record

    # --- set-up -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        self.pruner = self._loaded = self.checkpoint_path = self.weights_path = None  # another fit starts anew
        refuse_unsupported(trainer, self)
        write_whole_checkpoints(trainer)
        if self.settings.tolerance is not None and getattr(trainer, "barebones", False):
            raise ValueError(
                "`IterativeBasisPruning(tolerance=...)` needs validation metrics, which `Trainer(barebones=True)` does "
                "not give. Set `tolerance: null` to prune to the budget alone, or leave `barebones` out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the pruner on the decomposed module; check what can be checked without data."""
        self.pruner = None
        network = only_network(pl_module)
        if not named_pairs(pl_module):
            raise ValueError(
                "`IterativeBasisPruning` found no decomposed layer: add `bsdp.callbacks.BasisDecomposition()` to the "
                "trainer's callbacks, too."
            )
        part = pl_module.get_submodule(network) if network else pl_module
        new_bias = self.settings.mean_to_bias
        cost = bsdp.measure_cost(part, new_bias=new_bias)
        shapes: list[list[int]] = []
        if pl_module.example_input_array is not None:
            cost, shapes = measure_module_cost(pl_module, network, pl_module.example_input_array, new_bias=new_bias)
        self.pruner = IterativePruner(pl_module, self.settings, cost, network=network, monitor=self.monitor)
        self.record.input_shapes = shapes
        if self.settings.target_kind != "macs" or cost.fixed_macs is not None:
            self._print_ceiling()
        if self._loaded is not None:
            self.pruner.load_state_dict(self._loaded)
            restore_random_states(self._loaded["random"])

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The sanity check already shows whether the monitored metric is logged at all."""
        monitored_value(trainer, self.monitor, needed=self.settings.tolerance is not None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the rounds into the epochs and check the optimizers, before the first step."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        refuse_optimizers(trainer.optimizers)
        pruner = self._pruner()
        rounds = self.rounds
        if self._loaded is None:
            pruner.begin(trainer.current_epoch)
        elif rounds is None:  # epochs that are added to a run train its final structure
            rounds = self._loaded["rounds"]
        self._loaded = None
        check_validation(trainer, self.settings, self.monitor)
        pruner.settings = scheduled_settings(trainer, self.settings, rounds=rounds, first_epoch=pruner.first_epoch)
        trainer.should_stop = trainer.should_stop or pruner.stopped
        if pruner.scores.needs_gradients:
            check_scales(trainer.optimizers, pruner.pairs)

    # --- one epoch ----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the cut that is due, so that no checkpoint carries a new structure under an old metric."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        refuse_thawed(self._pruner().pairs)
        self._begin_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure MACs on the first batch, and watch the features on some batches."""
        pruner = self._pruner()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.record.cost.fixed_macs is None and not self.record.input_shapes:
            self._measure(trainer, pl_module, batch)
        if batch_idx == 0:  # a resumed run may skip `on_train_epoch_start`
            self._begin_epoch(trainer, pl_module)
        self._detach()
        if (self.settings.mean_to_bias or self.settings.importance == "energy") and is_watched(trainer, batch_idx):
            self._watching.enter_context(pruner.statistics.collecting())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Score the gradients, which here are unscaled and not yet clipped."""
        pruner = self._pruner()
        if holds(optimizer, next(iter(pruner.pairs.values())).scaling.delta):
            pruner.update()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop watching the features; validation must not count."""
        self._detach()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the monitored value."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        pruner = self._pruner()
        self._agree(trainer)
        value = monitored_value(trainer, self.monitor, needed=self.settings.tolerance is not None)
        if value is None:
            return
        first = self.record.rounds[-1].accuracy_after is None
        pruner.observe(value)
        last = self.record.rounds[-1]
        if first and last.accuracy_after is not None and last.round > 0:
            log_around_cut(trainer, self.record)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the structure, and stop when too many rounds ended below the tolerance."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._log_structure(trainer, pl_module)
        self._agree(trainer)
        pruner = self._pruner()
        if not pruner.stopped and pruner.should_stop(trainer.current_epoch):
            last = self.record.rounds[-1]
            rank_zero_info(
                f"bsdp: round {last.round} ended at {self.monitor}={last.accuracy_best:.4f}, more than the tolerance "
                f"{self.settings.tolerance} from the reference {self.record.reference:.4f}: pruning stops"
            )
        if pruner.stopped:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the smallest tolerated model in the module and on disk."""
        self._detach()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pruner = self._pruner()
        if self.restore_best:
            chosen = pruner.restore(optimizers=trainer.optimizers)
        else:
            pruner.finish()
            chosen = self.record.rounds[-1]
        if pruner.scheduled < pruner.settings.rounds and not pruner.stopped:
            rank_zero_warn(
                f"training ended after {pruner.scheduled} of {pruner.settings.rounds} pruning rounds, short of "
                f"`target={self.settings.target}`: something other than the tolerance stopped it (`max_steps`, "
                "`max_time`, `EarlyStopping`, ...). Let it train longer, or set fewer `rounds`."
            )
        params = self.record.kept(chosen, "params")
        assert params is not None
        if chosen.round == 0 and len(self.record.rounds) > 1 and self.settings.tolerance is not None:
            rank_zero_warn(
                f"no pruned model was within `tolerance={self.settings.tolerance}` of the reference "
                f"{self.record.reference}: the module holds the unpruned model. Train longer per round, cut in more "
                "rounds, or allow a larger tolerance."
            )
        rank_zero_info(f"bsdp: finished with the model of round {chosen.round}: {params:.1%} of the parameters kept")
        if self.save_pruned:
            self.checkpoint_path, self.weights_path = write_pruned(trainer, pl_module, pruner.network)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a run that was stopped after its last epoch."""
        self.finish_resumed(trainer, pl_module)

    def finish_resumed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what `on_train_end` does, if a resumed run had nothing left to train, so that nobody called that hook."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded["rounds"] is None or loaded["record"]["chosen"] is not None:
            return
        self._pruner().settings = replace(self.settings, rounds=loaded["rounds"])
        self.on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._detach()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the structure, from which a module is rebuilt before its weights load."""
        checkpoint["bsdp"] = structure_of(pl_module)

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        if self.pruner is None:
            return {}
        started = self.pruner.settings is not self.settings
        state = {
            **self.pruner.state_dict(),
            "rounds": self.pruner.settings.rounds if started else None,
            "random": random_states(),
        }
        if self.record.chosen is not None:
            state["record"]["reference_state"] = None  # a finished run needs it no more
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until `on_fit_start`, when the pairs have their ranks."""
        self._loaded = state_dict or None

    # --- helpers ------------------------------------------------------------------------------------------------

    def _pruner(self) -> IterativePruner:
        assert self.pruner is not None
        return self.pruner

    def _print_ceiling(self) -> None:
        share = largest_removable_share(self.record.cost, self.settings)
        rank_zero_info(
            f"bsdp: with rank {self.settings.min_rank} in every decomposed layer, {share:.1%} of the "
            f"{self.settings.target_kind} would be gone: no target goes beyond"
        )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Measure MACs from one example of the batch; needed for a MACs budget, else only reported."""
        pruner = self._pruner()
        try:
            cost, self.record.input_shapes = measure_on_batch(
                pl_module, self.record.network, batch, new_bias=self.settings.mean_to_bias
            )
        except ValueError as error:
            reason = str(error)
        else:
            pruner.set_cost(cost)
            if self.settings.target_kind == "macs":
                self._print_ceiling()
            return
        advice = "Set `example_input_array` in the LightningModule to one example."
        if self.settings.target_kind == "macs":
            raise ValueError(f"`target_kind: macs` needs the MACs of the network, but {reason}. {advice}")
        rank_zero_warn(f"MACs are not reported: {reason}. {advice}")
        self.record.input_shapes = [[0]]

    def _agree(self, trainer: Trainer) -> None:
        """Average scores and statistics over all processes: before a cut, and before a checkpoint of the first one."""
        if trainer.world_size > 1:
            self._pruner().reduce(lambda tensor: mean_over_processes(trainer, tensor))

    def _log_structure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not getattr(trainer, "barebones", False):
            # The same in all processes; the maximum, as a mean would round large numbers.
            values = structure_values(self.record)
            pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")

    def _begin_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cut_if_due(trainer, pl_module)
        self._pruner().start_epoch()

    def _cut_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = self._pruner()
        if not pruner.cut_due(trainer.current_epoch):
            return
        if self.settings.target_kind == "macs" and self.record.cost.fixed_macs is None:
            return  # only before the very first batch, which measures and comes back here
        self._agree(trainer)
        if self.record.cost.fixed_macs is None:  # nobody measured, but training has shown which layers must stay whole
            pruner.set_cost(bsdp.measure_cost(pruner.network, new_bias=self.settings.mean_to_bias))
        if pruner.cut(trainer.current_epoch, optimizers=trainer.optimizers):
            rewrap(trainer)
            forget_graphs()
            rank_zero_info(
                f"bsdp: epoch {trainer.current_epoch}: round {self.record.rounds[-1].round} of "
                f"{pruner.settings.rounds} {describe_cut(self.record)}"
            )

    def _detach(self) -> None:
        self._watching.close()
