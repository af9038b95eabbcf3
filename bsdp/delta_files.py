"""Tiny files per task: the non-zero entries of a sparse delta, and the head, for a backbone that many tasks share.

A file is safetensors: ``indices`` (of the flattened parameters, one after the other), ``values`` and the tensors of the
head as ``head.NAME``. Its metadata names the parameters with their shapes and counts, and holds a hash of the backbone,
so that a delta cannot be put on weights that it was not made for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bsdp.diff_pruning import delta_parameters, named_deltas
from bsdp.files import write_tensors
from bsdp.fitting import check_tensor
from bsdp.heads import head_outputs
from bsdp.reading import open_safetensors, parse_json, shown, tensors_of

DELTA_VERSION = 1
_KEY = "bsdp_delta"
_HEAD = "head."


def save_delta(
    model: nn.Module, path: str | os.PathLike[str], *, head: Iterable[str], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write the projected deltas of a model, and its head, to one small file.

    Args:
        model: A model with deltas whose masks are fixed (`attach_deltas`, then `project_deltas`).
        path: Target, usually ending in ``.safetensors``; an existing file is replaced.
        head: Names of the modules that are stored whole, because every task has its own; [] for none.
        metadata: Further values that JSON can hold, for example class names; read them with `read_delta_metadata`.

    Returns:
        The path.

    Raises:
        ValueError: If the model has no deltas or gated ones, or a name in `head` is no module without deltas.
    """
    deltas = named_deltas(model)
    if not deltas or not all(delta.fixed for delta in deltas.values()):
        raise ValueError(
            f"`model` has {'gated' if deltas else 'no'} deltas: attach them and call `project_deltas` first."
        )
    head = list(head)
    stored = _head_tensors(model, head)
    parameters, indices, values = [], [], []
    for name, delta in deltas.items():
        flat = delta.delta().detach().cpu().flatten()
        found = flat.nonzero().flatten()
        if found.numel():
            parameters.append([name, list(delta.value.shape), found.numel()])
            indices.append(found)
            values.append(flat[found])
    none = [torch.zeros(0)]
    kind = torch.int32 if all(delta.value.numel() < 2**31 for delta in deltas.values()) else torch.int64
    tensors = {"indices": torch.cat(indices or none).to(kind), "values": torch.cat(values or none)}
    tensors |= {f"{_HEAD}{key}": value.detach().cpu().contiguous().clone() for key, value in stored.items()}
    header = {
        "format_version": DELTA_VERSION,
        "backbone": fingerprint(model, head=head),
        "head": head,
        "parameters": parameters,
        "metadata": dict(metadata or {}),
    }
    return write_tensors(path, tensors, metadata={_KEY: json.dumps(header, separators=(",", ":"))})


def fingerprint(model: nn.Module, *, head: Iterable[str]) -> str:
    """A hash of everything in a model but its head: names, types, shapes and bits of parameters and buffers.

    Args:
        model: Plain, or with deltas, which do not count.
        head: Names of the modules to leave out.
    """
    digest = hashlib.sha256()
    inside = tuple(f"{name}." for name in head)
    deltas = {
        id(tensor) for delta in named_deltas(model).values() for tensor in delta.state_dict(keep_vars=True).values()
    }
    state = {
        key.replace("parametrizations.", "").removesuffix(".original"): value.detach()
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and id(value) not in deltas and not key.startswith(inside)
    }
    for key in sorted(state):
        value = state[key].cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def read_delta_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values that `save_delta` was given as `metadata`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a file of `save_delta`.
    """
    with open_safetensors(Path(path)) as file:
        return dict(_header(file, Path(path))["metadata"])


class AppliedDelta:
    """A delta that is on a model; a context manager that takes it off again.

    Args:
        entries: Number of non-zero entries.
        metadata: What the file's author wrote.
        before: Modules, and what was in them by name, in the order of the changes.
    """

    def __init__(self, entries: int, metadata: dict[str, Any], before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        self.entries = entries
        self.metadata = metadata
        self._before = before

    def remove(self) -> None:
        """Put the parameters of backbone and head back, the very objects from before; a second time: nothing."""
        while self._before:
            module, values = self._before.pop()
            for name, value in values.items():
                _put(module, name, value)

    def __enter__(self) -> AppliedDelta:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> AppliedDelta:
    """Turn a plain backbone into the model of one task: add the file's delta, and take its head.

    Everything is checked before the model changes. The parameters that a delta touches are replaced by new ones, and
    the frozen ones are kept for `AppliedDelta.remove`, so that the next task starts from the same bits. The head may
    have another number of classes. The model runs at the speed of the backbone.

    Args:
        model: The plain backbone that the delta was trained on.
        path: A file of `save_delta`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not ours, or for other weights or another architecture, or if the model has
            a delta already; the model is then as it was.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        header = _header(file, path)
        tensors = tensors_of(file, path)
    _check_model(model, header, path)
    deltas = _checked_deltas(model, header["parameters"], tensors, path)
    head = _checked_head(model, header["head"], tensors, path)
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    for name, (index, values) in deltas.items():
        own = model.get_parameter(name)
        delta = torch.zeros(own.numel(), dtype=own.dtype, device=own.device)
        delta[index.to(own.device)] = values.to(own)
        new = nn.Parameter(own.detach() + delta.view(own.shape), requires_grad=own.requires_grad)
        before.append(_replace(model, name, new))
    for name, value in head.items():
        before.append(_replace(model, name, value))
    return AppliedDelta(sum(index.numel() for index, _ in deltas.values()), header["metadata"], before)


