"""Writing and running ONNX files; what `bsdp.export` makes of it is in `test_export`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bsdp.onnx_files import onnx_runner, require_onnx, write_onnx


class TwoInputs(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return first + second, first * second, first - second


def test_a_file_gives_the_outputs_of_its_program(tmp_path: Path) -> None:
    require_onnx()
    inputs = torch.randn(2, 3), torch.randn(2, 3)
    path = tmp_path / "net.onnx"
    write_onnx(torch.export.export(TwoInputs(), inputs), path, {"task": "sums"}, dynamic_batch=False)
    for found, expected in zip(onnx_runner(path)(*inputs), TwoInputs()(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="zip"):
        onnx_runner(path)(inputs[0])
    import onnx

    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["input_0", "input_1"]
    assert [value.name for value in model.graph.output] == ["output_0", "output_1", "output_2"]
    assert {entry.key: entry.value for entry in model.metadata_props}["task"] == "sums"
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs the packages onnx, onnxscript, onnxruntime.*bsdp\[export\]"):
        require_onnx()
