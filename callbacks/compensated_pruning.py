"""`CompensatedPruning`: when a fit has ended, remove channels and let the others do their work, without training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Literal

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from bsdp._checks import check_share
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import call_network, callable_part, example_of, own_iterator
from bsdp.callbacks._records import describe_cut
from bsdp.callbacks._round_pruning import RoundPruning
from bsdp.channel_compensation import collect_input_moments
from bsdp.compensated_pruner import CompensatedPruner, CompensationSettings
from bsdp.compiling import forget_graphs, uncompiled
from bsdp.cost import ModelCost
from bsdp.folding import refuse_pairs
from bsdp.probing import evaluating, first_tensor
from bsdp.round_settings import RoundSettings
from bsdp.snapshots import load_values

_NOTABLE = 0.005  # difference of two accuracies that ought to be one


class CompensatedPruning(RoundPruning):
    """Prune the channels of a module once, when the fit has ended, without training it (CaP).

    The fit is an ordinary one, and gives the reference: its best epoch by `monitor`. Then second moments of what each
    layer reads are collected from a share of the training data; channels are ordered by greedy forward selection; group
    after group loses as many as its share of the tolerance allows, by a binary search; and the weights and biases of
    the layers that read them are replaced in closed form. Everything else is as in `ChannelPruning`: the groups of
    channels that go together, one round in the report, files, resuming.

    The search evaluates top-1 accuracy, ``module(images)`` against integer labels, on the first validation loader; so
    batches must be (images, labels), and `monitor` should be that accuracy. The test data are not touched.

    PUBLISHED (Xie et al., arXiv 2108.13728, abstract): compensation by statistics of a fraction of the data, a binary
    search for the structure with a step constraint, no training; competitive with a tenth of the data. CODE: the
    formulas of `bsdp.compensation` and `bsdp.structural_search`, and 0.2 as the fraction. OURS: groups that several
    layers read, the correction of a mean by a batch norm, positions on a grid, `target`, the best epoch as the start.

    Args:
        tolerance: How far validation accuracy may fall, as a fraction (0.01 = 1 point). null: prune to `target` alone,
            by what cannot be reconstructed, without labels.
        target: Share of the original network to remove at most, in (0, 1). Default: what the tolerance allows.
        target_kind: What `target` counts: ``params``, ``macs`` (multiply-adds) or ``channels``.
        data_fraction: Share of the training batches that are looked at, in (0, 1].
        max_ratio: Largest share of a group of channels that may go, in (0, 1).
        max_positions: Positions per image that count in the moments of a layer; null for all.
        restore_variance: Scale outputs that go into a batch norm to the variance they had.
        monitor: Name of the logged validation metric whose best epoch is pruned.
        exclude: Names of layers whose channels must stay, relative to the network.
        restore_best: Keep the unpruned model if the pruned one is not within the tolerance.
        save_pruned: Write ``pruned.ckpt`` and ``pruned.safetensors``.

    Attributes:
        checkpoint_path: The Lightning checkpoint of the final module, once it is written.
        weights_path: The folded network, once it is written.
        summary_details: What the summary says beside the usual: groups, losses, accuracy before and after.
    """

    needs_example = True

    def __init__(
        self,
        *,
        tolerance: float | None = 0.01,
        target: float | None = None,
        target_kind: Literal["params", "macs", "channels"] = "params",
        data_fraction: float = 0.2,
        max_ratio: float = 0.9,
        max_positions: int | None = 64,
        restore_variance: bool = True,
        monitor: str = "val_accuracy",
        exclude: list[str] | None = None,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        if data_fraction != 1:
            check_share("data_fraction", data_fraction)
        check_share("max_ratio", max_ratio)
        settings = CompensationSettings(
            target=max_ratio if target is None else target,
            target_kind="channels" if target is None else target_kind,
            budgeted=target is not None,
            tolerance=tolerance,
            max_group_ratio=max_ratio,
            max_positions=max_positions,
            restore_variance=restore_variance,
            exclude=tuple(exclude or ()),
        )
        super().__init__(settings, rounds=1, monitor=monitor, restore_best=restore_best, save_pruned=save_pruned)
        self.data_fraction = data_fraction
        self.summary_details: dict[str, Any] = {}

    # --- before the fit -----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.summary_details = {}
        if trainer.world_size > 1:
            raise ValueError(
                f"`CompensatedPruning` runs in one process, here are {trainer.world_size}: set `devices: 1`. To prune "
                "a network that was trained on several devices, load it and call `bsdp.compensated_prune`."
            )

    def check_module(self, pl_module: LightningModule) -> None:
        """Refuse a decomposed module."""
        refuse_pairs(pl_module)

    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> CompensatedPruner:
        """Make the pruner."""
        part = pl_module.get_submodule(network) if network else pl_module
        example = example_of(shapes, part)
        return CompensatedPruner(pl_module, self.settings, example, cost=cost, network=network, monitor=self.monitor)

    def schedule(self, trainer: Trainer, *, rounds: int | None, first_epoch: int) -> RoundSettings:
        """One round, after any number of epochs; its validation data must have labels."""
        _length(trainer)
        if self.settings.tolerance is not None:
            if not trainer.enable_validation:
                raise ValueError(
                    f"`CompensatedPruning(tolerance={self.settings.tolerance})` evaluates on validation data, and "
                    "there is no validation loader. Give one, or set `tolerance: null` and a `target`."
                )
            with random_state_kept():
                batch = next(self._batches(trainer), None)
            if batch is not None:
                _labelled(batch)
        settings: RoundSettings = replace(self.settings, rounds=1)
        return settings

    # --- after it -----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, then as in `RoundPruning`."""
        if not trainer.fast_dev_run and self._pruner().scheduled == 0:  # type: ignore[attr-defined]
            with random_state_kept():
                self._prune(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _prune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruner, stage = self._pruner(), self._pruner().stage
        evaluates = self.settings.tolerance is not None
        if evaluates:
            if self.record.reference_state is not None:
                load_values(pl_module, self.record.reference_state)
            self._compare_reference(self._accuracy(trainer, pl_module))
            stage.evaluate, stage.tolerance = lambda: self._accuracy(trainer, pl_module), self.settings.tolerance
        count = math.ceil(self.data_fraction * _length(trainer))
        rank_zero_info(f"bsdp: compensated pruning: moments from {count} training batches")
        stage.moments = collect_input_moments(
            callable_part(pl_module),
            self._examples(trainer, count),
            stage.readers(),
            max_positions=self.settings.max_positions,
        )
        if pruner.cut(trainer.current_epoch, optimizers=trainer.optimizers):
            forget_graphs()
            self._tell(stage.result, evaluates)
        stage.moments = stage.evaluate = None

    def _compare_reference(self, value: float) -> None:
        """The search goes by our accuracy, so what is tolerated must, too."""
        logged = self.record.reference
        if logged is not None and abs(value - logged) > _NOTABLE:
            rank_zero_warn(
                f"{self.monitor!r} was {logged:.4f}, while top-1 accuracy on the validation data is {value:.4f}: "
                "pruning goes by the latter. `monitor` should name an accuracy of all validation images."
            )
        self._pruner().observe(value)
        self.record.reference = value

    def _tell(self, result: Any, evaluates: bool) -> None:
        if evaluates:
            self._pruner().observe(result.value)
        self.summary_details = {"compensation": asdict(result)}
        for name, reason in result.skipped.items():
            rank_zero_info(f"bsdp: the channels of {name} stay: {reason}")
        values = (
            f", validation accuracy {result.reference:.4f} -> {result.value:.4f} ({result.evaluations} evaluations)"
            if evaluates
            else ""
        )
        rank_zero_info(f"bsdp: compensated pruning {describe_cut(self.record)}{values}")

    # --- data ---------------------------------------------------------------------------------------------------

    def _batches(self, trainer: Trainer) -> Iterator[Any]:
        """Validation batches of the first loader, as many as a validation reads."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()  # a resumed run that has nothing left to train may not have done so
        most = trainer.num_val_batches[0] if trainer.num_val_batches else 0
        batches = own_iterator(trainer.val_dataloaders)
        for batch in batches if most == math.inf else islice(batches, int(most)):
            yield _moved(trainer, batch)

    def _examples(self, trainer: Trainer, count: int) -> Iterator[Tensor]:
        for batch in islice(own_iterator(trainer.train_dataloader), count):
            example = first_tensor(_moved(trainer, batch))
            if example is not None:
                yield example

    def _accuracy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Top-1 accuracy on the validation data, in the precision of a validation."""
        right = total = 0
        with evaluating(pl_module), uncompiled(), trainer.precision_plugin.val_step_context():
            for batch in self._batches(trainer):
                images, labels = _labelled(batch)
                right += int((call_network(pl_module, images).argmax(1) == labels).sum())
                total += len(labels)
        return right / max(1, total)

    def _pruner(self) -> CompensatedPruner:
        assert isinstance(self.pruner, CompensatedPruner)
        return self.pruner


def _length(trainer: Trainer) -> float:
    """Training batches per epoch."""
    batches = trainer.num_training_batches
    if batches == math.inf:
        raise ValueError("`data_fraction` of a training loader without length is not known: set `limit_train_batches`.")
    return float(batches)


def _moved(trainer: Trainer, batch: Any) -> Any:
    """A batch as a validation step gets it; the module has left the device when the fit was over before it began."""
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    return move_data_to_device(trainer.strategy.batch_to_device(batch, dataloader_idx=0), module.device)


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch.

    Raises:
        ValueError: If it holds anything else.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        images, labels = batch
        if images.is_floating_point() and not labels.is_floating_point() and labels.shape == images.shape[:1]:
            return images, labels
    raise ValueError(
        "`CompensatedPruning` evaluates top-1 accuracy on validation batches (images, labels) with one whole number "
        f"per image, and got {_described(batch)}. Set `tolerance: null` and a `target` to prune without labels, or "
        "call `bsdp.compensated_prune` with an `evaluate` of your own."
    )


def _described(batch: Any) -> str:
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    words = [f"{p.dtype} {list(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    return f"{type(batch).__name__} of {', '.join(words)}"
