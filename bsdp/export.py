"""Writing a network as a file that runs without this package: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bsdp._checks import check_choice
from bsdp._compare import Difference, largest_difference, tensors_of, tolerance_for
from bsdp.batch_norm_folding import BatchNormFolding, fold_batch_norm
from bsdp.folding import fold
from bsdp.onnx_files import Runner, onnx_runner, require_onnx, write_onnx
from bsdp.probing import as_inputs, evaluating
from bsdp.reading import reason_of

EXPORT_FORMATS = ("onnx", "pt2")
METADATA_FILE = "bsdp.json"


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote.

    Attributes:
        path: The file.
        format: ``"onnx"`` or ``"pt2"``.
        num_bytes: Its size.
        batch_norms: What became of the batch norms; the file holds the outputs of its `model`.
        differences: Per checked batch size, how far the file's outputs are from those of the model; empty unchecked.
    """

    path: Path
    format: str
    num_bytes: int
    batch_norms: BatchNormFolding
    differences: dict[int, Difference]

    def __str__(self) -> str:
        lines = [str(self.batch_norms)]
        lines += [
            f"checked at batch size {size}: largest difference from PyTorch {difference}"
            for size, difference in self.differences.items()
        ]
        return "\n".join([*lines, f"{self.path}: {self.num_bytes:,} bytes"])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | tuple[Tensor, ...],
    *,
    format: str | None = None,
    dynamic_batch: bool = False,
    channels_last: bool = False,
    metadata: Mapping[str, Any] | None = None,
    check: bool = True,
    force: bool = False,
) -> ExportReport:
    """Write a model in eval mode as a file that needs neither its code nor this package.

    A decomposed model is folded first (`fold`), then batch norms are folded where that is exact (`fold_batch_norm`).
    The file is written beside the target, checked against PyTorch, and moved only then.

    Args:
        model: Any model that ``torch.export`` can trace; it is left alone.
        path: Target.
        example_input: Input (or tuple of inputs) of the model; the file is made for these sizes.
        format: ``"onnx"`` (``pip install 'bsdp[export]'``) or ``"pt2"``, a program for ``torch.export.load``. None
            takes the ending of `path`.
        dynamic_batch: Let the first axis of every input be of any size.
        channels_last: Store the weights of a ``"pt2"`` program with channels last, which is often faster.
        metadata: Values that JSON can hold: entries of ONNX's ``metadata_props``, each as JSON, or the extra file
            ``bsdp.json`` of the program.
        check: Run the file (ONNX with onnxruntime) on random inputs in the batch size of the example, with
            `dynamic_batch` of 1 and 3, and refuse it if its outputs are not those of PyTorch.
        force: Replace an existing file.

    Raises:
        FileExistsError: If the target exists and `force` is not set.
        ImportError: If a package for ONNX is missing.
        ValueError: If an argument is not allowed, the model cannot be traced, or the check fails; no file is left.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> path = getfixture("tmp_path") / "model.pt2"
        >>> report = bsdp.export(model, path, torch.zeros(1, 3, 8, 8), dynamic_batch=True)
        >>> torch.export.load(path).module()(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 8, 6, 6])
    """
    path = Path(path)
    format = path.suffix.removeprefix(".") if format is None else format
    check_choice("format", format, EXPORT_FORMATS)
    if channels_last and format != "pt2":
        raise ValueError("`channels_last` is a memory layout of torch; ONNX files have none: leave it out.")
    if format == "onnx":
        require_onnx()
    facts = {key: json.dumps(value, allow_nan=False) for key, value in (metadata or {}).items()}
    refuse_existing(path, force=force)
    inputs = as_inputs(example_input)
    with _without_noise():
        norms = fold_batch_norm(_runnable(fold(model).eval(), inputs), inputs)
        plain = norms.model
        if channels_last:
            plain = copy.deepcopy(plain).to(memory_format=torch.channels_last)
            inputs = tuple(_with_channels_last(value) for value in inputs)
        program = _traced(plain, inputs, dynamic_batch=dynamic_batch)
        with written_beside(path, suffix=f".{format}") as partial:
            if format == "onnx":
                write_onnx(program, partial, facts, dynamic_batch=dynamic_batch)
            else:
                torch.export.save(program, partial, extra_files={METADATA_FILE: json.dumps(dict(metadata or {}))})
            sizes = [1, 3] if dynamic_batch else [_batch_size(inputs)]
            differences = _checked(plain, _READERS[format](partial), inputs, sizes) if check else {}
    return ExportReport(path, format, path.stat().st_size, norms, differences)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file."""
    if path.is_dir():
        raise IsADirectoryError(f"`output`: {str(path)!r} is a folder; name a file in it.")
    if path.exists() and not force:
        raise FileExistsError(
            f"`output`: {str(path)!r} exists: choose another name, or replace it with `--force` "
            "(`force=True` in Python)."
        )


@contextmanager
def written_beside(path: Path, *, suffix: str) -> Iterator[Path]:
    """Give a path to write to, which becomes the real one if all goes well and is removed otherwise.

    Args:
        path: The real path; missing folders are made.
        suffix: Ending of the other one, by which some writers go.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix=f".{path.stem[:32]}.", dir=path.parent)
    except OSError as error:
        raise OSError(f"`output`: cannot write to the folder {str(path.parent)!r} ({reason_of(error)}).") from error
    with holder as folder:
        partial = Path(folder) / f"{path.stem}{suffix}"
        yield partial
        os.replace(partial, path)


