"""What the callbacks refuse or wait for in a trainer, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer

from bsdp.layers import BasisPair

_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging"}
_SHARDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


def refuse_unsupported(trainer: Trainer, callback: object) -> None:
    """Refuse, before anything is changed, what cannot work beside a model that changes its shapes."""
    name = type(callback).__name__
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        kinds = {cls.__name__ for cls in type(other).__mro__}
        if kinds & _AVERAGING:
            raise ValueError(
                f"`{name}` does not go with `{type(other).__name__}`: weight averaging keeps a copy of the model made "
                "before pruning, whose shapes no longer fit afterwards. Remove it from the trainer's callbacks; "
                "to average weights, fine-tune the pruned model in a second run."
            )
    if {cls.__name__ for cls in type(trainer.strategy).__mro__} & _SHARDING:
        raise ValueError(
            f"`{name}` does not support the strategy {type(trainer.strategy).__name__}, which shards the parameters "
            "that pruning cuts. Use a single device or `strategy='ddp'`."
        )
    launcher = type(getattr(trainer.strategy, "launcher", None)).__name__
    if launcher == "_MultiProcessingLauncher":
        raise ValueError(
            f"`{name}` does not support strategies that spawn or fork processes (ddp_spawn, ddp_notebook): "
            "the main process would load the pruned weights into its unpruned model. Use `strategy='ddp'`."
        )


def refuse_optimizers(optimizers: list[Optimizer]) -> None:
    """Refuse optimizers that evaluate the loss several times per step."""
    for optimizer in optimizers:
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
