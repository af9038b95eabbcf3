"""One entry for every public callback; the common tests take them from here."""

from __future__ import annotations

from typing import Any

import bsdp.callbacks
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning

# What a callback needs beside it in the trainer, and arguments for a quick run.
SETTINGS: dict[str, dict[str, Any]] = {
    "BasisDecomposition": {},
    "IterativeBasisPruning": {"arguments": {"target": 0.5, "tolerance": None}, "beside": [BasisDecomposition]},
    "PruningReport": {
        "arguments": {"latency_repeats": 1},
        "beside": [BasisDecomposition, lambda: IterativeBasisPruning(target=0.5, tolerance=None)],
    },
    "WandbPruningCurves": {
        "beside": [BasisDecomposition, lambda: IterativeBasisPruning(target=0.5, tolerance=None)],
        "wandb": True,
    },
}


def make_callbacks(name: str) -> list[Any]:
    """The callback first, then what it needs."""
    settings = SETTINGS[name]
    callback = getattr(bsdp.callbacks, name)(**settings.get("arguments", {}))
    return [callback, *(make() for make in settings.get("beside", []))]
