"""One entry for every public callback; the common tests take them from here."""

from __future__ import annotations

from typing import Any

import bsdp.callbacks
from bsdp.callbacks import BasisDecomposition, IterativeBasisPruning
from tests.helpers.pruning_runs import Stripes, StripesWithSource

# What a callback needs beside it in the trainer, arguments for a quick run, and data if the plain ones will not do.
SETTINGS: dict[str, dict[str, Any]] = {
    "BasisDecomposition": {},
    "CompensatedPruning": {"arguments": {"tolerance": 0.5}},
    "ChannelPruning": {"arguments": {"target": 0.5, "tolerance": None, "criterion": "channel_scaling", "l1": 0.01}},
    "DiffPruning": {"arguments": {"gate_epochs": 1, "density": 0.1}},
    "DoublePruning": {
        "arguments": {"target": 0.4, "warmup_epochs": 1, "tolerance": None},
        "beside": [BasisDecomposition],
    },
    "IterativeBasisPruning": {
        "arguments": {"target": 0.5, "warmup_epochs": 1, "tolerance": None},
        "beside": [BasisDecomposition],
    },
    "PruningReport": {
        "arguments": {"latency_repeats": 1},
        "beside": [BasisDecomposition, lambda: IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None)],
    },
    "SourcePretraining": {"arguments": {"epochs": 1}, "beside": [BasisDecomposition], "data": StripesWithSource},
    "TwoTemperaturePruning": {
        "arguments": {"target": 0.5, "tolerance": None, "warmup_epochs": 0, "search_epochs": 1},
        "beside": [BasisDecomposition],
    },
    "WandbPruningCurves": {
        "beside": [BasisDecomposition, lambda: IterativeBasisPruning(warmup_epochs=1, target=0.5, tolerance=None)],
        "wandb": True,
    },
}


def make_callbacks(name: str) -> list[Any]:
    """The callback first, then what it needs."""
    settings = SETTINGS[name]
    callback = getattr(bsdp.callbacks, name)(**settings.get("arguments", {}))
    return [callback, *(make() for make in settings.get("beside", []))]


def make_data(name: str) -> Stripes:
    """The data module that the callback runs on."""
    data: Stripes = SETTINGS[name].get("data", Stripes)()
    return data
