"""`DoublePruning`: prune bases and channels of one decomposed module, the split found during the run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bsdp._checks import check_at_least, check_whole
from bsdp.callbacks._basis_rounds import BasisRoundPruning
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._measuring import as_parameters, call_network, example_of, spread_batches
from bsdp.callbacks._processes import mean_over_processes
from bsdp.callbacks._rebase_choice import LEAST_WARMUP, rebase_settings
from bsdp.callbacks._trainer_checks import check_scales, refuse_frozen_scales
from bsdp.cost import ModelCost
from bsdp.double_pruner import DoublePruner, DoublePruningSettings, Outputs
from bsdp.importance import Importance
from bsdp.layers import named_pairs
from bsdp.probing import evaluating, first_tensor
from bsdp.round_settings import ANY_ROUNDS


class DoublePruning(BasisRoundPruning):
    """Prune bases and channels of a decomposed module while it trains, to one budget and within one tolerance.

    Goes with `BasisDecomposition`, as `IterativeBasisPruning` does, and works like it but that every round cuts bases
    or channels. With ``split: auto`` both cuts are tried on the spot, and the one that changes the outputs on some
    validation images less is made. After a cut of channels the pairs are multiplied out and decomposed again.

    Logged at every epoch is what `IterativeBasisPruning` logs, and ``bsdp/channels``, ``bsdp/channels_kept`` and
    ``bsdp/channels/<layer>``.

    Args:
        target: Share of the original network to remove, in (0, 1): 0.7 means that 70 % are gone.
        target_kind: What `target` counts: ``params`` or ``macs`` (multiply-adds).
        order: ``basis_then_channel`` (bases until a cut of channels does less harm, from then on channels),
            ``channel_then_basis`` (the other way round), or ``alternate`` (whichever does less harm, in every round).
        split: Share of the removal that bases take, in [0, 1]; ``auto`` finds it on validation images.
        probe_batches: Validation batches on which ``split: auto`` compares outputs, of images from all over the loader.
        criterion: How channels are scored, see `ChannelPruning` (not the two that train factors of their own).
        channel_ranking: How scores of different groups of channels compare, see `ChannelPruning`.
        importance: How bases are scored, see `IterativeBasisPruning`.
        score_momentum: Weight of the scores that bases had in earlier rounds, see there; a cut of channels ends it.
        curvature_batches: Training batches that ``importance: second_order`` reads, see there.
        ranking: How scores of bases of different layers compare, see there.
        rounds: Number of cuts. Default: as many as fit into the trainer's `max_epochs` when the run begins.
        schedule: How the removal is spread: ``cubic`` (much at first), ``geometric`` or ``constant``.
        warmup_epochs: Epochs before the first cut; they give the reference value. With two or more the bases can be
            chosen by the loss, see `rebase`.
        epochs_per_round: Epochs of training after each cut; epochs left at the end train the final structure.
        tolerance: Largest allowed fall of the monitored value below the reference, as a fraction (0.01 = 1 point).
            null: prune to the budget whatever happens.
        monitor: Name of the logged validation metric.
        mode: ``max`` if a higher value is better, else ``min``.
        patience_rounds: Rounds in a row that may end below the tolerance; 1 stops after the first.
        sparsifier: ``l1``: until the last cut, a penalty of `sparsity_weight` times the sum of the absolute scaling
            factors, so that fewer bases matter when they are cut. Scores do not see it.
        sparsity_weight: Weight of that penalty.
        recalibration_batches: After each cut, recompute the running statistics of all batch norms on so many training
            batches, in eval mode; 0 for none. See `bsdp.recalibrate_batch_norms`.
        distillation: Weight, in [0, 1], of what the unpruned model (as it was at the reference) says, against the loss,
            after the first cut; 0 for none. Works with any loss; costs a second copy of the network and one forward
            pass per batch. Scores see the gradient of both.
        distillation_temperature: Temperature of the class probabilities that are compared.
        distillation_module: Dotted name of the module that returns the class scores ``[batch, classes]``. Default: the
            one child of the module with parameters, else the module itself.
        rebase: When bases are chosen anew, keeping ranks and function: ``never``, ``warmup`` (at the start of the last
            warm-up epoch, when head and batch norms were trained) or ``every_round`` (at the start of the last epoch
            before every cut, for a cut of channels puts other bases in their place). ``auto``: ``warmup`` by the metric
            ``kfac`` where the run allows it, see `IterativeBasisPruning`.
        metric: By what they are chosen then: ``euclidean``, ``activation`` (what bases contribute to the layers'
            outputs on training batches) or ``kfac`` (what errors there do to the loss; needs two warm-up epochs).
            Default: ``kfac`` with ``rebase: auto``, else ``activation``.
        centred: Order bases by the variance of what they put out instead of its power; goes with `mean_to_bias`.
        shrinkage: How much of white inputs is mixed into what is measured, in [0, 1]. null: as much as the spread
            between the examples suggests.
        calibration_batches: Training batches that `rebase` reads each time.
        mean_to_bias: Move the mean output of removed bases, and the mean of removed channels, into biases.
        min_rank: Rank that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one round may remove.
        min_channels: Channels that every group keeps at least.
        max_group_ratio: Largest share of a group of channels that one round may remove.
        round_to: Leave multiples of so many channels in every group that is cut.
        exclude: Names of layers whose channels must stay, relative to the network.
        restore_best: End with the smallest model that met the tolerance; false: with the last one.
        save_pruned: Write ``pruned.ckpt`` and ``pruned.safetensors``.

    Attributes:
        checkpoint_path: The Lightning checkpoint of the final module, once it is written.
        weights_path: The folded network, once it is written.
    """

    needs_example = True

    def __init__(
        self,
        *,
        target: float = 0.7,
        target_kind: Literal["params", "macs"] = "params",
        order: Literal["basis_then_channel", "channel_then_basis", "alternate"] = "alternate",
        split: float | Literal["auto"] = "auto",
        probe_batches: int = 4,
        criterion: Literal[
            "taylor_2016", "taylor_2019", "l1", "l2", "fpgm", "bn_scale", "activation_cumsum", "random"
        ] = "taylor_2019",
        channel_ranking: Literal["global", "per_cost", "local", "isomorphic", "priority"] = "per_cost",
        importance: Importance = "mean_square",
        score_momentum: float = 0.0,
        curvature_batches: int = 8,
        ranking: Literal["importance", "per_cost", "hull", "local", "isomorphic"] = "per_cost",
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = LEAST_WARMUP,
        epochs_per_round: int = 1,
        tolerance: float | None = 0.01,
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        patience_rounds: int = 1,
        sparsifier: Literal["none", "l1"] = "none",
        sparsity_weight: float = 0.0,
        recalibration_batches: int = 0,
        distillation: float = 0.0,
        distillation_temperature: float = 2.0,
        distillation_module: str | None = None,
        rebase: Literal["auto", "never", "warmup", "every_round"] = "auto",
        metric: Literal["euclidean", "activation", "kfac"] | None = None,
        centred: bool = False,
        shrinkage: float | None = None,
        calibration_batches: int = 16,
        mean_to_bias: bool = True,
        min_rank: int = 1,
        max_layer_ratio: float = 0.95,
        min_channels: int = 1,
        max_group_ratio: float = 0.5,
        round_to: int = 1,
        exclude: list[str] | None = None,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        if rounds is not None:
            check_at_least("rounds", rounds, 1)
        check_whole("curvature_batches", curvature_batches, 1)
        check_at_least("probe_batches", probe_batches, 1)
        settings = DoublePruningSettings(
            target=target,
            target_kind=target_kind,
            rounds=rounds or ANY_ROUNDS,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
            tolerance=tolerance,
            mode=mode,
            patience_rounds=patience_rounds,
            sparsifier=sparsifier,
            sparsity_weight=sparsity_weight,
            distillation=distillation,
            distillation_temperature=distillation_temperature,
            distillation_module=distillation_module,
            criterion=criterion,
            channel_ranking=channel_ranking,
            min_channels=min_channels,
            max_group_ratio=max_group_ratio,
            round_to=round_to,
            exclude=tuple(exclude or ()),
            order=order,
            split=split,
            importance=importance,
            score_momentum=score_momentum,
            ranking=ranking,
            **rebase_settings(rebase, metric, warmup_epochs=warmup_epochs, importance=importance),
            centred=centred,
            shrinkage=shrinkage,
            mean_to_bias=mean_to_bias,
            min_rank=min_rank,
            max_layer_ratio=max_layer_ratio,
        )
        super().__init__(
            settings,
            rebase=rebase,
            metric=metric,
            calibration_batches=calibration_batches,
            rounds=rounds,
            monitor=monitor,
            restore_best=restore_best,
            save_pruned=save_pruned,
            recalibration_batches=recalibration_batches,
        )
        self.new_bias = mean_to_bias
        self.curvature_batches = curvature_batches
        self.probe_batches = probe_batches

    def check_module(self, pl_module: LightningModule) -> None:
        """Refuse a module without decomposed layers."""
        if not named_pairs(pl_module):
            raise ValueError(
                "`DoublePruning` found no decomposed layer: add `bsdp.callbacks.BasisDecomposition()` to the trainer's "
                "callbacks, too. To prune channels alone, use `ChannelPruning`."
            )

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse scores that do not train, and an automatic split without outputs for validation images."""
        pruner = self._pruner()
        assert isinstance(pruner, DoublePruner)
        if pruner.stages["basis"].needs_gradients:
            check_scales(trainer.optimizers, named_pairs(pruner.network))
        refuse_frozen_scales(pruner.channel)
        if self.settings.split == "auto" and not trainer.enable_validation:
            raise ValueError(
                "`split: auto` compares cuts on validation images, and there is no validation loader: give one, or "
                f"{_WAY_OUT}."
            )
        if self.settings.split == "auto":
            self._prepare_probe(trainer, trainer.lightning_module)

    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> DoublePruner:
        """Make the pruner."""
        part = pl_module.get_submodule(network) if network else pl_module
        example = example_of(shapes, part)
        return DoublePruner(pl_module, self.settings, example, cost=cost, network=network, monitor=self.monitor)

    def ceiling(self) -> str:
        """The largest target, in words."""
        pruner = self._pruner()
        assert isinstance(pruner, DoublePruner)
        return (
            f"{len(pruner.channel.groups)} groups of channels can be pruned besides the bases; at most "
            f"{pruner.largest_share():.1%} of the {self.settings.target_kind} would be gone"
        )

    def _prepare_probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch the validation images on which cuts are compared, and find out whether the module takes them."""
        pruner = self._pruner()
        assert isinstance(pruner, DoublePruner)
        if trainer.val_dataloaders is None:  # with `check_val_every_n_epoch`, up to the first validation
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        with random_state_kept(seed=0):  # the same images in a resumed run
            batches = spread_batches(trainer.val_dataloaders, self.probe_batches)
            found = [first_tensor(trainer.strategy.batch_to_device(batch)) for batch in batches]
        images = [as_parameters(tensor, pl_module) for tensor in found if tensor is not None]
        if not images:
            raise ValueError(
                "`split: auto` reads the first floating-point tensor of a validation batch, and there is none: "
                f"{_WAY_OUT}."
            )

        def probe() -> Outputs:
            with evaluating(pl_module):
                return _joined([_float_tensors(call_network(pl_module, tensor)) for tensor in images])

        def average(value: float) -> float:
            return float(mean_over_processes(trainer, torch.tensor(value, device=trainer.strategy.root_device)))

        try:
            probe()
        except Exception as error:  # whatever the user's forward may raise on an input we guessed
            raise ValueError(
                f"`split: auto` compares what {type(pl_module).__name__} gives for the first floating-point tensor of "
                f"validation batches, and that failed ({type(error).__name__}: {error}): let `forward` take such a "
                f"tensor and return tensors, or {_WAY_OUT}."
            ) from error
        pruner.probe, pruner.average = probe, average

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how the removal was split, then leave the smallest tolerated model."""
        if not trainer.fast_dev_run and len(self.record.rounds) > 1:  # type: ignore[attr-defined]
            cuts = [entry.stage for entry in self.record.rounds[1:]]
            rank_zero_info(f"bsdp: cuts by round: {', '.join(cuts)}")
        super().on_train_end(trainer, pl_module)


_WAY_OUT = "set `split` to the share of the removal that bases shall take, such as 0.7"


def _float_tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _joined(batches: list[list[Tensor]]) -> Outputs:
    """Outputs of several batches, one after the other; each a list of the same length."""
    if not batches[0]:
        raise ValueError("there is no floating-point tensor in its output")
    joined = [torch.cat([t if t.dim() else t[None] for t in tensors]) for tensors in zip(*batches, strict=True)]
    return joined[0] if len(joined) == 1 else tuple(joined)