def _runnable(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """The model, if it runs on the inputs."""
    try:
        with evaluating(model):
            outputs = tensors_of(model(*inputs))
    except Exception as error:  # whatever the model's own code raises
        sizes = ", ".join(str(tuple(value.shape)) for value in inputs if isinstance(value, Tensor))
        raise ValueError(
            f"the model does not run on inputs of shape {sizes} ({reason_of(error)}); give it others (`image_size`)."
        ) from error
    if not all(bool(output.isfinite().all()) for output in outputs if output.is_floating_point()):
        raise ValueError("the outputs of the model hold NaN or infinity, so there is nothing to compare a file with.")
    return model


def _traced(model: nn.Module, inputs: tuple[Any, ...], *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        shapes = tuple({0: batch} if isinstance(value, Tensor) and value.dim() else None for value in inputs)
        # An axis of length 1 would be taken for a constant.
        inputs = tuple(_batch_of(value, 2) if isinstance(value, Tensor) else value for value in inputs)
    try:
        with evaluating(model):
            program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:  # tracing fails in many ways
        advice = "leave `dynamic_batch` out" if dynamic_batch else "its forward must not depend on values of tensors"
        raise ValueError(f"torch.export cannot trace the model ({reason_of(error)}); {advice}.") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine
    program.example_inputs = None  # would be saved along
    return program


def _pt2_runner(path: Path) -> Runner:
    return torch.export.load(path).module()


_READERS: dict[str, Callable[[Path], Runner]] = {"onnx": onnx_runner, "pt2": _pt2_runner}


def _checked(model: nn.Module, run: Runner, inputs: tuple[Any, ...], sizes: list[int]) -> dict[int, Difference]:
    """Compare a written file with the model on random inputs, and refuse it if it is another function."""
    differences: dict[int, Difference] = {}
    generator = torch.Generator().manual_seed(1)
    for size in sizes:
        random = tuple(_random_like(_batch_of(value, size), generator) for value in inputs)
        with evaluating(model):
            expected = model(*random)
            try:
                found = run(*random)
            except Exception as error:  # the runtime's own errors
                raise ValueError(f"the written file does not run at batch size {size}: {reason_of(error)}.") from error
        differences[size] = largest_difference(expected, found)
        if not differences[size].relative <= tolerance_for(model):
            raise ValueError(
                f"the written file is another function than the model: at batch size {size} the outputs differ by "
                f"{differences[size]}, allowed is a relative difference of {tolerance_for(model):.0e}. No file is left."
            )
    return differences


def _batch_size(inputs: tuple[Any, ...]) -> int:
    return next((len(value) for value in inputs if isinstance(value, Tensor) and value.dim()), 1)


def _batch_of(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[:1].expand(size, *value.shape[1:]).clone(memory_format=torch.preserve_format)


def _random_like(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.empty_like(value).copy_(torch.randn(value.shape, generator=generator))


def _with_channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide warnings of the exporters, of which nothing follows for the caller."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # of channels-last weights
        warnings.filterwarnings("ignore", message="# The axis name: batch will not")  # inputs share their batch
        yield
