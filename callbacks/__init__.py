"""Lightning callbacks: `BasisDecomposition` and `IterativeBasisPruning` are all a training run needs to add."""

from bsdp.callbacks.basis_decomposition import BasisDecomposition
from bsdp.callbacks.iterative_basis_pruning import IterativeBasisPruning

__all__ = ["BasisDecomposition", "IterativeBasisPruning"]
