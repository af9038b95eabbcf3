"""Bases chosen anew in the course of a run, by what the network has become; its function and its ranks stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from bsdp._checks import check_choice
from bsdp.basis_stage import BasisStage
from bsdp.calibration import check_shrinkage, rebase
from bsdp.factorize import METRICS
from bsdp.gradient_moments import MetricCollector, inputs_and_labels
from bsdp.moments import LayerMoment
from bsdp.probing import as_inputs
from bsdp.rounds import RoundPruner

REBASE_TIMES = ("never", "warmup", "every_round")


def check_rebase_settings(settings: Any) -> None:
    """Check when and how bases are chosen anew, and refuse what would have no effect.

    Args:
        settings: With the fields ``rebase``, ``metric``, ``centred``, ``shrinkage``, ``warmup_epochs`` and
            ``score_momentum``; all but the first four are checked already.
    """
    check_choice("rebase", settings.rebase, REBASE_TIMES)
    check_choice("metric", settings.metric, METRICS)
    check_shrinkage(settings.shrinkage)
    if settings.rebase == "never":
        given = {
            "metric": settings.metric == "kfac",
            "centred": settings.centred,
            "shrinkage": settings.shrinkage is not None,
        }
        odd = next((name for name, is_given in given.items() if is_given), None)
        if odd is not None:
            raise ValueError(
                f"`{odd}={getattr(settings, odd)!r}` is about bases that are chosen anew in the course of the run, but "
                "`rebase` is 'never': set it to 'warmup' or 'every_round'."
            )
    if settings.rebase == "warmup" and settings.warmup_epochs == 0:
        raise ValueError("`rebase='warmup'` needs `warmup_epochs` of at least 1, got 0: set it, or 'every_round'.")
    if settings.rebase == "every_round" and settings.score_momentum:
        raise ValueError(
            f"`score_momentum={settings.score_momentum}` averages scores of the same bases, but `rebase='every_round'` "
            "chooses others before every cut: set `rebase` to 'warmup', or `score_momentum` to 0."
        )
    if settings.rebase != "never" and settings.metric == "kfac" and settings.warmup_epochs < 2:
        raise ValueError(
            f"`metric='kfac'` needs `warmup_epochs` of at least 2, got {settings.warmup_epochs}: an epoch that trains "
            "the head, without which gradients mean nothing, and one that scores the new bases."
        )


class BasisRoundPruner(RoundPruner):
    """A pruner in rounds with a stage ``basis``, whose bases can be chosen anew; see `RoundPruner` for the rest.

    Its settings have the fields that `check_rebase_settings` takes.
    """

    rebased_for = 0  # the cut (counted from 1) that bases were last chosen for

    @property
    def basis(self) -> BasisStage:
        """What scores and cuts bases."""
        return cast(BasisStage, self.stages["basis"])

    @property
    def pairs(self) -> dict[str, Any]:
        """The decomposed layers by name."""
        return self.basis.pairs

    def rebase_due(self, epoch: int) -> bool:
        """Whether bases have to be chosen anew before `epoch` trains; ask after `cut`."""
        if self.settings.rebase == "never" or self.stopped or self.scheduled >= self.settings.rounds:
            return False
        if self.rebased_for > self.scheduled or (self.settings.rebase == "warmup" and not self.warming_up):
            return False
        return epoch >= self.next_cut - 1

    def rebase(
        self,
        batches: Iterable[Any],
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        generator: torch.Generator | None = None,
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Choose the bases anew by what the network does on some batches; its function and its ranks stay.

        Args:
            batches: As in `collect_gradient_moments`; labels are of use for the KFAC metric only. None are read for the
                Euclidean one.
            loss: See `collect_gradient_moments`.
            generator: See there.
            optimizers: Optimizers to keep in step.

        Raises:
            ValueError: If there is no batch, or one does not fit.
        """
        if self.settings.metric == "euclidean":
            return self.change_bases({}, {}, optimizers=optimizers)
        collector = MetricCollector(self.pairs, self.settings.metric, loss=loss, generator=generator)
        batch = None
        with collector.collecting(self.network) as take:
            for batch in batches:
                inputs, labels = inputs_and_labels(batch)
                take(self.network(*as_inputs(inputs)), labels)
        if batch is None:
            raise ValueError("`batches` is empty: choosing bases needs at least one batch of calibration data.")
        self.change_bases(*collector.compute(), optimizers=optimizers)

    def change_bases(
        self,
        moments: Mapping[str, LayerMoment],
        gradients: Mapping[str, LayerMoment],
        *,
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Choose the bases anew by moments that somebody has collected; see `rebase`.

        Args:
            moments: Output moments of `pairs`, by the same names.
            gradients: Their gradient moments, for the KFAC metric.
            optimizers: Optimizers to keep in step.
        """
        settings = self.settings
        rebase(
            self.pairs,
            moments,
            metric=settings.metric,
            gradients=gradients,
            centred=settings.centred,
            shrinkage=settings.shrinkage,
            optimizers=optimizers,
        )
        self.basis.bases_changed()
        self.rebased_for = self.scheduled + 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {**super().state_dict(), "rebased_for": self.rebased_for}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the model must have the structure of then."""
        super().load_state_dict(state)
        self.rebased_for = int(state.get("rebased_for", 0))  # older files have none
