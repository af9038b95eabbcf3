"""`BasisDecomposition`: split the layers of any LightningModule into basis and scaling layers before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from bsdp._checks import check_choice, check_patterns, check_whole, matches
from bsdp.calibration import check_shrinkage, rebase
from bsdp.callbacks._calibration import module_moments
from bsdp.callbacks._processes import rewrap
from bsdp.callbacks._trainer_checks import refuse_optimizers, refuse_unsupported
from bsdp.compiling import inside_compiled, plain_name
from bsdp.decompose import Decomposition, decompose, find_head
from bsdp.freezing import BATCH_NORM_MODES, fixed_batch_norms, freeze
from bsdp.layers import BasisPair, named_pairs
from bsdp.lean_norms import lean_batch_norms
from bsdp.optimizers import adopt_parameters
from bsdp.structure import structure_of
from bsdp.weight_training import condition_factors


class BasisDecomposition(Callback):
    """Decompose a module by SVD as `fit` starts; by default only one scaling factor per basis and the head train.

    Every convolution and linear layer that is worth it becomes a pair of layers with the same function (see
    `bsdp.decompose`); the module does not need to know. Pruning them is the job of `IterativeBasisPruning`. Checkpoints
    carry the structure under the key ``bsdp``.

    Args:
        backbone: Dotted name of the submodule to decompose and freeze, for example ``model.features``; everything
            outside of it trains as it is. Default: the whole module but its last convolution or linear layer, the head.
        trainable: Name patterns of modules, and of single parameters, that stay trainable although they are in the
            backbone.
        include: Name patterns of the layers to decompose, relative to `backbone`. Default: all.
        exclude: Name patterns of layers not to decompose, relative to `backbone`.
        metric: How bases are chosen: ``euclidean`` is the SVD of the weights with orthonormal bases, ``activation``
            orders them by what they contribute to the layers' outputs on the first training batches.
        centred: In the activation metric, order bases by the variance of what they put out instead of its power: for
            pruning that moves means into biases.
        shrinkage: How much of white inputs is mixed into what the activation metric measures, in [0, 1]. null: as much
            as the spread between the examples suggests.
        calibration_batches: Batches that the activation metric reads before training.
        train: ``scales`` trains one factor per basis and the head, as the paper does; ``weights`` trains all weights,
            those of the bases and of the 1x1 layers as well, which repairs more of what a cut breaks.
        batch_norm: What trains of the batch norms: ``frozen`` (nothing), ``stats`` (running statistics only),
            ``affine`` (weight and bias only), ``all``. Default: ``frozen``, and ``all`` where all weights train.
        train_bias: Whether the biases of decomposed layers train; all do where all weights train.
        lean_batch_norm: Compute frozen batch norms of training batches as one multiplication and addition (see
            `bsdp.lean_batch_norms`): the same up to rounding, with a third less memory and in less time. Not for
            modules that are compiled, which gain nothing.
    """

    def __init__(
        self,
        *,
        backbone: str | None = None,
        trainable: list[str] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        metric: Literal["euclidean", "activation"] = "euclidean",
        centred: bool = False,
        shrinkage: float | None = None,
        calibration_batches: int = 16,
        train: Literal["scales", "weights"] = "scales",
        batch_norm: Literal["frozen", "stats", "affine", "all"] | None = None,
        train_bias: bool = False,
        lean_batch_norm: bool = False,
    ) -> None:
        if metric == "kfac":  # type: ignore[comparison-overlap]
            raise ValueError(
                "`metric: kfac` weighs bases by the loss, which says nothing while the head is new: set "
                "`rebase: warmup` and `metric: kfac` on `IterativeBasisPruning`, and `euclidean` or `activation` here."
            )
        check_choice("metric", metric, ("euclidean", "activation"))
        check_shrinkage(shrinkage)
        for name, given in (("centred", centred), ("shrinkage", shrinkage is not None)):
            if given and metric == "euclidean":
                raise ValueError(
                    f"`{name}` is about bases chosen by what they put out, but `metric` is 'euclidean': set `metric: "
                    f"activation`, or leave `{name}` out."
                )
        check_whole("calibration_batches", calibration_batches, 1)
        check_choice("train", train, ("scales", "weights"))
        batch_norm = batch_norm or ("all" if train == "weights" else "frozen")
        check_choice("batch_norm", batch_norm, BATCH_NORM_MODES)
        self.backbone = backbone
        self.trainable = trainable
        self.include = include
        self.exclude = exclude
        self.metric = metric
        self.centred = centred
        self.shrinkage = shrinkage
        self.calibration_batches = calibration_batches
        self.train = train
        self.batch_norm: Any = batch_norm
        self.train_bias = train_bias
        self.decomposition: Decomposition | None = None
        self._kept: list[str] = []
        self._fixed_batch_norms: list[nn.Module] = []
        self.lean_batch_norm = lean_batch_norm
        self._lean = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swap and freeze, before optimizers and DDP exist."""
        refuse_unsupported(trainer, self)
        if not _has_layers(pl_module):
            pl_module.configure_model()
        target = self._target(pl_module)
        if not _has_layers(target):
            raise ValueError(
                "`BasisDecomposition` found no convolution or linear layer in "
                f"{self.backbone or type(pl_module).__name__}: build the network in `__init__` or `configure_model` "
                "of the LightningModule, not in `setup`, which runs after the callbacks' own."
            )
        head = find_head(pl_module)
        self.decomposition = self._own_decomposition(pl_module)
        if not named_pairs(target):
            include = self.include if self.include is not None or self.backbone is None else ["*"]
            self.decomposition = decompose(target, include=include, exclude=self.exclude)
            if not self.decomposition.replaced:
                raise ValueError(f"`BasisDecomposition` could decompose no layer. {self.decomposition}")
            for _, pair in self.decomposition.replaced.values():
                pair.watched = True  # until costs are measured: some models read a weight in the very first pass only
        self._freeze(pl_module, target, head)
        if stage == "fit":
            self._report(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every scaling factor is in an optimizer, also one that was built before `setup`."""
        refuse_optimizers(trainer.optimizers)
        if not named_pairs(pl_module):
            raise ValueError(
                "the decomposed layers are gone: something built the network anew after `setup`. Let "
                "`configure_model`, which is called twice, return at once when the network is there."
            )
        self._fixed_batch_norms = self._find_fixed_batch_norms(pl_module)  # `sync_batchnorm` has replaced them
        homeless = adopt_parameters(trainer.optimizers, self._successors(), pl_module)
        held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        missing = [n for n, p in named_pairs(pl_module).items() if id(p.scaling.delta) not in held]
        if homeless or missing:
            raise ValueError(
                f"no optimizer holds the scaling factors of {max(len(missing), len(homeless))} layers (first: "
                f"{missing[0] if missing else 'unknown'!r}), and none held the weights they replaced, so nothing there "
                "would train. Give the optimizer all parameters (`self.parameters()`, or those with `requires_grad`) "
                "in `configure_optimizers`, or name the part to decompose with `backbone`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the bases anew in the activation metric; the ranks and the module's function stay."""
        pairs = named_pairs(pl_module)
        untouched = all(pair.rank == pair.full_rank for pair in pairs.values())
        if self.metric == "activation" and trainer.global_step == 0 and untouched:
            moments, _ = module_moments(trainer, pl_module, pairs, metric=self.metric, batches=self.calibration_batches)
            rebase(pairs, moments, centred=self.centred, shrinkage=self.shrinkage)
        elif self.metric == "activation" and trainer.global_step == 0:
            rank_zero_info(
                "bsdp: layers have lost bases already, so those that are left stay as they are (`metric: activation` "
                "orders the bases of whole layers; `rebase` of `IterativeBasisPruning` orders those that are left)."
            )
        self._condition(trainer, pairs, rescale=trainer.global_step == 0)

    def _condition(self, trainer: Trainer, pairs: dict[str, BasisPair], *, rescale: bool = True) -> None:
        """Where weights train: fix the square layers of pairs at full rank, and let those train that were cut."""
        if self.train == "weights" and condition_factors(pairs, optimizers=trainer.optimizers, rescale=rescale):
            rewrap(trainer)

    def follow_cut(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let pairs that were cut, or got new bases, train as ``train`` says; a pruning callback calls it at once."""
        self._condition(trainer, named_pairs(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep frozen batch norms in eval mode, whoever called ``module.train()`` since; follow anybody's cuts."""
        if batch_idx == 0:
            self.follow_cut(trainer, pl_module)
        for module in self._fixed_batch_norms:
            if module.training:
                module.eval()
        self._lean.close()  # a batch that somebody skipped has no end
        if self.lean_batch_norm:
            self._lean.enter_context(lean_batch_norms(self._fixed_batch_norms))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Give the batch norms their own classes back."""
        self._lean.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave no batch norm changed."""
        self._lean.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no batch norm changed."""
        self._lean.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the structure, from which a module is rebuilt before its weights load."""
        checkpoint["bsdp"] = structure_of(pl_module)

    def _target(self, pl_module: LightningModule) -> nn.Module:
        if self.backbone is None:
            return pl_module
        try:
            module = pl_module.get_submodule(self.backbone)
            return module.get_submodule(inside_compiled(module))
        except AttributeError as error:
            children = [name for name, _ in pl_module.named_children()]
            raise ValueError(
                f"`backbone={self.backbone!r}` is no submodule of {type(pl_module).__name__}; its children are "
                f"{children}."
            ) from error

    def _freeze(self, pl_module: LightningModule, target: nn.Module, head: str | None) -> None:
        names = {plain_name(name): part for name, part in _parts(pl_module)}
        patterns = check_patterns("trainable", self.trainable, names)
        if self.backbone is None and head is not None and not isinstance(pl_module.get_submodule(head), BasisPair):
            patterns.append(plain_name(head))
        wanted = {id(part) for name, part in names.items() if matches(name, patterns)}
        self._kept = [name for name, part in _parts(target) if id(part) in wanted]
        freeze(
            target,
            trainable=self._kept,
            batch_norm=self.batch_norm,
            train_bias=self.train_bias,
            train_weights=self.train == "weights",
        )
        self._fixed_batch_norms = self._find_fixed_batch_norms(pl_module)
        if not any(p.requires_grad for p in pl_module.parameters()):
            raise ValueError("nothing is trainable after decomposing; check `include`, `exclude` and `trainable`.")

    def _find_fixed_batch_norms(self, pl_module: LightningModule) -> list[nn.Module]:
        return fixed_batch_norms(self._target(pl_module), trainable=self._kept, batch_norm=self.batch_norm)

    def _own_decomposition(self, pl_module: LightningModule) -> Decomposition | None:
        """What an earlier `setup` did to this very module; another module may have been fitted since."""
        done = self.decomposition
        if done is None:
            return None
        pairs = set(named_pairs(pl_module).values())
        return done if all(pair in pairs for _, pair in done.replaced.values()) else None

    def _successors(self) -> list[tuple[Tensor, nn.Parameter]]:
        if self.decomposition is None:
            return []
        successors: list[tuple[Tensor, nn.Parameter]] = []
        for old, pair in self.decomposition.replaced.values():
            others = [parameter for parameter in old.parameters() if parameter is not old.bias]
            heirs = (pair.scaling.delta, pair.scaling.weight, *pair.basis.parameters())
            successors += [(parameter, heir) for parameter in others for heir in heirs]  # several, if parametrized
            successors.append((old.bias if isinstance(old.bias, Tensor) else others[0], pair.scaling.bias))
        return successors

    def _report(self, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        scales = sum(p.scaling.delta.numel() for p in named_pairs(pl_module).values())
        trains = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        done = self.decomposition or Decomposition({}, {})
        rank_zero_info(
            f"bsdp: {len(named_pairs(pl_module))} layers decomposed; {trains:,} parameters train ({scales:,} of them "
            "scaling factors, the rest head and what `train`, `trainable`, `batch_norm` and `train_bias` ask for), "
            f"{frozen:,} are frozen"
        )
        reasons: dict[str, list[str]] = {}
        for name, reason in done.skipped.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rank_zero_info(f"bsdp: left as it is: {shown}: {reason}")


def _has_layers(module: nn.Module) -> bool:
    return find_head(module) is not None


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Names of everything inside that can train: modules and parameters, by all names they have."""
    for name, part in chain(
        module.named_modules(remove_duplicate=False), module.named_parameters(remove_duplicate=False)
    ):
        if name:
            yield name, part
