"""ONNX files: the packages they need, writing one, and running one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsdp.reading import reason_of

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_LIMIT = 2**31 - 2**20  # a protobuf holds 2 GiB, and the graph needs some of it

Runner = Callable[..., Any]


def require_onnx() -> None:
    """Refuse to go on without the packages, and name the extra that brings them."""
    try:
        for name in _ONNX_PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"`format='onnx'` needs the packages {', '.join(_ONNX_PACKAGES)} ({error}): pip install 'bsdp[export]'."
        ) from error


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, str], *, dynamic_batch: bool
) -> None:
    """Translate a program and write it as one file.

    Args:
        program: From ``torch.export``.
        path: Target.
        facts: Entries of ``metadata_props``.
        dynamic_batch: Whether the first axis of the inputs is of any size.
    """
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > _ONNX_LIMIT:
        raise ValueError(f"the weights have {size:,} bytes, but an ONNX file holds 2 GiB: use the format pt2.")
    inputs, outputs = _names(program)
    try:
        exported = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=tuple({0: "batch"} for _ in inputs) if dynamic_batch else None,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # an operator without a translation, most of all
        raise ValueError(f"torch.onnx cannot translate the model ({reason_of(error)}); use the format pt2.") from error
    assert exported is not None
    for node in exported.model.graph.all_nodes():
        node.metadata_props.clear()
    exported.model.metadata_props.update(facts)
    exported.save(path, external_data=False)


def _names(program: torch.export.ExportedProgram) -> tuple[list[str], list[str]]:
    """``images`` and ``logits`` where there is one of them, else numbered names."""
    counts = len(program.graph_signature.user_inputs), len(program.graph_signature.user_outputs)
    inputs, outputs = (
        [single] if count == 1 else [f"{many}_{i}" for i in range(count)]
        for single, many, count in zip(("images", "logits"), ("input", "output"), counts, strict=True)
    )
    return inputs, outputs


def onnx_runner(path: Path) -> Runner:
    """A function that runs a file on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        found = session.run(None, {name: value.cpu().numpy() for name, value in zip(names, inputs, strict=True)})
        return [torch.from_numpy(value) for value in found]

    return run
