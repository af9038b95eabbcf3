"""Values of the command line of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def overrides_of(words: list[str]) -> dict[str, Any]:
    """Values by dotted name, from ``--a.b value`` and ``--a.b=value``."""
    values: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"unexpected {word!r}: options are --NAME VALUE; see --help.")
        given = value if equals else next(rest, None)
        if given is None:
            raise ValueError(f"`{name}` needs a value.")
        values[name[2:]] = yaml.safe_load(given)
    return values


def seeds_of(text: str) -> list[int]:
    """Seeds, from ``0,1,2``.

    Raises:
        ValueError: If one is no whole number from 0 on or stands there twice.
    """
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"`--seeds` must be different whole numbers from 0 on, such as 0,1,2, got {text!r}.")
    return seeds


def targets_of(text: str) -> list[float]:
    """Shares to remove, from ``0.5,0.9``.

    Raises:
        ValueError: If one is no share or stands there twice.
    """
    try:
        targets = [float(word) for word in text.split(",") if word]
    except ValueError:
        targets = [0.0]
    if not all(0.0 < target < 1.0 for target in targets) or len(set(targets)) < len(targets):
        raise ValueError(f"`--targets` must be different shares between 0 and 1, such as 0.5,0.7,0.9, got {text!r}.")
    return targets


def task_name(task: str, overrides: dict[str, Any]) -> str:
    """Name of the task, with another network and another number of images in it: those are other tasks."""
    name = Path(task).stem
    if "model.backbone" in overrides:
        name += "_" + str(overrides["model.backbone"]).rsplit(":", 1)[-1]
    if "data.image_size" in overrides:
        name += f"_{overrides['data.image_size']}px"
    if "data.samples_per_class" in overrides:
        name += f"_{overrides['data.samples_per_class'] or 'all'}_per_class"
    return name
