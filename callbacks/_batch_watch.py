"""What a pruning callback attaches to the network for the length of a batch."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from bsdp.basis_stage import BasisStage
from bsdp.callbacks._gradient_reach import GradientReach
from bsdp.callbacks._monitoring import loss_scale, watched
from bsdp.callbacks._unfollowed_readers import UnfollowedReaders
from bsdp.channel_pruner import ChannelStage
from bsdp.importance import DATA_FREE
from bsdp.rounds import RoundPruner


class BatchWatch:
    """Attaches to every batch what its training has to show: scores and statistics, teacher, what to refuse.

    Args:
        pruner: Whose scores and statistics are taken.
        stage: Its stage of bases, if it has one.
    """

    def __init__(self, pruner: RoundPruner, stage: BasisStage | None) -> None:
        self.pruner, self.stage = pruner, stage
        self.reach: GradientReach | None = None  # until the first cut
        if stage is not None and stage.scores.importance not in ("energy", *DATA_FREE):
            self.reach = GradientReach(stage.pairs, stage.scores.importance)
        self.step = 0  # of the epoch, counted under manual optimization only
        self._stepped = self._manual = False
        channel = pruner.stages.get("channel")
        self.readers = UnfollowedReaders(channel) if isinstance(channel, ChannelStage) else None  # until then, too
        self._attached = ExitStack()

    def start_epoch(self) -> None:
        """Scores and what is missing from them are those of one epoch."""
        self.step, self._stepped = 0, False
        self.pruner.start_epoch()
        if self.reach is not None:
            self.reach.start_epoch()

    def attach(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Watch one batch, up to `detach`."""
        self.detach()
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        distillation = self.pruner.distillation
        # The teacher stands from the first cut on; before, the first batch shows that there is something to hold.
        if distillation is not None and (distillation.started or distillation.seen == 0):
            self._attached.enter_context(self.pruner.distilling(loss_scale(trainer) / parts))
        self._manual = not pl_module.automatic_optimization
        self.step, self._stepped = self.next_step, False
        step = self.step if self._manual else batch_idx // parts
        scores = any(stage.needs_hooks for stage in self.pruner.stages.values())
        wanted = watched(trainer, step, parts=parts, scores=scores)
        if any(wanted.values()):
            self._attached.enter_context(self.pruner.collecting(loss_scale(trainer), parts, **wanted))
        if self.reach is not None and (batch_idx == 0 or not self.reach.called):
            self._attached.enter_context(self.reach.watching())
        if self.readers is not None:
            self._attached.enter_context(self.readers.watching(pl_module, batch_idx))

    @property
    def next_step(self) -> int:
        """Number of the step that the next batch belongs to, where the module itself decides when to step."""
        return self.step + self._stepped

    def also(self, context: AbstractContextManager[Any]) -> None:
        """Keep a context of somebody else up to `detach`, too."""
        self._attached.enter_context(context)

    def detach(self) -> None:
        """Leave no hook behind; validation, for one, must not count."""
        self._attached.close()

    def note_gradients(self, optimizer: Optimizer) -> None:
        """Note which layers have a gradient, before a step of an optimizer."""
        if self._manual and not self._stepped:
            self._stepped = any(stage.holds(optimizer) for stage in self.pruner.stages.values())
        if self.reach is not None:
            self.reach.note_gradients()

    def check_taught(self, pl_module: LightningModule, outputs: Any) -> None:
        """Refuse, after the first batch, a distillation whose module was never called.

        Args:
            pl_module: The module.
            outputs: What its ``training_step`` gave.
        """
        distillation = self.pruner.distillation
        # Automatic optimization gives nothing for a batch that the module skips.
        trained = bool(outputs) or not pl_module.automatic_optimization
        if distillation is not None and distillation.seen == 0 and trained:
            raise ValueError(
                f"`distillation` needs the class scores of every batch, but `training_step` did not call "
                f"{distillation.shown}: call it there (`self(...)`, not `self.forward(...)`), name the module that "
                "returns them in `distillation_module`, or set `distillation: 0`."
            )

    def problem(self) -> str:
        """Why a cut cannot be made by the scores of this epoch; "" if it can."""
        return next((part.problem() for part in (self.readers, self.reach) if part is not None and part.problem()), "")

    def check_scores(self) -> None:
        """Refuse a cut that cannot be made; it is only looked for before the first one."""
        problem = self.problem()
        if problem:
            raise ValueError(problem)
        self.reach = self.readers = None
