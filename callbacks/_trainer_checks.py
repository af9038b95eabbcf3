"""What the callbacks refuse in a trainer, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer

from bsdp.channel_pruner import ChannelStage
from bsdp.layers import BasisPair
from bsdp.optimizer_state import with_inner

_AVERAGES = (
    "weight averaging keeps a copy of the model made before pruning, whose shapes no longer fit afterwards. Remove it "
    "from the trainer's callbacks; to average weights, fine-tune the pruned model in a second run."
)
_CALLBACKS = {
    "StochasticWeightAveraging": _AVERAGES,
    "WeightAveraging": _AVERAGES,
    "ModelPruning": (
        "it puts masks in the shapes of the parameters on a model whose shapes change, and loses them on resume. "
        "Remove it from the trainer's callbacks; bases are pruned here, and other weights in a second run."
    ),
    "BaseFinetuning": (
        "it freezes and thaws layers by a plan of its own, while bases must stay frozen. Remove it from the trainer's "
        "callbacks, and name what has to train beside the scaling factors in `trainable` of `BasisDecomposition`."
    ),
}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_SPAWNING = {"_MultiProcessingLauncher", "_XLALauncher"}
_REPLACING = {"BitsandbytesPrecision", "TransformerEnginePrecision"}


def refuse_unsupported(trainer: Trainer, callback: object) -> None:
    """Refuse, before anything is changed, what cannot work beside a model that changes its shapes."""
    name = type(callback).__name__
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in _ancestors(other) & _CALLBACKS.keys():
            raise ValueError(f"`{name}` does not go with `{type(other).__name__}`: {_CALLBACKS[kind]}")
    strategy = trainer.strategy
    if _ancestors(strategy) & _SHARDING:
        raise ValueError(
            f"`{name}` does not support the strategy {type(strategy).__name__}, which shards the parameters "
            "that pruning cuts. Use a single device or `strategy='ddp'`."
        )
    if _ancestors(getattr(strategy, "launcher", None)) & _SPAWNING:
        raise ValueError(
            f"`{name}` does not support strategies that spawn or fork processes (ddp_spawn, ddp_fork, ddp_notebook): "
            "the main process would load the pruned weights into its unpruned model. Use `strategy='ddp'`."
        )
    if _ancestors(strategy.precision_plugin) & _REPLACING:
        raise ValueError(
            f"`{name}` does not support the precision {type(strategy.precision_plugin).__name__}, which puts layers of "
            "its own in the place of those that pruning cuts. Use `precision='bf16-mixed'`, and quantise the pruned "
            "model afterwards."
        )


def is_beside(trainer: Trainer, name: str) -> bool:
    """Whether a trainer has a callback of a class of this name, or of one derived from it."""
    return any(name in _ancestors(callback) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def refuse_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that evaluate the loss several times per step."""
    for optimizer in with_inner(optimizers):
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "the optimizer LBFGS is not supported: it evaluates the loss several times per step and keeps a "
                "history in the shape of all parameters. Use SGD, Adam, AdamW or another first-order optimizer."
            )


def check_scales(optimizers: Sequence[Optimizer], pairs: Mapping[str, BasisPair]) -> None:
    """Refuse scaling factors that cannot be scored: frozen ones, and those that several optimizers share."""
    deltas = {name: pair.scaling.delta for name, pair in pairs.items()}
    frozen = [name for name, delta in deltas.items() if not delta.requires_grad]
    if frozen:
        raise ValueError(
            f"the scaling factors of {len(frozen)} layers (first: {frozen[0]!r}) do not train, so they cannot be "
            "scored: name these layers in `exclude` of `BasisDecomposition`, or leave out what froze them."
        )
    if not any(all(holds(o, delta) for delta in deltas.values()) for o in optimizers):
        raise ValueError(
            "no optimizer holds all scaling factors, so they cannot be scored together: let one optimizer have "
            "them in `configure_optimizers`, or decompose the part of one optimizer only (`backbone`)."
        )


def holds(optimizer: Optimizer, parameter: object) -> bool:
    """Whether an optimizer holds a parameter."""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def _ancestors(thing: object) -> set[str]:
    """Names of a thing's class and of all classes above it; by name, as some live in packages that are not there."""
    return {cls.__name__ for cls in type(thing).__mro__}


def refuse_frozen_scales(stage: ChannelStage) -> None:
    """Refuse batch-norm weights that do not train where they are the score of channels."""
    if stage.settings.criterion == "bn_scale" and not any(w.requires_grad for w in stage.penalised()):
        raise ValueError(
            "`criterion: bn_scale` ranks channels by batch-norm weights, but all of them are frozen: let them "
            "train (`batch_norm: affine` or `all` in `BasisDecomposition`), or choose another criterion."
        )
