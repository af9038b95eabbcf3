"""Files for other programs: the same outputs, nothing of this machine in them, and no file when something is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bsdp
from tests.helpers.nets import make_input, make_net

module = sys.modules["bsdp.export"]  # the function hides it as an attribute
METADATA = {"class_names": ["cat", "dog"], "mean": [0.5, 0.25, 0.125], "image_size": 8}


def small_net() -> nn.Module:
    """Decomposed and cut, so that there is something to fold, in float32."""
    net = make_net("conv", dtype=torch.float32)
    bsdp.decompose(net)
    bsdp.named_pairs(net)["conv2"].keep(torch.arange(4))
    return net


def images(batch: int = 2) -> Tensor:
    return make_input("conv", batch=batch, dtype=torch.float32)


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return [torch.from_numpy(value) for value in found]


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, bsdp.ExportReport]:
    torch.manual_seed(0)
    net, path = small_net(), tmp_path_factory.mktemp("onnx") / "net.onnx"
    return net, path, bsdp.export(net, path, images(1), dynamic_batch=True, metadata=METADATA)


def test_onnx_gives_the_outputs_of_the_model_for_any_batch(onnx_file: Any) -> None:
    net, path, report = onnx_file
    for batch in (images(1), images(5)):
        (found,) = run_onnx(path, batch)
        torch.testing.assert_close(found, net(batch), rtol=1e-4, atol=1e-5)
    assert report.format == "onnx" and report.num_bytes == path.stat().st_size
    assert report.batch_norms.folded == {"bn1": "conv1", "bn2": "conv2.1"}
    assert list(report.differences) == [1, 3] and max(d.relative for d in report.differences.values()) < 1e-5
    text = str(report)
    assert "2 batch norms folded" in text and "batch size 3: largest difference from PyTorch" in text
    assert f"{path}: {report.num_bytes:,} bytes" in text


def test_onnx_holds_metadata_names_and_no_paths(onnx_file: Any) -> None:
    import onnx

    path = onnx_file[1]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == METADATA
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("images", "logits")
    assert image.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {node.op_type for node in model.graph.node} >= {"Conv", "Gemm"}
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    content = path.read_bytes()
    assert (
        str(Path(__file__).parents[2]).encode() not in content and b".py" not in content and b"ConvNet" not in content
    )
    assert [file.name for file in path.parent.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_program_gives_the_outputs_of_the_model(tmp_path: Path, channels_last: bool) -> None:
    net, path = small_net(), tmp_path / "net.pt2"
    report = bsdp.export(net, path, images(1), dynamic_batch=True, channels_last=channels_last, metadata=METADATA)
    extra = {"bsdp.json": ""}
    program = torch.export.load(path, extra_files=extra)

    assert json.loads(extra["bsdp.json"]) == METADATA and list(report.differences) == [1, 3]
    assert program.example_inputs is None  # would be as large as the images
    batch = images(4)
    torch.testing.assert_close(program.module()(batch), net(batch), rtol=1e-4, atol=1e-5)
    weights = [value for value in program.state_dict.values() if value.dim() == 4 and value.shape[2] == 3]
    assert len(weights) == 2
    assert all(w.is_contiguous(memory_format=torch.channels_last) is channels_last for w in weights)
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]


def test_a_fixed_batch_is_that_of_the_example(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    assert list(bsdp.export(small_net(), path, images(3)).differences) == [3]
    program = torch.export.load(path).module()
    assert program(images(3)).shape == (3, 4)
    with pytest.raises((AssertionError, RuntimeError)):
        program(images(2))


class TwoByTwo(nn.Module):
    """Two inputs, two outputs."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"sum": a + b, "product": a * b}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    for name in ("net.onnx", "net.pt2"):
        report = bsdp.export(TwoByTwo(), tmp_path / name, (a, b), dynamic_batch=True)
        assert [d.relative < 1e-6 for d in report.differences.values()] == [True, True]
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    total, product = run_onnx(tmp_path / "net.onnx", x, y)
    torch.testing.assert_close(total, x + y)
    torch.testing.assert_close(product, x * y)


