"""Files that mean harm, and the proof that they did none."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.compare import assert_same_state, snapshot


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.marker,)


def _plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _new_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def _legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[object, Path], None]] = {
    "pickle2": _plain_pickle,
    "pickle": _new_pickle,
    "zip": torch.save,
    "legacy": _legacy,
}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that a block leaves a model as it was: tensors, modules, what trains, modes and hooks."""
    state, facts = snapshot(model), _facts(model)
    yield
    assert_same_state(model, state)
    assert _facts(model) == facts


def _facts(model: nn.Module) -> tuple[object, ...]:
    modules = [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def write_safetensors(path: Path, header: str | dict[str, Any], data: bytes = b"", *, size: int | None = None) -> Path:
    """Write a safetensors file by hand.

    Args:
        path: Target.
        header: The JSON header, or its text.
        data: What follows.
        size: Length of the header to claim; None for the true one.
    """
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and its data."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header, content[8 + size :]
