"""Weight files: find them, read them without running code from them, and load them into a network."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bsdp.fitting import check_tensor, is_ordinary
from bsdp.reading import open_safetensors, parse_json, read_pickled, tensors_of
from bsdp.surgery import load_tensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "network.")

_reading = ContextVar("reading", default=True)


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Args:
        path: Where it was found.
        state: Names and tensors.
        metadata: What `bsdp.save` was told about the network; empty for files of other origin.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: dict[str, Any]


@contextmanager
def no_weight_files() -> Iterator[None]:
    """Build networks without reading pretrained weights: for callers that load a whole checkpoint right after."""
    token = _reading.set(False)
    try:
        yield
    finally:
        _reading.reset(token)


def weight_files_are_read() -> bool:
    """False inside `no_weight_files`."""
    return _reading.get()


def looks_like_file(weights: str) -> bool:
    """Tell a path from the name of published weights, without touching the disk."""
    return weights.endswith(SUFFIXES) or os.sep in weights or "/" in weights


def find_weight_file(weights: str) -> Path:
    """Find a weight file; relative paths are also looked up below ``BSDP_DATA`` and ``BSDP_DATA/weights``.

    Args:
        weights: A path; ``~`` stands for the home folder.

    Raises:
        FileNotFoundError: If there is no such file; the message lists the places that were tried.
    """
    path = Path(weights).expanduser()
    tried = [path]
    data = os.environ.get("BSDP_DATA")
    if data and not path.is_absolute():
        tried += [Path(data).expanduser() / path, Path(data).expanduser() / "weights" / path]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    places = ", ".join(str(candidate.absolute()) for candidate in tried)
    advice = "" if data else "; relative paths are also looked up below the folder in the variable BSDP_DATA (not set)"
    raise FileNotFoundError(
        f"`weights`: no file {weights!r}. Looked at: {places}{advice}. Give the path of a {', '.join(SUFFIXES)} file, "
        "the name of published weights, or `none` for random ones."
    )


def read_weight_file(path: Path) -> WeightFile:
    """Read a ``.safetensors`` file or a state dict saved by ``torch.save``.

    Checkpoints that keep the state dict under a usual key, and names that begin with ``module.`` (data parallel) or
    ``network.`` (`bsdp.task.TransferTask`), are unwrapped.

    Raises:
        ValueError: If the file cannot be read or holds no state dict.
    """
    try:
        content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickled(path), {})
    except ValueError as error:
        raise ValueError(
            f"`weights`: {path} cannot be read as a weight file. {error} Allowed are safetensors files and state dicts "
            "saved by torch.save, which are read without running code from them."
        ) from error
    plan = metadata.get("layers") or {}
    pruned = not isinstance(plan, dict) or any(
        not isinstance(entry, dict) or entry.get("kind") != "plain" for entry in plan.values()
    )
    if pruned or _has_structure(content):
        raise ValueError(
            f"`weights`: {path} holds a pruned network; read it with `bsdp.load`, or give the weights it was made from."
        )
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"`weights`: {path} holds no state dict (names and tensors) but {type(content).__name__}.")
    odd = [str(key) for key, value in content.items() if isinstance(value, Tensor) and not is_ordinary(value)]
    if odd:
        raise ValueError(f"`weights`: {path} holds tensors that are not ordinary dense ones, first {odd[0]!r}.")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return WeightFile(path, state, metadata)


def _has_structure(content: object) -> bool:
    """Whether something that was unpickled is a checkpoint of a network that was changed, see `bsdp.structure_of`."""
    structure = content.get("bsdp") if isinstance(content, Mapping) else None
    return isinstance(structure, Mapping) and any(value for key, value in structure.items() if key != "version")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open_safetensors(path) as file:
        metadata = parse_json((file.metadata() or {}).get("bsdp", "{}"), path)
        if not isinstance(metadata, dict):
            raise ValueError(f"{path} has metadata that is no table.")
        return tensors_of(file, path), metadata


def load_state(network: nn.Module, file: WeightFile, *, spec: str, may_lack: str, extra: Sequence[str] = ()) -> None:
    """Load a weight file into a network, strictly but for what is named.

    Args:
        network: Receives the weights in place.
        file: What to load.
        spec: Name of the backbone, for the error.
        may_lack: Top-level module that the file may lack as a whole (a new head follows).
        extra: Top-level modules that the file may have on top (auxiliary heads that are switched off).

    Raises:
        ValueError: If names or shapes differ otherwise; the message shows the first few.
    """
    own = network.state_dict()
    state = {key: value for key, value in file.state.items() if key in own or key.split(".")[0] not in extra}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    if not any(key.split(".")[0] == may_lack for key in state):
        missing = [key for key in missing if key.split(".")[0] != may_lack]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        details = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unexpected), ("of another shape", shapes))
            if names
        ]
        raise ValueError(
            f"`weights`: {file.path} does not fit the backbone {spec!r}, it seems to be of another architecture: of "
            f"{len(own)} expected tensors, {'; '.join(details)}. Choose the `backbone` the file was made for, another "
            "file, or `weights: none` to start from random weights."
        )
    for key, value in state.items():
        check_tensor(key, value, own[key], path=f"`weights`: {file.path}")
    load_tensors(network, state, strict=False)
