"""`TwoTemperaturePruning`: search a structure with gates, cut to it, and carry it over to other tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from bsdp._checks import check_whole
from bsdp.callbacks._monitoring import loss_scale
from bsdp.callbacks._processes import mean_over_processes
from bsdp.callbacks._round_pruning import RoundPruning
from bsdp.callbacks._run_folder import run_folder, unused_path
from bsdp.callbacks._trainer_checks import check_scales
from bsdp.cost import ModelCost
from bsdp.layers import named_pairs
from bsdp.pruner import largest_removable_share
from bsdp.rank_patterns import RankPattern, load_pattern, save_pattern
from bsdp.two_temperature_pruner import TwoTemperaturePruner, TwoTemperatureSettings


class TwoTemperaturePruning(RoundPruning):
    """Find out with two-temperature gates how many bases each layer needs, cut once, and train on.

    Goes with `BasisDecomposition`, as `IterativeBasisPruning` does. After `warmup_epochs`, which give the reference,
    every basis has a gate for `search_epochs`: nearly binary in the forward pass, soft in the gradient. Then the bases
    with the lowest gates are removed down to the target, the gates disappear, and the epochs that are left train the
    result. The run folder gets ``structure.json`` with the rank of every layer. With `structure` such a file of an
    earlier run, on whatever data, takes the place of the search: that is the transfer of a structure.

    PUBLISHED (Colombo, Gao, arXiv 2107.03375; only the abstract was readable): architectures are searched independently
    of the weights, as a complexity-penalised choice of a subset, relaxed with two temperatures; the structure transfers
    and is retrained on other tasks. RECONSTRUCTED, with low certainty: the update of the gates, see
    `bsdp.two_temperature`. OURS: gates on bases, marginal deployed cost as complexity, weights and gates in turns in
    place of weights that are drawn anew, the penalty adapted to the target, and a cut that ranks by theta, so that the
    target is met also where the open gates alone would miss it. Do not quote results as those of the paper.

    While searching, validation sees the gates, too, so that the monitored value is that of the structure under test; it
    fluctuates where batch norms train, for their statistics lag behind the gates. A checkpoint from these epochs holds
    the whole network, without gates, and fits that value only once it is resumed. In distributed runs the gates'
    gradient is averaged over the processes. A compiled model runs uncompiled in the search.

    Logged at every epoch is what `IterativeBasisPruning` logs, and while searching:

    ============================ ===================================================================
    ``bsdp/gates_open``          share of the gates that are open
    ``bsdp/gates_cost``          deployed cost of the open gates, as a share of the original
    ``bsdp/penalty``             lambda, in units of the loss
    ============================ ===================================================================

    Args:
        target: Share of the original network to remove, in (0, 1); not used with `structure`.
        target_kind: What `target` counts: ``params``, ``macs`` (multiply-adds) or ``bases``; not used with `structure`.
        search_epochs: Epochs with gates.
        structure: A ``structure.json`` to cut to, without a search. Default: search.
        warmup_epochs: Epochs before the search, or before the cut to a given structure. With `structure`, 0 cuts at
            once, which needs ``tolerance: null`` and ``importance: magnitude``.
        hard: Temperature of the forward pass, the steepness of the gates; ``.inf`` for exactly binary ones.
        soft: Temperature of the gradient.
        penalty: Cost of the whole original network in units of the loss. Default: adapted to the target.
        learning_rate: Step of the gates for a gradient of average size.
        interval: Optimizer steps for one step of the gates, which takes the mean of their gradients.
        importance: With `structure`, the score by which each layer's weakest bases are chosen: ``mean_square``,
            ``mean_abs``, ``energy``, ``magnitude`` or ``sigma_energy``.
        tolerance: Largest allowed fall of the monitored value below the reference, as a fraction (0.01 = 1 point).
            null: prune to the budget whatever happens.
        monitor: Name of the logged validation metric.
        mode: ``max`` if a higher value is better, else ``min``.
        mean_to_bias: Move the mean output of removed bases into biases.
        min_rank: Rank that every layer keeps at least; not used with `structure`.
        restore_best: End with the pruned model if it met the tolerance, else the unpruned one; false: with the pruned.
        save_pruned: Write ``pruned.ckpt``, ``pruned.safetensors`` and, after a search, ``structure.json``.

    Attributes:
        checkpoint_path: The Lightning checkpoint of the final module, once it is written.
        weights_path: The folded network, once it is written.
        structure_path: The structure found, once it is written.
    """

    def __init__(
        self,
        *,
        target: float = 0.7,
        target_kind: Literal["params", "macs", "bases"] = "params",
        search_epochs: int = 5,
        structure: str | None = None,
        warmup_epochs: int = 1,
        hard: float = 20.0,
        soft: float = 1.0,
        penalty: float | None = None,
        learning_rate: float = 0.1,
        interval: int = 2,
        importance: Literal["mean_square", "mean_abs", "energy", "magnitude", "sigma_energy"] = "mean_square",
        tolerance: float | None = 0.01,
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        mean_to_bias: bool = True,
        min_rank: int = 1,
        restore_best: bool = True,
        save_pruned: bool = True,
    ) -> None:
        check_whole("search_epochs", search_epochs, 1)
        check_whole("warmup_epochs", warmup_epochs, 0)
        search = search_epochs if structure is None else 0
        settings = TwoTemperatureSettings(
            target=target,
            target_kind=target_kind if structure is None else "params",
            rounds=1,
            warmup_epochs=warmup_epochs + search,
            search_epochs=search,
            hard=hard,
            soft=soft,
            penalty=penalty,
            learning_rate=learning_rate,
            interval=interval,
            importance=importance,
            tolerance=tolerance,
            mode=mode,
            mean_to_bias=mean_to_bias,
            min_rank=min_rank,
        )
        super().__init__(settings, rounds=1, monitor=monitor, restore_best=restore_best, save_pruned=save_pruned)
        self.new_bias = mean_to_bias
        self.structure = structure
        self.structure_path: Path | None = None
        self._pattern: RankPattern | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the structure, and refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.structure_path = None
            self._pattern = None if self.structure is None else load_pattern(self.structure)

    def check_module(self, pl_module: LightningModule) -> None:
        """Refuse a module without decomposed layers."""
        if not named_pairs(pl_module):
            raise ValueError(
                "`TwoTemperaturePruning` found no decomposed layer: add `bsdp.callbacks.BasisDecomposition()` to the "
                "trainer's callbacks, too."
            )

    def check_optimizers(self, trainer: Trainer) -> None:
        """Refuse scaling factors that do not train; the steps of their optimizer are those of the gates, too."""
        if self._pruner().needs_gradients:
            check_scales(trainer.optimizers, named_pairs(self._pruner().network))

    def build(
        self, pl_module: LightningModule, cost: ModelCost, *, network: str, shapes: list[list[int]]
    ) -> TwoTemperaturePruner:
        """Make the pruner; a given structure becomes the target."""
        if self._pattern is not None:
            self._check_pattern(self._pattern, pl_module, cost, network)
            share = 1.0 - cost.deployed(self._pattern.ranks) / cost.original()
            if not share > 0.0:
                raise ValueError(
                    f"`structure: {self.structure}` makes the network no smaller: its ranks are not below those at "
                    "which a pair of layers is as large as the layer it replaced. Search one with a higher `target`."
                )
            self.settings = replace(self.settings, target=share)
        options: dict[str, Any] = {"network": network, "monitor": self.monitor, "pattern": self._pattern}
        pruner = TwoTemperaturePruner(pl_module, self.settings, cost, **options)
        pruner.basis.average = lambda tensor: mean_over_processes(pl_module.trainer, tensor)
        return pruner

    def _check_pattern(self, pattern: RankPattern, pl_module: LightningModule, cost: ModelCost, network: str) -> None:
        part = pl_module.get_submodule(network) if network else pl_module
        full = {name: layer.full_rank for name, layer in cost.layers.items()}
        cut = self._loaded is not None and self._loaded["scheduled"] > 0  # a resumed run has made the cut already
        pattern.check(cost.layers, full if cut else {name: pair.rank for name, pair in named_pairs(part).items()})

    def ceiling(self) -> str:
        """The largest target, in words."""
        if self._pattern is not None:
            bases = sum(self._pattern.ranks.values())
            left = 1.0 - self.settings.target
            return f"the structure of {self.structure} leaves {left:.1%} of the params with {bases} bases per group"
        share = largest_removable_share(self.record.cost, self.settings)
        return (
            f"with rank {self.settings.min_rank} in every decomposed layer, {share:.1%} of the "
            f"{self.settings.target_kind} would be gone: no target goes beyond"
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """As in `RoundPruning`; in the search, put the gates in for the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not trainer.fast_dev_run and self._searcher().searching(trainer.current_epoch):  # type: ignore[attr-defined]
            self._watching().also(self._searcher().gated(trainer.current_epoch, loss_scale(trainer)))

    def spends_at_once(self) -> bool:
        """The penalty of the gates goes by costs, too."""
        return bool(self.settings.target_kind == "macs" and self.settings.warmup_epochs == self.settings.search_epochs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the search, put the gates in for the validation."""
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        if self._searcher().searching(trainer.current_epoch):
            self._watching().also(self._searcher().gated(trainer.current_epoch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the monitored value, then take the gates out."""
        super().on_validation_end(trainer, pl_module)
        self._detach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the gates, too."""
        super().on_train_epoch_end(trainer, pl_module)
        gates = None if trainer.fast_dev_run else self._searcher().basis.gates  # type: ignore[attr-defined]
        if gates is not None and not getattr(trainer, "barebones", False):
            values = {"gates_open": gates.open_share(), "gates_cost": gates.cost_share(), "penalty": gates.penalty}
            logged = {f"bsdp/{key}": value for key, value in values.items()}
            pl_module.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")

    def prepare_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what the gates found."""
        gates = self._searcher().basis.gates
        if gates is None:
            return
        left = 1.0 - self.settings.target
        short = " (far from it: search for more epochs)" if gates.cost_share() > left + 0.1 else ""
        rank_zero_info(
            f"bsdp: the search ends with {gates.open_share():.1%} of the gates open, which cost "
            f"{gates.cost_share():.1%} of the original; the cut leaves {left:.1%} at most{short}"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the structure, then leave the smallest tolerated model."""
        super().on_train_end(trainer, pl_module)
        searched = not trainer.fast_dev_run and self._pattern is None and len(self.record.rounds) > 1  # type: ignore[attr-defined]
        if searched and self.save_pruned:
            self._write_structure(trainer)

    def _write_structure(self, trainer: Trainer) -> None:
        path = unused_path(run_folder(trainer) / "structure.json", trainer=trainer)
        self.structure_path = trainer.strategy.broadcast(path)  # the first process decides
        record = self.record
        if trainer.is_global_zero:
            full = {name: layer.full_rank for name, layer in record.cost.layers.items()}
            facts = {"target": record.target, "target_kind": record.target_kind}
            save_pattern(RankPattern(record.rounds[-1].ranks, full), self.structure_path, **facts)
            rank_zero_info(f"bsdp: wrote {self.structure_path.name} to {self.structure_path.parent}")

    def _searcher(self) -> TwoTemperaturePruner:
        pruner = self._pruner()
        assert isinstance(pruner, TwoTemperaturePruner)
        return pruner
