"""`IterativeBasisPruning`: remove the weakest bases round by round while any LightningModule trains."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from bsdp._checks import check_at_least, check_whole
from bsdp.callbacks._basis_rounds import BasisRoundPruning
from bsdp.callbacks._latency import TableOfRun
from bsdp.callbacks._rebase_choice import LEAST_WARMUP, rebase_settings
from bsdp.callbacks._trainer_checks import check_scales
from bsdp.cost import ModelCost
from bsdp.importance import Importance
from bsdp.latency import LatencyTable
from bsdp.layers import named_pairs
from bsdp.pruner import IterativePruner, PruningSettings, largest_removable_share
from bsdp.round_settings import ANY_ROUNDS
from bsdp.selection import least_rank


class IterativeBasisPruning(BasisRoundPruning):
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
    ``bsdp/latency``             nanoseconds of a pass by the latency table, where there is one
    ``bsdp/bases_kept``, ...     the same as shares of the original (``params_kept``, ``macs_kept``, ``latency_kept``)
    ``bsdp/rank/<layer>``        rank per group of each layer
    ``bsdp/accuracy_before``     monitored value at the last validation before a cut
    ``bsdp/accuracy_after``      monitored value at the first validation after it
    ============================ ===================================================================

    Args:
        target: Share of the original network to remove, in (0, 1): 0.7 means that 70 % are gone.
        target_kind: What `target` counts: ``params``, ``macs`` (multiply-adds), ``bases`` or ``latency`` (time by a
            table of the layers on one machine, so that the run and its resumption do not depend on the machine's day).
        rounds: Number of cuts. Default: as many as fit into the trainer's `max_epochs` when the run begins.
        schedule: How the removal is spread: ``cubic`` (much at first), ``geometric`` (the same share of what is left)
            or ``constant`` (the same share of the original).
        warmup_epochs: Epochs before the first cut; they give the reference value. With two or more the bases can be
            chosen by the loss, see `rebase`.
        epochs_per_round: Epochs of training after each cut; epochs left at the end train the final structure.
        importance: ``mean_square`` (Taylor terms squared per minibatch), ``mean_abs``, ``fisher`` (squared per example,
            for few samples), ``second_order`` (with the curvature, from some training batches read before each cut),
            ``energy``, ``magnitude`` or ``sigma_energy`` (share of a layer's energy that would be gone). See
            `bsdp.ScoreAccumulator`.
        score_momentum: Weight, in [0, 1), of the scores that the bases had in earlier rounds; 0: only the newest count.
        curvature_batches: Training batches that ``importance: second_order`` reads before each cut. The loss is that
            which ``training_step`` returns for them, in float32 where precision is mixed; nothing is logged.
        ranking: ``importance`` removes the least important bases first, ``per_cost`` the least important per unit of
            cost, ``hull`` cuts a layer only where it gets below its break-even rank, ``local`` removes the same share
            of every layer, ``isomorphic`` the same share of every class of layers of the same shape. With few images
            of each class scores of different layers are hard to compare, and the last two lose less.
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
            before every cut; also keeps factors well conditioned while weights train). That epoch gives the scores.
            ``auto``: ``warmup`` by the metric ``kfac`` where the loss is one over scores of classes (cross entropy of
            any kind), ``training_step`` can be run beside the training, one loader gives batches of a dataset that is
            no stream, and the warm-up has two epochs; else ``never``, and the run says why. With a `metric` of your
            own it is ``warmup``.
        metric: By what they are chosen then: ``euclidean``, ``activation`` (what bases contribute to the layers'
            outputs on training batches) or ``kfac`` (what errors there do to the loss; needs two warm-up epochs).
            Default: ``kfac`` with ``rebase: auto``, else ``activation``.
        centred: Order bases by the variance of what they put out instead of its power; goes with `mean_to_bias`.
        shrinkage: How much of white inputs is mixed into what is measured, in [0, 1]. null: as much as the spread
            between the examples suggests.
        calibration_batches: Training batches that `rebase` reads each time.
        mean_to_bias: Move the mean output of removed bases into biases.
        min_rank: Rank that every layer keeps at least.
        max_layer_ratio: Largest share of a layer's rank that one round may remove.
        rank_multiple: Layers are cut to ranks that are multiples of it, as wide as the vectors of the hardware; 1 for
            any rank.
        latency_table: File of `bsdp latency`. Default: with ``target_kind: latency`` the table is measured as the run
            begins, and written into the run folder. With any other `target_kind` a table says which layers are
            faster as one layer. A resumed run goes on with the table it began with.
        latency_batch_size: Examples in a pass when the table is measured.
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
        target_kind: Literal["params", "macs", "bases", "latency"] = "params",
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = LEAST_WARMUP,
        epochs_per_round: int = 1,
        importance: Importance = "mean_square",
        score_momentum: float = 0.0,
        curvature_batches: int = 8,
        ranking: Literal["importance", "per_cost", "hull", "local", "isomorphic"] = "per_cost",
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
        rank_multiple: int = 1,
        latency_table: str | None = None,
        latency_batch_size: int = 1,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        if rounds is not None:
            check_at_least("rounds", rounds, 1)
        check_whole("curvature_batches", curvature_batches, 1)
        settings = PruningSettings(
            target=target,
            target_kind=target_kind,
            rounds=rounds or ANY_ROUNDS,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
            importance=importance,
            score_momentum=score_momentum,
            ranking=ranking,
            tolerance=tolerance,
            mode=mode,
            patience_rounds=patience_rounds,
            sparsifier=sparsifier,
            sparsity_weight=sparsity_weight,
            distillation=distillation,
            distillation_temperature=distillation_temperature,
            distillation_module=distillation_module,
            **rebase_settings(rebase, metric, warmup_epochs=warmup_epochs, importance=importance),
            centred=centred,
            shrinkage=shrinkage,
            mean_to_bias=mean_to_bias,
            min_rank=min_rank,
            max_layer_ratio=max_layer_ratio,
            rank_multiple=rank_multiple,
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
        self.latency = TableOfRun(LatencyTable, path=latency_table, batch_size=latency_batch_size)
        self.needs_example = target_kind == "latency" or latency_table is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a latency table that cannot be read, unless the run goes on with that of its checkpoint."""
        self.latency.check(self._loaded)
        super().on_fit_start(trainer, pl_module)

    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> IterativePruner:
        """Make the pruner, with the latency table if there is to be one."""
        if self.needs_example or self.latency.is_saved(self._loaded):
            table = self.latency.find(pl_module, network=network, shapes=shapes, loaded=self._loaded)
            cost = cost if table is None else cost.with_latency(table)
        return IterativePruner(pl_module, self.settings, cost, network=network, monitor=self.monitor)

    def check_module(self, pl_module: LightningModule) -> None:
        """Refuse a module without decomposed layers."""
        if not named_pairs(pl_module):
            raise ValueError(
                "`IterativeBasisPruning` found no decomposed layer: add `bsdp.callbacks.BasisDecomposition()` to the "
                "trainer's callbacks, too."
            )

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse scaling factors that do not train."""
        if self._pruner().needs_gradients:
            check_scales(trainer.optimizers, named_pairs(self._pruner().network))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, the latency table included."""
        return self.latency.added_to(super().state_dict())

    def ceiling(self) -> str:
        """The largest target, in words."""
        share = largest_removable_share(self.record.cost, self.settings)
        return (
            f"with rank {least_rank(self.settings.min_rank, self.settings.rank_multiple)} in every decomposed layer, "
            f"{share:.1%} of the {self.settings.target_kind} would be gone: no target goes beyond"
        )
