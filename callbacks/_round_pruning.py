"""What all pruning callbacks do alike: they feed a `bsdp.rounds.RoundPruner` from Lightning's hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

import bsdp
from bsdp._checks import check_whole
from bsdp.basis_stage import BasisStage
from bsdp.callbacks._batch_watch import BatchWatch
from bsdp.callbacks._checkpoint_io import load_shape_first, write_whole_checkpoints
from bsdp.callbacks._curvature import check_curvature, complete_scores
from bsdp.callbacks._input_costs import InputCosts
from bsdp.callbacks._measuring import only_network
from bsdp.callbacks._monitoring import log_around_cut, monitored_value, shows_metrics
from bsdp.callbacks._own_steps import OwnPasses
from bsdp.callbacks._processes import mean_over_processes, rewrap
from bsdp.callbacks._pruned_files import write_pruned
from bsdp.callbacks._random_states import random_states, restore_random_states
from bsdp.callbacks._recalibration import recalibrate
from bsdp.callbacks._records import describe_cut, follow_cut, structure_values
from bsdp.callbacks._round_messages import say_few_terms, say_finished, say_stopped, say_whole
from bsdp.callbacks._scheduling import check_validation, scheduled_settings
from bsdp.callbacks._trainer_checks import refuse_optimizers, refuse_unsupported
from bsdp.compiling import forget_graphs
from bsdp.cost import ModelCost
from bsdp.record import PruningRecord
from bsdp.round_settings import RoundSettings
from bsdp.rounds import RoundPruner
from bsdp.structure import structure_of


class RoundPruning(Callback, ABC):
    """Base of the callbacks that prune in rounds; not for use on its own.

    Args:
        settings: What to do, with any number of rounds.
        rounds: Number of cuts; None for as many as fit.
        monitor: Name of the logged validation metric.
        restore_best: End with the smallest model that met the tolerance; false: with the last one.
        save_pruned: Write ``pruned.ckpt`` and ``pruned.safetensors``.
        recalibration_batches: Training batches on which batch norms are recalibrated after each cut.
    """

    needs_example = False  # whether the pruner can only be built with an example of the network's input
    new_bias = False  # whether cuts move means into biases, which then count
    curvature_batches = 8  # training batches on which `importance: second_order` takes the curvature

    def __init__(
        self,
        settings: RoundSettings,
        *,
        rounds: int | None,
        monitor: str,
        restore_best: bool,
        save_pruned: bool,
        recalibration_batches: int = 0,
    ) -> None:
        check_whole("recalibration_batches", recalibration_batches, 0)
        self.settings: Any = settings
        self.rounds = rounds
        self.monitor = monitor
        self.restore_best = restore_best
        self.save_pruned = save_pruned
        self.recalibration_batches = recalibration_batches
        self.pruner: RoundPruner | None = None
        self.checkpoint_path: Path | None = None
        self.weights_path: Path | None = None
        self._loaded: dict[str, Any] | None = None
        self._watch: BatchWatch | None = None
        self._costs = InputCosts(self)

    @property
    def record(self) -> PruningRecord:
        """What happened so far; empty before `fit`."""
        return PruningRecord() if self.pruner is None else self.pruner.record

    # --- what the callbacks add ---------------------------------------------------------------------------------

    @abstractmethod
    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> RoundPruner:
        """Make the pruner.

        Args:
            pl_module: The module.
            cost: Cost of the network in it.
            network: Dotted name of the network.
            shapes: Shapes of the network's inputs for one example; empty while they are not known.
        """

    def check_module(self, pl_module: LightningModule) -> None:
        """Refuse a module that this callback cannot prune."""

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse optimizers whose steps cannot be scored."""

    def ceiling(self) -> str | None:
        """The largest target, in words."""
        return None

    def schedule(self, trainer: Trainer, *, rounds: int | None, first_epoch: int) -> RoundSettings:
        """Fit the rounds into the epochs."""
        check_validation(trainer, self.settings, self.monitor, needed_by=self)
        return scheduled_settings(trainer, self.settings, rounds=rounds, first_epoch=first_epoch)

    # --- set-up -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        load_shape_first(trainer)
        if stage != "fit":
            return
        self.pruner = self._watch = None  # another fit starts anew
        self._loaded = self.checkpoint_path = self.weights_path = None
        self._costs = InputCosts(self)
        refuse_unsupported(trainer, self)
        write_whole_checkpoints(trainer)
        if self.settings.tolerance is not None and getattr(trainer, "barebones", False):
            raise ValueError(
                f"`{type(self).__name__}(tolerance=...)` needs validation metrics, which `Trainer(barebones=True)` "
                "does not give. Set `tolerance: null` to prune to the budget alone, or leave `barebones` out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the pruner on the module; check what can be checked without data."""
        self.pruner = None
        self.check_module(pl_module)
        saved = None if self._loaded is None or not self.needs_example else self._loaded["record"]["input_shapes"]
        measured = self._costs.without_data(pl_module, saved=saved)
        if measured is not None:  # else the first batch is needed, see `on_train_start`
            self._build(pl_module, *measured)

    def _build(self, pl_module: LightningModule, cost: ModelCost, shapes: list[list[int]]) -> None:
        self.pruner = self.build(pl_module, cost, network=only_network(pl_module), shapes=shapes)
        self._watch = BatchWatch(self.pruner, self._basis_stage())
        self.record.input_shapes = shapes
        if self.record.cost.knows(self.settings.target_kind):
            self._print_ceiling()
        if cost.fixed_macs is not None:
            say_whole(self.record)
        if self._loaded is not None:
            self.pruner.load_state_dict(self._loaded)
            restore_random_states(self._loaded["random"])
            self._watch.step = self._loaded.get("step", 0)  # older files have none

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The sanity check already shows whether the monitored metric is logged at all."""
        if shows_metrics(trainer, pl_module):
            monitored_value(trainer, self.monitor, needed=self.settings.tolerance is not None, needed_by=self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the pruner if it is not yet there, fit the rounds into the epochs, check the optimizers.

        A ``fast_dev_run`` has no epochs to fit them into, but what cannot be pruned is refused there, too.
        """
        refuse_optimizers(trainer.optimizers)
        if self.pruner is None:
            self._build(pl_module, *self._costs.on_first_example(trainer, pl_module))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin(trainer)
        self.check_optimizers(trainer)
        stage = self._basis_stage()
        if stage is not None and stage.scores.needs_curvature:
            check_curvature(trainer, pl_module)
        for setting in self.own_passes():
            OwnPasses(trainer, pl_module, setting=setting, batches=1, outputs=setting == "metric: kfac").check()

    def own_passes(self) -> list[str]:
        """Settings for which the module is run on training batches beside the training."""
        return ["recalibration_batches"] if self.recalibration_batches else []

    def _begin(self, trainer: Trainer) -> None:
        pruner = self._pruner()
        rounds, fresh = self.rounds, self._loaded is None
        if fresh:
            pruner.begin(trainer.current_epoch)
        elif rounds is None and self._loaded is not None:  # epochs that are added train the final structure
            rounds = self._loaded["rounds"]
        self._loaded = None
        pruner.settings = self.schedule(trainer, rounds=rounds, first_epoch=pruner.first_epoch)
        if fresh and pruner.original_known:
            pruner.check_target()
        trainer.should_stop = trainer.should_stop or pruner.stopped

    # --- one epoch ----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the cut that is due, so that no checkpoint carries a new structure under an old metric."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._begin_epoch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the network on some batches, and what it gets in the first one."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._costs.before_batch(pl_module, batch)
        if batch_idx == 0:  # a resumed run may skip `on_train_epoch_start`
            self._begin_epoch(trainer, pl_module)
        self._costs.watch(pl_module)
        self._watching().attach(trainer, pl_module, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Score the gradients, which here are unscaled and not yet clipped."""
        if self.pruner is not None:
            self.pruner.update(optimizer, optimizers=trainer.optimizers)
        if self._watch is not None:
            self._watch.note_gradients(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching, for validation must not count; after the first batch see what MACs are of."""
        self._costs.after_batch(trainer, pl_module)
        self._detach()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._watching().check_taught(pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the monitored value."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        pruner = self._pruner()
        self._agree(trainer)
        needed = self.settings.tolerance is not None
        value = monitored_value(trainer, self.monitor, needed=needed, needed_by=self)
        if value is None:
            return
        first = self.record.rounds[-1].accuracy_after is None
        pruner.observe(value)
        last = self.record.rounds[-1]
        if first and last.accuracy_after is not None and last.round > 0:
            log_around_cut(trainer, self.record)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the structure, and stop when too many rounds ended below the tolerance."""
        self._detach()  # an epoch may end by `on_train_batch_start`, after which `on_train_batch_end` does not come
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        problem = self._watching().problem()
        if problem and trainer.current_epoch == self._pruner().first_epoch:
            rank_zero_warn(f"{problem} If that is so in the epoch before the first cut, the run ends there.")
        self._log_structure(trainer, pl_module)
        self._agree(trainer)
        pruner = self._pruner()
        if not pruner.stopped and pruner.should_stop(trainer.current_epoch):
            say_stopped(self.record, self.settings, self.monitor)
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
        say_finished(pruner, chosen)
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
            "step": self._watching().next_step,
        }
        if self.record.chosen is not None and not self.settings.distillation:
            state["record"]["reference_state"] = None  # a finished run needs it no more
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the pruner is built, when the module has the saved structure."""
        self._loaded = state_dict or None

    # --- helpers ------------------------------------------------------------------------------------------------

    def _pruner(self) -> RoundPruner:
        assert self.pruner is not None
        return self.pruner

    def _print_ceiling(self) -> None:
        words = self.ceiling()
        if words is not None:
            rank_zero_info(f"bsdp: {words}")

    def spends_at_once(self) -> bool:
        """Whether costs count in the first batch already, so that they cannot change after it."""
        return self.settings.target_kind == "macs" and not self.settings.warmup_epochs

    def set_cost(self, cost: ModelCost, shapes: list[list[int]]) -> None:
        """Take costs that became known after the pruner was built, with the shapes of the inputs they are of."""
        self.record.input_shapes = shapes
        self._pruner().set_cost(cost)
        say_whole(self.record)
        if self.settings.target_kind == "macs":
            self._print_ceiling()

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
        self._detach()
        self._cut_if_due(trainer, pl_module)
        self.prepare_epoch(trainer, pl_module)
        follow_cut(trainer, pl_module)
        self._watching().start_epoch()

    def _cut_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner = self._pruner()
        if not pruner.cut_due(trainer.current_epoch):
            return
        if self.settings.target_kind == "macs" and self.record.cost.fixed_macs is None:
            return  # only before the very first batch, which measures and comes back here
        self._agree(trainer)
        if self.record.cost.fixed_macs is None:  # nobody measured, but training has shown which layers must stay whole
            pruner.set_cost(bsdp.measure_cost(pruner.network, new_bias=self.new_bias))
            if pruner.scheduled == 0:
                say_whole(self.record)
        self._watching().check_scores()
        stage = self._basis_stage()
        if stage is not None:
            seed, batches = pruner.scheduled, self.curvature_batches
            complete_scores(trainer, pl_module, stage.scores, batches=batches, seed=seed)
            say_few_terms(stage.scores, epoch=trainer.current_epoch)
        self.prepare_cut(trainer, pl_module)
        if pruner.cut(trainer.current_epoch, optimizers=trainer.optimizers):
            rewrap(trainer)
            forget_graphs()
            if self.recalibration_batches:
                recalibrate(trainer, pl_module, self.recalibration_batches)
            rank_zero_info(
                f"bsdp: epoch {trainer.current_epoch}: round {self.record.rounds[-1].round} of "
                f"{pruner.settings.rounds} {describe_cut(self.record)}"
            )

    def prepare_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has to happen as an epoch starts, after the cut if one was due."""

    def _basis_stage(self) -> BasisStage | None:
        stage = self._pruner().stages.get("basis")
        return stage if isinstance(stage, BasisStage) else None

    def prepare_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has to happen just before a cut."""

    def _watching(self) -> BatchWatch:
        assert self._watch is not None
        return self._watch

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.detach()
        self._costs.close()