def test_existing_files_stay_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists: choose another name, or replace it with `--force`"):
        bsdp.export(small_net(), path, images())
    assert path.read_text() == "mine"
    bsdp.export(small_net(), path, images(), force=True, check=False)
    assert torch.export.load(path)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        bsdp.export(small_net(), tmp_path, images(), format="pt2", force=True)


@pytest.mark.parametrize("name", [pytest.param("net.onnx", marks=pytest.mark.slow), "net.pt2"])
def test_a_file_that_is_another_function_is_not_kept(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("old")
    kind = path.suffix.removeprefix(".")
    real = module._READERS[kind]

    def wrong(file: Path) -> Any:
        run = real(file)
        return lambda *inputs: [1.001 * value for value in (run(*inputs) if kind == "onnx" else [run(*inputs)])]

    monkeypatch.setitem(module._READERS, kind, wrong)
    with pytest.raises(ValueError, match="another function than the model: at batch size 2 the outputs differ by"):
        bsdp.export(small_net(), path, images(), force=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    bsdp.export(small_net(), path, images(), force=True, check=False)
    assert path.stat().st_size > 100


def test_a_file_that_does_not_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Tensor) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(module._READERS, "pt2", lambda _: broken)
    with pytest.raises(ValueError, match="does not run at batch size 2: RuntimeError: no kernel"):
        bsdp.export(small_net(), tmp_path / "net.pt2", images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the packages.*{package}.*pip install 'bsdp\[export\]'"):
        bsdp.export(small_net(), tmp_path / "net.onnx", images())


class Branching(nn.Module):
    """Its path depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class FixedBatch(nn.Module):
    """Takes batches of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.arange(2)[:, None]


class Untranslatable(nn.Module):
    """Uses an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).abs()


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Identity(), {"format": "tflite"}, "`format` must be one of 'onnx', 'pt2', got 'tflite'"),
        (nn.Identity(), {"channels_last": True, "format": "onnx"}, "`channels_last` is a memory layout of torch"),
        (nn.Linear(3, 2), {}, r"does not run on inputs of shape \(2, 3, 8, 8\)"),
        (nn.Threshold(9.0, float("nan")), {}, "NaN or infinity"),
        (Branching(), {}, "torch.export cannot trace the model.*its forward must not depend on values"),
        (FixedBatch(), {"dynamic_batch": True}, "torch.export cannot trace the model.*leave `dynamic_batch` out"),
        (Untranslatable(), {"format": "onnx"}, "torch.onnx cannot translate the model.*use the format pt2"),
    ],
)
def test_refusals(tmp_path: Path, model: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        bsdp.export(model, tmp_path / "net.pt2", torch.rand(2, 3, 8, 8), **options)
    assert list(tmp_path.iterdir()) == []


def test_onnx_beyond_two_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bsdp.onnx_files._ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="bytes, but an ONNX file holds 2 GiB: use the format pt2"):
        bsdp.export(small_net(), tmp_path / "net.onnx", images())


def test_the_model_is_left_alone(tmp_path: Path) -> None:
    net = small_net().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bsdp.export(net, tmp_path / "net.pt2", images(), channels_last=True)
    assert all(child.training for child in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.conv1.basis.weight.is_contiguous()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "squeezenet1_0", "densenet121", "efficientnet_b0", "googlenet", "swin_t", "convnext_tiny"]
)
def test_pruned_models_of_torchvision(tmp_path: Path, name: str) -> None:
    from bsdp.backbones import build_backbone

    net = build_backbone(f"torchvision:{name}", num_classes=5, weights="none").network.eval()
    image = torch.randn(1, 3, 64, 64)
    bsdp.decompose(net, example_input=image)
    for pair in bsdp.named_pairs(net).values():
        local = torch.arange(max(1, pair.rank // 3))
        pair.keep(torch.cat([local + group * pair.rank for group in range(pair.groups)]))
    for kind in ("onnx", "pt2"):
        report = bsdp.export(net, tmp_path / f"net.{kind}", image, dynamic_batch=True)
        assert list(report.differences) == [1, 3]
    if name in ("mobilenet_v2", "efficientnet_b0", "googlenet"):
        assert report.batch_norms.folded and not report.batch_norms.kept
