"""Reading the file that an offline W&B run leaves behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_records(folder: Path) -> list[Any]:
    """All records of the one offline run below a folder, as protocol buffers."""
    (path,) = folder.rglob("*.wandb")
    records = []
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        records.append(record)
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The logged rows in order."""
    return [_items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]


def summary(records: list[Any]) -> dict[str, Any]:
    """The run's summary after all updates."""
    values: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            values.update(_items(record.summary.update))
    return values


def step_metrics(records: list[Any]) -> dict[str, str]:
    """The x-axis of each defined metric, "" for a metric without one; wildcards by their pattern."""
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _payloads(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format: blocks of 32 KiB, records cut where a block ends; the first block holds a header."""
    position, parts = _FILE_HEADER, b""
    while position + _RECORD_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _RECORD_HEADER:
            position += _BLOCK - position % _BLOCK
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + _RECORD_HEADER : position + _RECORD_HEADER + length]
        position += _RECORD_HEADER + length
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            yield parts
