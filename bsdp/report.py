"""What a pruning run gained, as one dict of plain values: the content of ``summary.json``."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsdp.record import PruningRecord, RoundRecord


@dataclass(frozen=True)
class Measurements:
    """What the record of a run cannot know, None where it was not measured.

    Attributes:
        test_metric: Name of the metric that the two accuracies are.
        accuracy_reference: The unpruned model's value on the test set.
        accuracy_pruned: The chosen pruned model's value on the test set.
        macs_original: Multiply-adds of the original network; used where the record has none.
        macs_pruned: Multiply-adds of the pruned network; used where the record has none.
        file_bytes_original: Size of the original network as a safetensors file.
        file_bytes_pruned: Size of the pruned one.
        latency_ms_original: Milliseconds of one forward pass.
        latency_ms_pruned: Milliseconds of one forward pass of the pruned network.
        latency_batch_size: Examples in that pass.
        latency_threads: Threads it ran on.
        latency_device: Device it ran on.
        seed: Seed of the run.
        notes: What could not be measured, and why.
    """

    test_metric: str | None = None
    accuracy_reference: float | None = None
    accuracy_pruned: float | None = None
    macs_original: int | None = None
    macs_pruned: int | None = None
    file_bytes_original: int | None = None
    file_bytes_pruned: int | None = None
    latency_ms_original: float | None = None
    latency_ms_pruned: float | None = None
    latency_batch_size: int | None = None
    latency_threads: int | None = None
    latency_device: str | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()


def summarize(record: PruningRecord, measured: Measurements | None = None) -> dict[str, Any]:
    """Sum up a run in values that JSON can hold.

    Args:
        record: The run's history. While the run goes on (``record.chosen`` is None), its newest round counts as chosen.
        measured: What was measured besides.

    Returns:
        All fields of `measured`, the cost of the original and of the chosen network, what is kept per layer, and the
        rounds. Shares named ``*_kept`` are pruned / original. ``met_tolerance`` and ``reached_target`` say whether the
        run got what was asked for.

    Raises:
        ValueError: If the record has no rounds.
    """
    if not record.rounds:
        raise ValueError("`record` has no rounds: no pruning run has started.")
    measured = measured or Measurements()
    chosen = record.rounds[-1 if record.chosen is None else record.chosen]
    kept = record.kept(chosen, record.target_kind)
    summary: dict[str, Any] = {
        "accuracy_reference": measured.accuracy_reference,
        "accuracy_pruned": measured.accuracy_pruned,
        **_sizes(record, chosen, measured),
        "latency_ms_original": measured.latency_ms_original,
        "latency_ms_pruned": measured.latency_ms_pruned,
        "image_size": _image_size(known_shapes(record)),
        "seed": measured.seed,
        "test_metric": measured.test_metric,
        "monitor": record.monitor,
        "mode": record.mode,
        "validation_reference": record.reference,
        "validation_pruned": chosen.accuracy_best,
        "tolerance": record.tolerance,
        "met_tolerance": _met_tolerance(record, chosen),
        "target": record.target,
        "target_kind": record.target_kind,
        "reached_target": None if kept is None else kept <= 1.0 - record.target + 1e-9,
        "chosen_round": chosen.round,
        "file_bytes_original": measured.file_bytes_original,
        "file_bytes_pruned": measured.file_bytes_pruned,
        "latency_batch_size": measured.latency_batch_size,
        "latency_threads": measured.latency_threads,
        "latency_device": measured.latency_device,
        "input_shapes": known_shapes(record),
        "layers": _layers(record, chosen),
        "rounds": [_round(record, entry) for entry in record.rounds],
        "bsdp_version": _version(),
        "torch_version": str(torch.__version__),
        "notes": list(measured.notes),
    }
    plain: dict[str, Any] = _finite(summary)
    return plain


def write_summary(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a summary as JSON, whole or not at all.

    Args:
        summary: From `summarize`.
        path: Target; an existing file is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def short_names(record: PruningRecord) -> dict[str, str]:
    """Layer names as the exported network has them, by their names in the record."""
    prefix = f"{record.network}." if record.network else ""
    return {name: name.removeprefix(prefix) for name in record.cost.layers}


def known_shapes(record: PruningRecord) -> list[list[int]]:
    """Shapes of the network's inputs for one example; empty when they were never seen."""
    shapes = [list(shape) for shape in record.input_shapes]
    return shapes if all(shape and min(shape) > 0 for shape in shapes) else []


def _sizes(record: PruningRecord, chosen: RoundRecord, measured: Measurements) -> dict[str, Any]:
    macs = (measured.macs_original, measured.macs_pruned)
    if record.cost.fixed_macs is not None and chosen.macs is not None:
        macs = (record.cost.original("macs"), chosen.macs)
    return {
        "params_original": record.cost.original("params"),
        "params_pruned": chosen.params,
        "params_kept": record.kept(chosen, "params"),
        "macs_original": macs[0],
        "macs_pruned": macs[1],
        "macs_kept": macs[1] / macs[0] if macs[0] and macs[1] is not None else None,
        "latency_kept": record.kept(chosen, "latency"),
        "bases_original": record.cost.original("bases"),
        "bases_pruned": chosen.bases,
        "bases_kept": record.kept(chosen, "bases"),
        "channels_original": record.original("channels") or None,
        "channels_pruned": sum(chosen.channels.values()) or None,
        "channels_kept": record.kept(chosen, "channels"),
    }


def _layers(record: PruningRecord, chosen: RoundRecord) -> list[dict[str, Any]]:
    if chosen.layers:  # channels went, so that the cost of the original does not tell
        return [dict(row) for row in chosen.layers]
    rows: list[dict[str, Any]] = []
    for name, short in short_names(record).items():
        layer, rank = record.cost.layers[name], chosen.ranks[name]
        params, params_original = layer.deployed(rank, new_bias=record.cost.new_bias), layer.original()
        macs = macs_original = None
        if layer.positions is not None:
            macs, macs_original = layer.deployed(rank, kind="macs"), layer.original(kind="macs")
        rows.append(
            {
                "name": short,
                "kind": layer.kind(rank),
                "rank": rank,
                "full_rank": layer.full_rank,
                "groups": layer.groups,
                "params": params,
                "params_original": params_original,
                "params_kept": params / params_original,
                "macs": macs,
                "macs_original": macs_original,
                "macs_kept": macs / macs_original if macs_original and macs is not None else None,
            }
        )
    return rows


def _round(record: PruningRecord, entry: RoundRecord) -> dict[str, Any]:
    values = {key: value for key, value in vars(entry).items() if key not in ("ranks", "layers", "channels")}
    return {**values, **{f"{kind}_kept": record.kept(entry, kind) for kind in ("params", "macs", "latency")}}


def _met_tolerance(record: PruningRecord, chosen: RoundRecord) -> bool | None:
    if record.tolerance is None or record.reference is None or chosen.accuracy_best is None:
        return None
    fall = record.reference - chosen.accuracy_best
    return (fall if record.mode == "max" else -fall) <= record.tolerance + 1e-12


def _image_size(shapes: list[list[int]]) -> int | list[int] | None:
    """Side of square inputs, else the list of spatial sizes; None where there are none."""
    spatial = shapes[0][2:] if shapes else []
    if not spatial:
        return None
    return spatial[0] if len(set(spatial)) == 1 else list(spatial)


def _version() -> str | None:
    try:
        return importlib.metadata.version("bsdp")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return None


def _finite(value: Any) -> Any:
    """The same value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
