"""The ranks of a decomposed network as a small file of their own, to be used for other tasks: ``structure.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsdp.cost import LayerCost
from bsdp.reading import parse_json, refuse_absent, shown
from bsdp.report import write_summary

PATTERN_VERSION = 1


@dataclass(frozen=True)
class RankPattern:
    """Rank per group and layer, without any weights.

    Attributes:
        ranks: Rank of every decomposed layer, by its name in the network.
        full_ranks: Full rank of the same layers, by which another architecture is noticed.
    """

    ranks: dict[str, int]
    full_ranks: dict[str, int]

    def check(self, layers: Mapping[str, LayerCost], ranks: Mapping[str, int]) -> None:
        """Refuse a network of another architecture, or one that has lost bases already.

        Args:
            layers: Cost of the network's decomposed layers.
            ranks: Their present ranks.

        Raises:
            ValueError: If the pattern does not fit.
        """
        odd = sorted(self.ranks.keys() ^ layers.keys())
        if odd:
            where = "the structure" if odd[0] in self.ranks else "the network"
            raise ValueError(
                f"`structure` does not fit: only {where} has the decomposed layer {odd[0]!r} ({len(odd)} layers "
                "differ). Use the architecture, and the settings of `BasisDecomposition`, of the run that found it."
            )
        for name, rank in self.ranks.items():
            full = layers[name].full_rank
            if full != self.full_ranks[name]:
                raise ValueError(
                    f"`structure` does not fit: layer {name!r} had the full rank {self.full_ranks[name]} and "
                    f"has {full} here. Use the architecture of the run that found it."
                )
            if rank > ranks[name]:
                raise ValueError(
                    f"`structure` wants rank {rank} in layer {name!r}, which has {ranks[name]} left: start from a "
                    "network that was not pruned."
                )


def save_pattern(pattern: RankPattern, path: str | os.PathLike[str], **facts: Any) -> Path:
    """Write a pattern as JSON, whole or not at all.

    Args:
        pattern: What to write.
        path: Target; an existing file is replaced.
        **facts: What else to note in the file; nobody reads it back.
    """
    layers = {name: {"rank": rank, "full_rank": pattern.full_ranks[name]} for name, rank in pattern.ranks.items()}
    return write_summary({"version": PATTERN_VERSION, **facts, "layers": layers}, path)


def load_pattern(path: str | os.PathLike[str]) -> RankPattern:
    """Read what `save_pattern` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or of another kind.
    """
    path = Path(path)
    refuse_absent(path)
    content = parse_json(path.read_text(encoding="utf-8", errors="replace"), path)
    version = content.get("version") if isinstance(content, dict) else None
    layers = content.get("layers") if isinstance(content, dict) else None
    if type(version) is not int or version != PATTERN_VERSION or not isinstance(layers, dict) or not layers:
        raise ValueError(
            f"{path} is no structure of version {PATTERN_VERSION}: it needs `version` and a table `layers`. Take the "
            "`structure.json` of a run with `TwoTemperaturePruning`."
        )
    for name, entry in layers.items():
        rank, full = (entry.get(key) if isinstance(entry, dict) else None for key in ("rank", "full_rank"))
        if type(rank) is not int or type(full) is not int or not 1 <= rank <= full:
            raise ValueError(
                f"{path} has the entry {shown(entry)} for layer {shown(name)}; it needs `rank` and `full_rank`, whole "
                "numbers with 1 <= rank <= full_rank."
            )
    return RankPattern(
        ranks={name: entry["rank"] for name, entry in layers.items()},
        full_ranks={name: entry["full_rank"] for name, entry in layers.items()},
    )
