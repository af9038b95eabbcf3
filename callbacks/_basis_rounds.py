"""What the callbacks that prune bases add to `RoundPruning`: bases chosen anew beside a trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from bsdp._checks import check_whole
from bsdp.callbacks._calibration import Moments, module_moments
from bsdp.callbacks._rebase_choice import why_not_kfac
from bsdp.callbacks._round_pruning import RoundPruning
from bsdp.rebasing import BasisRoundPruner
from bsdp.round_settings import RoundSettings


class BasisRoundPruning(RoundPruning):
    """Base of the callbacks whose pruner is a `BasisRoundPruner`; not for use on its own.

    Args:
        settings: What to do, with `rebase` and `metric` as `rebase_settings` gives them.
        rebase: As the user gave it.
        metric: As the user gave it.
        calibration_batches: Training batches that are read when bases are chosen anew.
        options: Of `RoundPruning`.
    """

    def __init__(
        self, settings: RoundSettings, *, rebase: str, metric: str | None, calibration_batches: int, **options: Any
    ) -> None:
        check_whole("calibration_batches", calibration_batches, 1)
        self.calibration_batches = calibration_batches
        self.chooses_itself = rebase == "auto" and metric is None
        self._bases: dict[str, Any] = {}  # settings that a run found instead of those hoped for
        super().__init__(settings, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As in `RoundPruning`; another fit may have another module."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._bases = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in `RoundPruning`; before that, find out what ``rebase: auto`` means for this run."""
        if self.chooses_itself and self._loaded is not None:  # a resumed run goes on as it began
            self._bases = self._loaded.get("bases", _NEVER)  # older files have none
        elif self.chooses_itself:
            self._choose(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reason = why_not_kfac(trainer, pl_module, self.settings)
        if reason is not None:
            self._bases = _NEVER
            rank_zero_info(f"bsdp: bases are not chosen by the loss (`rebase: auto`): {reason}")

    def schedule(self, trainer: Trainer, *, rounds: int | None, first_epoch: int) -> RoundSettings:
        """As in `RoundPruning`, with what ``rebase: auto`` means for this run."""
        return replace(super().schedule(trainer, rounds=rounds, first_epoch=first_epoch), **self._bases)

    def own_passes(self) -> list[str]:
        """As in `RoundPruning`; bases are chosen anew by what comes out of the layers, too."""
        by_outputs = self.settings.rebase != "never" and self.settings.metric != "euclidean"
        rebases = by_outputs and not self.chooses_itself  # which has tried it already
        return super().own_passes() + ([f"metric: {self.settings.metric}"] if rebases else [])

    def prepare_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose bases anew before the epoch that scores them."""
        pruner = self._pruner()
        assert isinstance(pruner, BasisRoundPruner)
        if not pruner.rebase_due(trainer.current_epoch):
            return
        metric = pruner.settings.metric
        moments: tuple[Moments, Moments] = ({}, {})
        if metric != "euclidean":
            options = {"metric": metric, "batches": self.calibration_batches, "optional": self.chooses_itself}
            moments = module_moments(trainer, pl_module, pruner.pairs, **options)
        pruner.change_bases(*moments, optimizers=trainer.optimizers)
        found = moments[1] if metric == "kfac" else moments[0] if metric == "activation" else pruner.pairs
        rank_zero_info(
            f"bsdp: epoch {trainer.current_epoch}: bases of {len(found)} of {len(pruner.pairs)} layers chosen anew, "
            f"metric {metric}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, with what ``rebase: auto`` means for it."""
        state = super().state_dict()
        return state | {"bases": self._bases} if state and self.chooses_itself else state


_NEVER = {"rebase": "never", "metric": "activation", "centred": False, "shrinkage": None}
