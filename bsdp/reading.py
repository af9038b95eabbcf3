"""Reading files of unknown origin: no code from them runs, and errors say what is wrong in one short paragraph."""

from __future__ import annotations

import json
import os
import re
import reprlib
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def shown(value: object) -> str:
    """A short ``repr`` in one line, for error messages; what a file claims may be huge or deeply nested."""
    return _SHORT.repr(value)


def reason_of(error: BaseException) -> str:
    """The type and the text of an error in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def refuse_absent(path: Path) -> None:
    """Refuse a path that is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}{' is a folder' if path.is_dir() else ''}")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; its header is checked against the file's size before anything is allocated.

    Raises:
        ValueError: If the file is damaged or of another kind, also when that shows only while tensors are read.
    """
    from safetensors import SafetensorError, safe_open

    refuse_absent(path)
    try:
        with safe_open(path, framework="pt") as file:
            _refuse_double_names(path)
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({reason_of(error)}).") from error


def _refuse_double_names(path: Path) -> None:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        parse_json(file.read(size).decode(errors="replace"), path)


def tensors_of(file: Any, path: Path) -> dict[str, Tensor]:
    """All tensors of an open safetensors file."""
    try:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # types that this version of torch does not know end in different ones
        raise ValueError(f"{path} has tensors that cannot be read ({reason_of(error)}).") from error


def parse_json(text: str, path: Path) -> Any:
    """Parse the JSON of a file's metadata; a key that stands twice is refused, for readers differ on which counts."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has metadata that is not JSON ({reason_of(error)}).") from error


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote onto the CPU, with ``weights_only=True``: nothing in the file can run code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds more than plain values and tensors.
    """
    path = Path(path)
    refuse_absent(path)
    try:
        _refuse_compressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that the reader then reads or refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many types, all of them mean: not a file we read
        found = re.search(r"(?:GLOBAL|class|function|global) `?([A-Za-z_][\w.]*\.\w+)", str(error))
        if found is None:
            # Torch's own text advises to unpickle the file after all.
            text = reason_of(error) if "weights_only" not in str(error) else type(error).__name__
            raise ValueError(
                f"{path} cannot be read as a file of torch.save ({text}): it is damaged, cut short or of another kind. "
                "Fetch or write it again."
            ) from error
        raise ValueError(
            f"{path} cannot be read safely: it holds more than numbers, text and tensors ({found[1]}), and unpickling "
            "that could run code. Nothing of it was run. Ask its author for a safetensors file or a plain state dict, "
            "or convert it yourself where you trust its origin."
        ) from error


@contextmanager
def without_unpickling() -> Iterator[None]:
    """Make every ``torch.load`` inside read weights only, also those of libraries that fetch files by themselves."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` stores its records as they are, so one that grows when it is read is meant to fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > path.stat().st_size:
        raise ValueError(f"its records claim {size} bytes, more than the file has")
