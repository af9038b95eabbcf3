"""Lightning callbacks. `BasisDecomposition` and `IterativeBasisPruning` are all that a training run needs to add."""

from bsdp.callbacks.basis_decomposition import BasisDecomposition
from bsdp.callbacks.channel_pruning import ChannelPruning
from bsdp.callbacks.compensated_pruning import CompensatedPruning
from bsdp.callbacks.diff_pruning import DiffPruning
from bsdp.callbacks.double_pruning import DoublePruning
from bsdp.callbacks.iterative_basis_pruning import IterativeBasisPruning
from bsdp.callbacks.pruning_report import PruningReport
from bsdp.callbacks.source_pretraining import SourcePretraining
from bsdp.callbacks.two_temperature import TwoTemperaturePruning
from bsdp.callbacks.wandb_curves import WandbPruningCurves

__all__ = [
    "BasisDecomposition",
    "ChannelPruning",
    "CompensatedPruning",
    "DiffPruning",
    "DoublePruning",
    "IterativeBasisPruning",
    "PruningReport",
    "SourcePretraining",
    "TwoTemperaturePruning",
    "WandbPruningCurves",
]
