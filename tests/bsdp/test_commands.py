"""The words export, describe, benchmark and latency of the command line, from the words to the file."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import bsdp
from bsdp import cli
from bsdp.artifacts import load_artifact
from bsdp.task import TransferTask
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Classifier, small_network
from tests.helpers.tiny_run import CLASS_NAMES, prune, write_checkpoint, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("commands") / "version_0")


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("BSDP_DEBUG", raising=False)
    return Path(shutil.copytree(made, tmp_path / "run"))


def done(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that must succeed prints."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one paragraph of a command that must end with code 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert len(err.strip().splitlines()) == 1 and err.startswith(f"bsdp {words[0]}: error: ") and "Traceback" not in out
    return err


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_told(text: str, stats: bsdp.ModelStats, path: Path, title: str) -> None:
    """What an export with ``--check --dynamic-batch`` tells of a network and its file."""
    for words in (
        title,
        "21 batch norms folded (largest difference of the outputs: ",
        "checked at batch size 1: largest difference from PyTorch ",
        "checked at batch size 3: largest difference from PyTorch ",
        f"{path}: {path.stat().st_size:,} bytes",
        f"parameters: {stats.params:,} of {stats.params_original:,} ({stats.params_kept:.1%} kept)",
        f"MACs: {stats.macs:,} of {stats.macs_original:,} ({stats.macs_kept:.1%} kept)",
    ):
        assert words in text


@pytest.mark.slow
def test_export_onnx(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    before = files(run)
    text = done(capsys, "export", "--ckpt", run, "--format", "onnx", "--dynamic-batch", "--check")
    path = run / "model.onnx"

    assert files(run) - before == {"model.onnx"}
    artifact = load_artifact(run)
    stats = bsdp.describe(artifact.decomposed, artifact.example())
    assert_told(text, stats, path, f"{run / 'pruned.ckpt'}: bsdp:resnet20, 4 classes, images 3x8x8")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 8, 8)
    (found,) = session.run(None, {"images": images.numpy()})
    expected = TransferTask.load_from_checkpoint(run / "pruned.ckpt").eval()(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert (facts["class_names"], facts["mean"], facts["std"]) == (CLASS_NAMES, [0.5] * 3, [0.25] * 3)
    assert (facts["image_size"], facts["backbone"], facts["num_classes"]) == (8, "bsdp:resnet20", 4)


SOURCES = ["pruned.ckpt", "pruned.safetensors", "checkpoints/last.ckpt"]


@pytest.mark.parametrize("source", slow_but(["pruned.ckpt"], SOURCES))
def test_export_programs_of_every_source(run: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    options = ("--channels-last", "--image-size", 12, "--dynamic-batch", "--check")
    text = done(capsys, "export", "--ckpt", run / source, "--format", "pt2", *options)
    path = (run / source).with_name("model.pt2")
    stats = bsdp.describe(load_artifact(run / source).decomposed, torch.zeros(1, 3, 12, 12))
    assert_told(text, stats, path, f"{run / source}: bsdp:resnet20, 4 classes, images 3x12x12")
    extra = {"bsdp.json": ""}
    program = torch.export.load(path, extra_files=extra)
    images = torch.randn(5, 3, 12, 12)

    torch.testing.assert_close(
        program.module()(images), load_artifact(run / source).folded(images), rtol=1e-3, atol=1e-4
    )
    assert json.loads(extra["bsdp.json"])["image_size"] == 12 and "images 3x12x12" in text
    assert ("(100.0% kept)" in text) is ("last" in source)


@pytest.mark.parametrize("source", SOURCES)
def test_export_safetensors_of_every_source(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    text = done(capsys, "export", "--ckpt", run / source, "--format", "safetensors", "--output", path)
    artifact = load_artifact(run / source)
    images = torch.randn(2, 3, 8, 8)

    assert "batch norms stay" in text and "checked: largest difference of the outputs 0.0e+00" in text
    assert torch.equal(bsdp.load(artifact.original(), path)(images), artifact.folded(images))
    metadata = bsdp.read_metadata(path)
    assert (metadata["class_names"], metadata["image_size"]) == (CLASS_NAMES, 8)
    assert ("(100.0% kept)" in text) is ("last" in source)


def test_nothing_is_overwritten_without_force(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("pt2", "safetensors"):
        args, path = ("export", "--ckpt", run, "--format", kind), run / f"model.{kind}"
        path.write_text("mine")
        before = files(run)
        assert "exists: choose another name, or replace it with `--force`" in refused(capsys, *args)
        assert path.read_text() == "mine" and files(run) == before
    done(capsys, *args, "--force", "--check", "false")
    assert bsdp.read_metadata(path)
    weights = (run / "pruned.safetensors").read_bytes()
    own = ("--ckpt", run / "pruned.safetensors", "--output", run / "pruned.safetensors", "--force")
    assert "is the file that is exported" in refused(capsys, "export", *own, "--format", "safetensors")
    assert (run / "pruned.safetensors").read_bytes() == weights


def test_a_file_that_fails_the_check_is_not_kept(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run)
    for module in ("bsdp.commands", "bsdp.export"):
        monkeypatch.setattr(sys.modules[module], "tolerance_for", lambda _: -1.0)
    assert "another network: the outputs differ by 0.0e+00" in refused(
        capsys, "export", "--ckpt", run, "--format", "safetensors"
    )
    assert "another function than the model" in refused(capsys, "export", "--ckpt", run, "--format", "pt2")
    assert files(run) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--channels-last"], "`channels_last` is a memory layout of torch, which onnx files"),
        (["--format", "safetensors", "--channels-last"], "`channels_last` is a memory layout of torch"),
        (["--format", "safetensors", "--dynamic-batch"], "`dynamic_batch`: a safetensors file holds weights"),
        (["--format", "pt3"], "Expected one of 'onnx', 'pt2', 'safetensors'. Got value: pt3"),
        ([], "format"),
        (["--format", "pt2", "--image-size", "0"], "`image_size` must be at least 1, got 0"),
        (["--format", "pt2", "--image-size", "many"], "image_size"),
        (["--format", "pt2", "--output", "."], "is a folder"),
        (["--format", "pt2", "--outputs", "x"], "outputs"),
        (["--format", "pt2", "--output", "x.onnx"], "`output`: 'x.onnx' would be a pt2 file by the name of another"),
        (["--format", "pt2", "--output", f"{__file__}/x.pt2"], "`output`: cannot write to the folder"),
    ],
)
def test_mistakes_of_export(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    before = files(run)
    text = refused(capsys, "export", "--ckpt", run, *words)
    assert message in text and len(text) < 700
    assert files(run) == before


def test_mistaken_sources(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "pruned.ckpt").unlink()
    (tmp_path / "README.md").write_text("text")
    module = Classifier()
    prune(module)
    foreign = write_checkpoint(module, tmp_path / "foreign.ckpt")
    for word, *more in (("export", "--format", "pt2"), ("benchmark",)):
        assert "checkpoints/last.ckpt, pruned.safetensors" in refused(capsys, word, "--ckpt", run, *more)
        assert "there is no file or folder 'bsdp:resnet20'" in refused(capsys, word, "--ckpt", "bsdp:resnet20", *more)
        assert "cannot be read" in refused(capsys, word, "--ckpt", tmp_path / "README.md", *more)
        assert "bsdp.load_checkpoint(module" in refused(capsys, word, "--ckpt", foreign, *more)
    assert "or the name of a backbone" in refused(capsys, "describe", "gone")
    assert "there is no file or folder" in refused(capsys, "describe", 300 * "x")
    assert "unknown 'bsdp:resnet21'. Near: bsdp:resnet20" in refused(capsys, "describe", "bsdp:resnet21")
    assert "cannot be read" in refused(capsys, "describe", tmp_path / "README.md")


def test_images_that_the_network_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "describe", "torchvision:vit_b_32", "--image-size", 100)
    assert "`image_size`: torchvision:vit_b_32 does not take images of (100, 100)" in text


def test_describe_runs_and_backbones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = [done(capsys, "describe", run / name).split("\n", 1) for name in ("", "pruned.ckpt", "pruned.safetensors")]
    assert tables[0][0] == f"{run / 'pruned.ckpt'}: bsdp:resnet20, 4 classes, images 3x8x8"
    assert tables[0][1] == tables[1][1] == tables[2][1]
    artifact = load_artifact(run)
    stats = bsdp.describe(artifact.decomposed, artifact.example())
    assert str(stats) in tables[0][1] and {s.kind for s in stats.layers} == {"pair", "fused", "plain"}

    text = done(capsys, "describe", "bsdp:resnet20", "--image-size", "16")
    assert "bsdp:resnet20: bsdp:resnet20, 10 classes, images 3x16x16" in text
    assert "272,474 of 272,474 parameters (100.0% kept)" in text and "10,305,152 of 10,305,152 MACs" in text


def test_describe_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Classifier()
    prune(module)
    text = done(capsys, "describe", write_checkpoint(module, tmp_path / "foreign.ckpt"))
    assert "network.0.2" in text and "bases" in text and "bsdp.load_checkpoint(module" in text
    network = small_network()
    bsdp.decompose(network)
    text = done(capsys, "describe", bsdp.save(network, tmp_path / "foreign.safetensors"))
    assert "0.2" in text and "fused" in text and "bsdp.load(MyNetwork()" in text


def test_benchmark(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("benchmark", "--ckpt", run, "--threads", "1", "--repeats", "2")
    text = done(capsys, *common, "--batch-size", "1", "3")
    artifact = load_artifact(run)
    stats = bsdp.describe(artifact.decomposed, artifact.example())
    assert text.startswith(f"{run / 'pruned.ckpt'}: bsdp:resnet20, 4 classes, images 3x8x8")
    assert "cpu, 1 thread(s)" in text and text.count("channels_last │") == 2 and text.count("contiguous │") == 2
    assert f"MACs: {stats.macs_original:,} -> {stats.macs:,}" in text
    assert "batch 1: " in text and "batch 3: " in text and text.count("speed-up / MAC reduction: ") == 2

    text = done(capsys, *common, "--batch-size", "1", "--channels-last", "never", "--image-size", "4")
    assert "channels_last" not in text and "images 3x4x4" in text
    assert "`batch_size` must be at least 1, got 0" in refused(capsys, *common, "--batch-size", "0")
    assert "`threads` must be between 1 and 1024" in refused(capsys, "benchmark", "--ckpt", run, "--threads", "0")
    assert "`device` must be cpu or cuda, got 'abacus'" in refused(capsys, *common, "--device", "abacus")
    assert "`device` must be cpu or cuda, got 'meta'" in refused(capsys, *common, "--device", "meta")


def test_a_gpu_that_is_not_there(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in refused(capsys, "benchmark", "--ckpt", run, "--device", "cuda")


def test_latency(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    options = ("--repeats", "1", "--threads", "1", "--image-size", "8")
    text = done(capsys, "latency", run, file, *options, "--batch-size", "2", "--channels-last")
    table = bsdp.LatencyTable.load(file)
    table.check(bsdp.measure_cost(load_artifact(run).decomposed).layers)
    assert (table.batch_size, table.threads, table.input_shapes) == (2, 1, ((1, 3, 8, 8),))
    assert f"{file}: " in text and "for 2 image(s)" in text and f"of the {len(table.layers)} decomposed layers" in text
    assert "exists: choose another name" in refused(capsys, "latency", run, file, *options)
    # A backbone that is not decomposed yet has the same layers.
    done(capsys, "latency", "bsdp:resnet20", file, *options, "--force")
    assert bsdp.LatencyTable.load(file).layers.keys() == table.layers.keys()
    assert "`multiple` must be at least 1" in refused(capsys, "latency", run, tmp_path / "n", "--multiple", "0")


def test_latency_by_widths(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    options = ("--by", "widths", "--repeats", "1", "--threads", "1", "--image-size", "8", "--multiple", "16")
    text = done(capsys, "latency", run, file, *options, "--batch-size", "2")
    table, original = bsdp.ChannelLatencyTable.load(file), load_artifact(run).original()
    groups = bsdp.channel_groups(original, torch.zeros(1, 3, 8, 8))
    table.check(original, [m.layer for group in groups.values() for m in group.members if m.weighted])
    assert (table.batch_size, table.threads, table.multiple, table.input_shapes) == (2, 1, 16, ((1, 3, 8, 8),))
    assert f"of the {len(table.layers)} layers whose channels can go" in text
    # A backbone gets the head of the task, whose layer reads channels that can go.
    done(capsys, "latency", "bsdp:resnet20", file, *options, "--force", "--num-classes", "7")
    assert bsdp.ChannelLatencyTable.load(file).layers["fc"].outputs[-1] == 7
    own = original.fc.out_features
    done(capsys, "latency", run, file, *options, "--force", "--num-classes", own)
    words = refused(capsys, "latency", run, tmp_path / "n", *options, "--num-classes", own + 1)
    assert f"has {own} classes of its own. Leave it out" in words
    assert "'ranks', 'widths'" in refused(capsys, "latency", run, tmp_path / "n", "--by", "days")


@pytest.mark.parametrize("word", ["export", "describe", "benchmark"])
def test_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([word, "--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and "--image-size" in text and "Run folder" in text
    assert "Traceback" not in text


def test_debug_shows_the_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSDP_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        cli.main(["describe", "gone"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:no pruned model was within")
def test_a_run_from_training_to_onnx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from bsdp.datamodules import DigitsDataModule

    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_epochs=4", "--trainer.accelerator=cpu", "--data.image_size=8", "--model.weights=none"]
    callbacks = ["BasisDecomposition", "IterativeBasisPruning"]
    words = [f"--trainer.callbacks+=bsdp.callbacks.{name}" for name in callbacks]
    words += [f"--trainer.callbacks.{key}" for key in ("target=0.5", "warmup_epochs=1", "tolerance=null")]
    assert cli.main(["fit", "--data=bsdp.datamodules.DigitsDataModule", *options, *words]) == 0
    run = tmp_path / "logs" / "run" / "version_0"
    text = done(capsys, "export", "--ckpt", run, "--format", "onnx", "--dynamic-batch")
    assert "images 3x8x8" in text and "batch norms folded" in text

    session = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    data = DigitsDataModule(image_size=8, normalization={key: facts[key] for key in ("mean", "std")})
    data.setup("test")
    task = TransferTask.load_from_checkpoint(run / "pruned.ckpt").eval()
    for images, _ in data.test_dataloader():
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, task(images), rtol=1e-3, atol=1e-3)
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert "speed-up / MAC reduction" in done(capsys, "benchmark", "--ckpt", run, "--batch-size", 1, "--repeats", 1)
    assert done(capsys, "describe", run).count("pair") > 5
