"""The random states of a process in the plain form that a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

KEY = "random_states"


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, CUDA devices included.

    Every value is one that ``torch.load(weights_only=True)`` reads.
    """
    name, words, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(words, dtype=np.int64)), *(float(value) for value in rest)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Give the global generators back the states that `random_states` took.

    States of CUDA devices are left out where their number is another one.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, numbers, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, numbers.numpy().astype(np.uint32), int(position), int(has_gauss), float(cached)))
    torch.set_rng_state(states["torch"].cpu())
    devices = states.get("cuda", [])
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in devices])
