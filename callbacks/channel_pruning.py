"""`ChannelPruning`: remove the weakest channels round by round while any LightningModule trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from bsdp._checks import check_at_least
from bsdp.callbacks._evaluation import random_state_kept
from bsdp.callbacks._latency import TableOfRun
from bsdp.callbacks._measuring import NotReplayableError, example_of, measure_module_cost, only_network
from bsdp.callbacks._round_pruning import RoundPruning
from bsdp.callbacks._trainer_checks import is_beside, refuse_frozen_scales
from bsdp.channel_graph import channel_groups
from bsdp.channel_latency import ChannelLatencyTable
from bsdp.channel_pruner import ChannelPruner, check_plain
from bsdp.channel_scales import add_scales
from bsdp.channel_settings import SCALED, ChannelPruningSettings
from bsdp.cost import ModelCost
from bsdp.decompose import find_head
from bsdp.freezing import fixed_batch_norms, freeze
from bsdp.layers import named_pairs
from bsdp.optimizers import adopt_parameters
from bsdp.probing import first_tensor
from bsdp.round_settings import ANY_ROUNDS
from bsdp.scale_hooks import scales_of
from bsdp.widths import widths_of

Criterion = Literal[
    "taylor_2016",
    "taylor_2019",
    "l1",
    "l2",
    "fpgm",
    "bn_scale",
    "activation_cumsum",
    "channel_scaling",
    "transtailor",
    "random",
]


class ChannelPruning(RoundPruning):
    """Prune the channels of a module while it trains, down to a budget or a tolerance.

    Works on plain modules and on decomposed ones (see `BasisDecomposition`). Which channels have to go together is read
    from torch-pruning's dependency graph; a network that it cannot follow is refused before training. Everything else
    is as in `IterativeBasisPruning`: rounds, tolerance, files, resuming.

    The criteria, and what is published of them:

    ===================== ==============================================================================================
    ``taylor_2019``       Molchanov et al., CVPR 2019: squared Taylor term of a gate on the channel, per minibatch.
    ``taylor_2016``       Molchanov et al., arXiv 1611.06440: absolute mean of activation x gradient per example, l2
                          per layer, optional MACs term (`macs_penalty`).
    ``activation_cumsum`` Zhong et al., arXiv 1810.01104 (reconstructed: the formulas are not public): mean activation;
                          with ``ranking: priority`` the layer with the most redundant cumulative sum is cut first.
    ``channel_scaling``   Wong et al., arXiv 2103.12228 (reconstructed in part): a factor per channel trains on frozen
                          weights with an L1 penalty (`l1`); those below `threshold` go.
    ``transtailor``       arXiv 2103.01542 (by third parties' programs): the same factors without penalty, ranked by
                          ``abs(alpha * dL/dalpha)``. The fine-tuning of all weights that follows there is left out.
    ``bn_scale``          Network slimming, arXiv 1708.06519: batch-norm weights with an L1 penalty (`l1`).
    ``l1``, ``l2``        Norm of the filters (arXiv 1608.08710), data-free.
    ``fpgm``              Distance of the filters to all others (arXiv 1811.00250), data-free.
    ``random``            The control.
    ===================== ==============================================================================================

    Args:
        target: Share of the original network to remove, in (0, 1): 0.7 means that 70 % are gone.
        target_kind: What `target` counts: ``params``, ``macs`` (multiply-adds), ``channels`` or ``latency`` (time by a
            table of the layers at several widths on one machine; of plain modules).
        criterion: How channels are scored, see above.
        ranking: ``global`` removes the least important first, ``per_cost`` the least important per unit of cost,
            ``local`` the same share of every group of channels, ``isomorphic`` the same share of every class of groups
            with the same layers, ``priority`` the most redundant group first (for ``activation_cumsum``). With few
            images of each class scores are noise, and ``local`` or ``isomorphic`` lose less. Default: ``priority`` for
            ``activation_cumsum``, else ``per_cost`` for a budget of MACs or latency, else ``global``.
        rounds: Number of cuts. Default: as many as fit into the trainer's `max_epochs` when the run begins.
        schedule: How the removal is spread: ``cubic`` (much at first), ``geometric`` or ``constant``.
        warmup_epochs: Epochs before the first cut; they give the reference value.
        epochs_per_round: Epochs of training after each cut; epochs left at the end train the final structure.
        normalize: Scores per group: ``none``, ``l2`` (unit norm), ``mean`` (mean 1), or ``auto``, the criterion's own.
        tolerance: Largest allowed fall of the monitored value below the reference, as a fraction (0.01 = 1 point).
            null: prune to the budget whatever happens.
        monitor: Name of the logged validation metric.
        mode: ``max`` if a higher value is better, else ``min``.
        patience_rounds: Rounds in a row that may end below the tolerance; 1 stops after the first.
        recalibration_batches: After each cut, recompute the running statistics of all batch norms on so many training
            batches, in eval mode; 0 for none. See `bsdp.recalibrate_batch_norms`.
        distillation: Weight, in [0, 1], of what the unpruned model (as it was at the reference) says, against the loss,
            after the first cut; 0 for none. Works with any loss; costs a second copy of the network and one forward
            pass per batch. Scores see the gradient of both.
        distillation_temperature: Temperature of the class probabilities that are compared.
        distillation_module: Dotted name of the module that returns the class scores ``[batch, classes]``. Default: the
            one child of the module with parameters, else the module itself.
        round_to: Leave multiples of so many channels in every group that is cut, for hardware that likes them: 16 with
            ``ranking: local`` for one image at a time on a CPU with AVX-512.
        min_channels: Channels that every group keeps at least.
        max_group_ratio: Largest share of a group that one round may remove.
        threshold: Only remove channels whose importance is below it, whatever the budget says. Default: no limit.
        theta: Share of the cumulative sum that ``ranking: priority`` keeps, in (0, 1).
        macs_penalty: What a channel's importance loses per share of the MACs it costs; 0.001 in the paper of 2016.
        l1: L1 penalty on batch-norm weights (``bn_scale``) or channel factors (``channel_scaling``) until the last cut.
        freeze: Freeze all weights but the head, so that the factors alone train. Default: for ``channel_scaling`` and
            ``transtailor`` on a plain module; a decomposed module stays as `BasisDecomposition` froze it.
        exclude: Names of layers whose channels must stay, relative to the network.
        seed: Of ``criterion: random``.
        mean_to_bias: Move the mean of removed channels into the biases of the layers that read them, where these have
            one (pairs do; a convolution before a batch norm mostly does not).
        latency_table: File of `bsdp latency --by widths --num-classes N`, for ``target_kind: latency``. Default: the
            table is measured as the run begins, on its device and in its memory layout, and written into the run
            folder. A resumed run goes on with the table it began with.
        latency_batch_size: Examples in a pass when the table is measured: that of later use.
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
        target: float = 0.5,
        target_kind: Literal["params", "macs", "channels", "latency"] = "params",
        criterion: Criterion = "taylor_2019",
        ranking: Literal["global", "per_cost", "local", "isomorphic", "priority"] | None = None,
        rounds: int | None = None,
        schedule: Literal["geometric", "cubic", "constant"] = "cubic",
        warmup_epochs: int = 1,
        epochs_per_round: int = 1,
        normalize: Literal["auto", "none", "l2", "mean"] = "auto",
        tolerance: float | None = 0.01,
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        patience_rounds: int = 1,
        recalibration_batches: int = 0,
        distillation: float = 0.0,
        distillation_temperature: float = 2.0,
        distillation_module: str | None = None,
        round_to: int = 1,
        min_channels: int = 1,
        max_group_ratio: float = 0.95,
        threshold: float | None = None,
        theta: float = 0.98,
        macs_penalty: float = 0.0,
        l1: float = 0.0,
        freeze: bool | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        mean_to_bias: bool = True,
        latency_table: str | None = None,
        latency_batch_size: int = 1,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        if rounds is not None:
            check_at_least("rounds", rounds, 1)
        settings = ChannelPruningSettings(
            target=target,
            target_kind=target_kind,
            rounds=rounds or ANY_ROUNDS,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            epochs_per_round=epochs_per_round,
            tolerance=tolerance,
            mode=mode,
            patience_rounds=patience_rounds,
            distillation=distillation,
            distillation_temperature=distillation_temperature,
            distillation_module=distillation_module,
            criterion=criterion,
            channel_ranking=ranking,
            normalize=normalize,
            min_channels=min_channels,
            max_group_ratio=max_group_ratio,
            round_to=round_to,
            threshold=threshold,
            theta=theta,
            macs_penalty=macs_penalty,
            l1=l1,
            exclude=tuple(exclude or ()),
            seed=seed,
            mean_to_bias=mean_to_bias,
        )
        super().__init__(
            settings,
            rounds=rounds,
            monitor=monitor,
            restore_best=restore_best,
            save_pruned=save_pruned,
            recalibration_batches=recalibration_batches,
        )
        if latency_table is not None and target_kind != "latency":
            raise ValueError(
                f"`latency_table` goes with `target_kind: latency`, not {target_kind!r}: no other budget counts its "
                "times. Leave it out, or change the budget."
            )
        self.latency = TableOfRun(ChannelLatencyTable, path=latency_table, batch_size=latency_batch_size)
        self.freeze = criterion in SCALED if freeze is None else freeze
        self._fixed_batch_norms: list[torch.nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add channel factors and freeze, before optimizers and DDP exist."""
        super().setup(trainer, pl_module, stage)
        self._fixed_batch_norms = []
        scaled = self.settings.criterion in SCALED
        if stage != "fit" or not (self.freeze or scaled):
            return
        if is_beside(trainer, "BasisDecomposition"):  # which freezes what has to be frozen
            self._refuse_factors(scaled)
            return
        if find_head(pl_module) is None:
            pl_module.configure_model()
        network = _network_of(pl_module)
        self._refuse_factors(scaled and bool(named_pairs(network)))
        if scaled and scales_of(network) is None:
            shapes = self._input_shapes(trainer, pl_module)
            groups = channel_groups(network, example_of(shapes, network), exclude=self.settings.exclude)
            add_scales(network, groups)
        if self.freeze and not named_pairs(pl_module):
            self._freeze(pl_module, network)

    def _refuse_factors(self, refuse: bool) -> None:
        if refuse:
            raise ValueError(
                f"`criterion: {self.settings.criterion}` trains a factor per channel of a plain network, and this one "
                "is decomposed, with scaling factors of its own: leave `BasisDecomposition` out, or choose another "
                "criterion."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a table that cannot be read, see that an optimizer has the factors, then as in `RoundPruning`."""
        self.latency.check(self._loaded)
        if self.settings.criterion in SCALED:
            self._adopt_factors(trainer, pl_module)
        if self._fixed_batch_norms:  # `sync_batchnorm` has replaced them
            self._fixed_batch_norms = _fixed_batch_norms(pl_module)
        super().on_fit_start(trainer, pl_module)

    def _adopt_factors(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scales, head = scales_of(_network_of(pl_module)), find_head(pl_module)
        if scales is None or head is None:
            raise ValueError(
                "the channel factors are gone: something built the network anew after `setup`. Let `configure_model`, "
                "which is called twice, return at once when the network is there."
            )
        # An optimizer that was built before `setup` holds the head, beside which the factors train.
        successors = [(parameter, scales.weight) for parameter in pl_module.get_submodule(head).parameters()]
        if adopt_parameters(trainer.optimizers, successors, pl_module):
            raise ValueError(
                "no optimizer holds the channel factors or the head, so nothing would train. Give the optimizer all "
                "parameters (`self.parameters()`, or those with `requires_grad`) in `configure_optimizers`."
            )

    def _freeze(self, pl_module: LightningModule, network: torch.nn.Module) -> None:
        head = find_head(pl_module)
        freeze(pl_module, trainable=[] if head is None else [head])
        scales = scales_of(network)
        if scales is not None:
            scales.requires_grad_(True)
        self._fixed_batch_norms = _fixed_batch_norms(pl_module)
        trains = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        factors = 0 if scales is None else scales.weight.numel()
        rank_zero_info(f"bsdp: {trains:,} parameters train ({factors:,} of them channel factors); the rest is frozen")

    def _input_shapes(self, trainer: Trainer, pl_module: LightningModule) -> list[list[int]]:
        example: Any = pl_module.example_input_array
        if example is None:
            example = _example_of_data(trainer)
        if example is None:
            raise ValueError(
                f"`criterion: {self.settings.criterion}` adds factors to the network before training and needs the "
                "shape of its input, but there is no floating-point tensor in the first batch of the training data: "
                "set `example_input_array` in the LightningModule to one example."
            )
        try:
            return measure_module_cost(pl_module, only_network(pl_module), example, new_bias=False)[1]
        except NotReplayableError as error:
            raise ValueError(
                f"`criterion: {self.settings.criterion}` needs the shape of the input, but {error}."
            ) from error

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep frozen batch norms in eval mode, then as in `RoundPruning`."""
        for module in self._fixed_batch_norms:
            module.train(False)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> ChannelPruner:
        """Make the pruner, with the latency table if there is to be one."""
        part = pl_module.get_submodule(network) if network else pl_module
        settings, table = self.settings, None
        if settings.target_kind == "latency":
            check_plain(part)
            if self._loaded is not None and widths_of(part) and not self.latency.is_known(self._loaded):
                raise ValueError(
                    "`target_kind: latency` goes on with a run that had another budget and has cut channels: the times "
                    "of the original network are missing. Give them as `latency_table` (`bsdp latency --by widths "
                    "--num-classes N` of the backbone, or `bsdp.measure_channel_latency_table`)."
                )
            options: dict[str, Any] = {"loaded": self._loaded, "exclude": settings.exclude}
            table = self.latency.find(pl_module, network=network, shapes=shapes, **options)
            if table is None:  # a `fast_dev_run`, which cuts nothing
                settings = replace(settings, target_kind="macs")
        given: dict[str, Any] = {"cost": cost, "network": network, "monitor": self.monitor, "latency": table}
        return ChannelPruner(pl_module, settings, example_of(shapes, part), **given)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, the latency table included."""
        return self.latency.added_to(super().state_dict())

    def ceiling(self) -> str | None:
        """The largest target, in words."""
        pruner = self._pruner()
        assert isinstance(pruner, ChannelPruner)
        groups = pruner.stage.groups
        return (
            f"{len(groups)} groups with {sum(group.channels for group in groups.values()):,} channels can be pruned, "
            f"down to {1 - pruner.largest_share():.1%} of the {self.settings.target_kind}"
        )

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse batch-norm weights that do not train where they are the score."""
        pruner = self._pruner()
        assert isinstance(pruner, ChannelPruner)
        refuse_frozen_scales(pruner.stage)


def _network_of(pl_module: LightningModule) -> torch.nn.Module:
    name = only_network(pl_module)
    return pl_module.get_submodule(name) if name else pl_module


def _fixed_batch_norms(pl_module: LightningModule) -> list[torch.nn.Module]:
    head = find_head(pl_module)
    return fixed_batch_norms(pl_module, trainable=[] if head is None else [head], batch_norm="frozen")


def _example_of_data(trainer: Trainer) -> torch.Tensor | None:
    """The first image of the training data; nothing has been loaded yet."""
    with random_state_kept():
        try:
            # Given to `fit`, or a hook of the data module or the module; Lightning has not called it yet.
            batch = first_tensor(next(iter(trainer.fit_loop._data_source.dataloader())))
        except Exception:  # Lightning's own default of a module without data raises, too
            return None
    return None if batch is None else batch[:1]
