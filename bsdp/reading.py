"""Reading files of unknown origin: no code from them runs, and what they claim is checked before a model changes."""

from __future__ import annotations

import json
import os
import re
import reprlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import parameter

from bsdp.cost import layer_cost
from bsdp.layers import new_layer, weight_of
from bsdp.surgery import module_names

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
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({reason_of(error)}).") from error


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
            "that could run code. Nothing of it was run. Ask its author for a safetensors file or a plain state dict, or "
            "convert it yourself where you trust its origin."
        ) from error


def _refuse_compressed(path: Path) -> None:
    """``torch.save`` stores its records as they are, so one that grows when it is read is meant to fill the memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > path.stat().st_size:
        raise ValueError(f"its records claim {size} bytes, more than the file has")


def meta_layer(layer: nn.Module) -> nn.Module:
    """The plain layer of a layer's (or pair's original) geometry on the meta device: sizes without memory."""
    options: dict[str, Any] = {"device": torch.device("meta"), "dtype": weight_of(layer).dtype}
    cost = layer_cost(layer)
    return new_layer(layer, cost.out_channels, bias=cost.bias, **options)


def expected_state(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> dict[str, Any]:
    """The state dict that a model will have, without changing it.

    Args:
        model: The model.
        replacements: What will stand in the place of some of its modules; meta tensors will do.

    Returns:
        Names and tensors; those under several names are the same objects.
    """
    everywhere = module_names(model)
    named = {name: new for old, new in replacements.items() for name in everywhere[old]}
    prefixes = tuple(f"{name}." if name else "" for name in named)
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.startswith(prefixes)}
    for name, new in named.items():
        state.update(new.state_dict(keep_vars=True, prefix=f"{name}." if name else ""))
    return state


def check_names_and_shapes(
    expected: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, path: object, strict: bool = True
) -> None:
    """Refuse a file whose tensors do not fit, by their names and shapes alone.

    Args:
        expected: From `expected_state`.
        shapes: Shape of every tensor of the file.
        path: The file, for the error.
        strict: Whether the names must be the same.
    """
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if strict and (missing or extra):
        raise ValueError(
            f"{path} does not fit the model: it lacks {shown(missing[:3])} and has unknown {shown(extra[:3])}; "
            "pass the original architecture."
        )
    for key, shape in shapes.items():
        own = expected.get(key)
        if isinstance(own, Tensor) and not parameter.is_lazy(own) and shape != tuple(own.shape):
            raise ValueError(
                f"{path} does not fit the model: {key!r} has shape {shown(shape)}, the model needs "
                f"{tuple(own.shape)}; pass the original architecture with the same number of classes."
            )


def check_names(expected: Mapping[str, Any], state: Mapping[str, Any], *, path: object, strict: bool = True) -> None:
    """`check_names_and_shapes` of tensors that are in memory; what is no tensor is compared by its name alone."""
    for key, value in state.items():
        if isinstance(expected.get(key), Tensor):
            _refuse_odd(key, value, path)
    shapes = {key: tuple(value.shape) if is_ordinary(value) else () for key, value in state.items()}
    check_names_and_shapes(expected, shapes, path=path, strict=strict)


def check_values(expected: Mapping[str, Any], tensors: Mapping[str, Tensor], *, path: object) -> None:
    """Refuse tensors that the model's cannot be copied from: of another kind, NaN, infinite, or tied but different.

    Floating-point tensors may be of another precision, for loading converts them to the model's, if their values
    remain finite. Every other type must be the model's own. Infinity is allowed where the model has the same now (the
    masks of attention are kept like that).

    Args:
        expected: From `expected_state`; names that are not in it are skipped.
        tensors: The file's tensors, of the expected shapes.
        path: The file, for the error.
    """
    first: dict[int, str] = {}
    for key, value in tensors.items():
        own = expected.get(key)
        if not isinstance(own, Tensor):
            continue
        check_tensor(key, value, own, path=path)
        twin = first.setdefault(id(own), key)
        if twin != key and not torch.equal(value, tensors[twin]):
            raise ValueError(
                f"{path} does not fit the model: {twin!r} and {key!r} are one tensor there, but differ here."
            )


def check_tensor(key: str, value: Tensor, own: Tensor, *, path: object) -> None:
    """Refuse one tensor, see `check_values`."""
    floating = value.is_floating_point() and own.is_floating_point()
    if value.dtype != own.dtype and not floating:
        raise ValueError(f"{path} does not fit the model: {key!r} is {value.dtype}, the model needs {own.dtype}.")
    converted = value.detach().to(own.dtype)
    if not floating and not value.is_complex():
        return
    wide = converted if converted.element_size() > 1 else converted.float()  # 8-bit floats have few operations
    if not wide.isfinite().all() and (own.is_meta or not torch.equal(own.detach().cpu(), converted.cpu())):
        precision = "" if value.dtype == own.dtype else f" (in {own.dtype}, which the model has)"
        raise ValueError(f"{path} holds NaN or infinity in {key!r}{precision}; take a file from before it diverged.")


def _refuse_odd(key: str, value: object, path: object) -> None:
    if not is_ordinary(value):
        raise ValueError(f"{path} does not fit the model: {key!r} is not an ordinary dense tensor.")


def is_ordinary(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor with values, of no subclass: what weights are made of."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    return value.layout == torch.strided and not value.is_meta and not value.is_quantized