def _replace(model: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, dict[str, Any]]:
    """Put a tensor in the place of another; gives what was there."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, child)
    if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value.to(old), requires_grad=old.requires_grad)
    before = {child: old}
    if child == "weight" and value.shape != old.shape:  # a head with another number of classes
        width = "out_features" if isinstance(module, nn.Linear) else "out_channels"
        before[width] = getattr(module, width)
        setattr(module, width, value.shape[0])
    _put(module, child, value if isinstance(value, nn.Parameter) else value.to(old))
    return module, before


def _put(module: nn.Module, name: str, value: Any) -> None:
    table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    if name in table:
        table[name] = value
    else:
        setattr(module, name, value)


def _head_tensors(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    for name in head:
        if not name or name not in modules or named_deltas(modules[name]):
            raise ValueError(f"`head` must name modules without deltas, got {shown(name)}.")
    return {f"{name}.{key}": v for name in head for key, v in modules[name].state_dict(keep_vars=True).items()}


def _header(file: Any, path: Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise ValueError(f"{path} was not written by `bsdp.save_delta`: its metadata has no entry `{_KEY}`.")
    header = parse_json(text, path)
    version = header.get("format_version") if isinstance(header, dict) else None
    if type(version) is not int or version != DELTA_VERSION:
        raise ValueError(f"{path} has format version {shown(version)}; this release reads version {DELTA_VERSION}.")
    for key, kind in (("backbone", str), ("head", list), ("parameters", list), ("metadata", dict)):
        if not isinstance(header.get(key), kind):
            raise ValueError(f"{path} has the entry {shown(header.get(key))} as `{key}`; the file is damaged.")
    return dict(header)


def _check_model(model: nn.Module, header: Mapping[str, Any], path: Path) -> None:
    if named_deltas(model):
        raise ValueError(f"{path}: the model has trainable deltas: `detach_deltas` takes them off.")
    names = {name for name, _ in model.named_modules() if name}
    unknown = [name for name in header["head"] if not isinstance(name, str) or name not in names]
    if unknown:
        raise ValueError(f"{path} has a head {shown(unknown[0])}, which the model has not: pass the same architecture.")
    if header["backbone"] != fingerprint(model, head=header["head"]):
        raise ValueError(
            f"{path} was made for other backbone weights than the model has: load the pretrained weights of its run in "
            "the same precision, and `remove` the delta of another task first."
        )


def _checked_deltas(
    model: nn.Module, parameters: list[Any], tensors: Mapping[str, Tensor], path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Indices and values by parameter."""
    indices, values = tensors.get("indices"), tensors.get("values")
    if indices is None or values is None or indices.dim() != 1 or indices.shape != values.shape:
        raise ValueError(f"{path} lacks `indices` and `values` of one length; the file is damaged.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{path} has `indices` of type {indices.dtype}; the file is damaged.")
    known, start = delta_parameters(model), 0
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for entry in parameters:
        name, shape, count = entry if isinstance(entry, list) and len(entry) == 3 else (None, None, None)
        own = known.get(name) if isinstance(name, str) else None
        if (
            not isinstance(name, str)
            or own is None
            or list(own.shape) != shape
            or type(count) is not int
            or count < 1
            or name in found
        ):
            raise ValueError(f"{path} has a delta {shown(entry)}, which the model has no such parameter for.")
        index, value = indices[start : start + count].long(), values[start : start + count]
        if index.numel() != count or index[0] < 0 or index[-1] >= own.numel() or (index.diff() < 1).any():
            raise ValueError(f"{path} has indices of {name!r} that are not ascending in its range, or too few.")
        check_tensor(name, value, own.detach().flatten()[index.to(own.device)], path=path)
        found[name], start = (index, value), start + count
    if start != indices.numel():
        raise ValueError(f"{path} has {indices.numel() - start} entries that belong to no parameter.")
    return found


def _checked_head(model: nn.Module, head: list[str], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    own = _head_tensors(model, head)
    new = {key.removeprefix(_HEAD): v for key, v in tensors.items() if key not in ("indices", "values")}
    extra = [key for key in tensors if key not in ("indices", "values") and not key.startswith(_HEAD)]
    if extra or new.keys() != own.keys():
        odd = extra or sorted(new.keys() ^ own.keys())
        raise ValueError(f"{path} does not fit the head of the model: see {shown(odd[:3])}.")
    for key, value in new.items():
        module = model.get_submodule(key.rpartition(".")[0])
        classes = new[f"{key.rpartition('.')[0]}.weight"].shape[:1] if head_outputs(module) is not None else None
        shape = tuple(own[key].shape) if classes is None else (*classes, *own[key].shape[1:])
        if tuple(value.shape) != shape or not value.numel():
            raise ValueError(f"{path} has {key!r} of shape {tuple(value.shape)}, the model needs {shape}.")
        check_tensor(key, value, torch.zeros(value.shape, dtype=own[key].dtype), path=path)
    return new
