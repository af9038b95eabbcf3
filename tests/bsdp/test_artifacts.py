"""Networks read back from what a run leaves behind."""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import bsdp
from bsdp.artifacts import UnknownNetworkError, load_artifact, run_folder_of
from bsdp.backbone_families import OWN
from bsdp.backbones import build_backbone
from bsdp.channel_graph import channel_groups, plan_removal
from bsdp.channel_surgery import remove_channels
from bsdp.task import TransferTask
from tests.helpers.marks import slow_but
from tests.helpers.pruning_runs import Classifier, small_network
from tests.helpers.tiny_run import CLASS_NAMES, prune, write_checkpoint, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "version_0")


FACTS = {
    "backbone": "bsdp:resnet20",
    "head": "original",
    "pretrained": False,
    "num_classes": 4,
    "class_names": CLASS_NAMES,
    "image_size": 8,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
}


@pytest.mark.parametrize("name", slow_but(["", "pruned.safetensors"], ["", "pruned.ckpt", "pruned.safetensors"]))
def test_the_pruned_network_comes_back(run: Path, name: str) -> None:
    artifact = load_artifact(run / name)
    task = TransferTask.load_from_checkpoint(run / "pruned.ckpt").eval()
    images = torch.randn(3, 3, 8, 8)

    assert artifact.source == run / (name or "pruned.ckpt") and artifact.is_pruned
    assert artifact.metadata == FACTS and artifact.image_shape == (3, 8, 8)
    torch.testing.assert_close(artifact.folded(images), task(images), rtol=1e-4, atol=1e-5)
    assert not bsdp.named_pairs(artifact.folded) and not artifact.folded.training
    expected = {n: p.rank for n, p in bsdp.named_pairs(task.network).items()}
    assert {n: p.rank for n, p in bsdp.named_pairs(artifact.decomposed).items()} == expected
    stats = bsdp.describe(artifact.decomposed, artifact.example())
    assert stats.params == sum(p.numel() for p in artifact.folded.parameters())
    assert stats.params_original == sum(p.numel() for p in artifact.original().parameters())
    assert stats == bsdp.describe(task.network, artifact.example())


def test_an_unpruned_checkpoint_comes_back(run: Path) -> None:
    artifact = load_artifact(run / "checkpoints" / "last.ckpt")
    task = TransferTask.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    images = torch.randn(2, 3, 8, 8)
    assert not artifact.is_pruned and torch.equal(artifact.folded(images), task(images))
    assert artifact.metadata["class_names"] == CLASS_NAMES and artifact.image_shape == (3, 8, 8)
    assert not artifact.metadata["pretrained"]
    original = artifact.original()
    assert not original.training and original.fc.out_features == 4


def test_examples_are_the_same_every_time(run: Path) -> None:
    artifact = load_artifact(run)
    state = torch.random.get_rng_state()
    assert torch.equal(artifact.example(2), artifact.example(2)) and artifact.example(2).shape == (2, 3, 8, 8)
    assert artifact.example(1, image_size=12).shape == (1, 3, 12, 12)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_configuration_tells_the_images_where_no_weights_do(run: Path, tmp_path: Path) -> None:
    for name in ("pruned.ckpt", "config.yaml"):
        shutil.copy(run / name, tmp_path / name)
    artifact = load_artifact(tmp_path)
    assert artifact.image_shape == (3, 8, 8) and artifact.metadata["mean"] == [0.5] * 3
    assert "class_names" not in artifact.metadata

    (tmp_path / "config.yaml").write_text("data: [")
    artifact = load_artifact(tmp_path)
    assert artifact.image_shape == (3, 32, 32) and artifact.metadata["mean"] == [0.4914, 0.4822, 0.4465]


def test_weights_of_another_network_beside_it_tell_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "pruned.ckpt", tmp_path)
    other = {"backbone": "bsdp:resnet20", "num_classes": 5, "class_names": ["x"] * 5}
    bsdp.save(small_network(), tmp_path / "pruned.safetensors", metadata=other)
    assert "class_names" not in load_artifact(tmp_path).metadata


def test_the_images_that_the_pruning_saw_count_first(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / "pruned.ckpt", weights_only=True)
    checkpoint["callbacks"] = {"Other": {}, "IterativeBasisPruning": {"record": {"input_shapes": [[1, 3, 10, 6]]}}}
    torch.save(checkpoint, tmp_path / "pruned.ckpt")
    artifact = load_artifact(tmp_path)
    assert artifact.image_shape == (3, 10, 6) and artifact.metadata["image_size"] == [10, 6]
    assert artifact.example().shape == (1, 3, 10, 6)


@pytest.mark.parametrize("pairs", [False, True])
def test_files_of_networks_that_lost_channels(pairs: bool, tmp_path: Path) -> None:
    network, example = build_backbone("bsdp:resnet20", num_classes=4, weights="none").network, torch.zeros(1, 3, 8, 8)
    full = bsdp.describe(network, example)
    groups = channel_groups(network, example)
    units = {name: torch.arange(group.size // 2) for name, group in groups.items()}
    remove_channels(network, plan_removal(network, example, groups, units))
    if pairs:
        prune(network)
    facts = {"backbone": "bsdp:resnet20", "num_classes": 4, "image_size": 8, "pretrained": False}
    artifact = load_artifact(bsdp.save(network, tmp_path / "x.safetensors", metadata=facts))
    stats = bsdp.describe(artifact.decomposed, artifact.example())
    assert artifact.is_pruned is pairs and "widths" not in artifact.metadata
    assert (stats.params_original, stats.macs_original) == (full.params, full.macs)
    assert stats.params == sum(p.numel() for p in artifact.folded.parameters())
    if not pairs:  # there is no other network than the one of plain layers
        assert artifact.decomposed is artifact.folded


def test_checkpoints_tell_of_their_images(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    cases: list[tuple[Any, list[str] | None, tuple[int, ...]]] = [
        ({"shape": [3, 20, 36], "class_names": list("abcd")}, list("abcd"), (3, 20, 36)),
        ({"shape": [3, 20, 36], "class_names": ["a"]}, None, (3, 20, 36)),
        ({"shape": None, "class_names": [1, 2, 3, 4]}, None, (3, 32, 32)),
        ("odd", None, (3, 32, 32)),
    ]
    for images, names, shape in cases:
        torch.save({**checkpoint, "bsdp_images": images}, tmp_path / "last.ckpt")
        artifact = load_artifact(tmp_path / "last.ckpt")
        assert (artifact.metadata.get("class_names"), artifact.image_shape) == (names, shape)


def test_backbones_by_name_have_no_weights_file(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load_artifact("bsdp:resnet20", backbones=True)
    assert not artifact.is_pruned and artifact.image_shape == (3, 32, 32) and artifact.source == "bsdp:resnet20"
    assert artifact.original().fc.out_features == 10
    with pytest.raises(FileNotFoundError, match="no file or folder 'bsdp:resnet20'"):
        load_artifact("bsdp:resnet20")


def test_a_pretrained_head_with_classes_of_its_own(tmp_path: Path) -> None:
    network = build_backbone("bsdp:resnet20", num_classes=4, weights="none").network
    weights = str(bsdp.save(network, tmp_path / "weights.safetensors"))
    task = TransferTask("bsdp:resnet20", weights=weights, head="pretrained")
    path = write_checkpoint(task, tmp_path / "x.ckpt")
    images = torch.randn(2, 3, 8, 8)
    for found in (TransferTask.load_from_checkpoint(path).network.eval(), load_artifact(path).folded):
        assert torch.equal(found(images), task.network.eval()(images))


def test_networks_of_torchvision_that_shift_their_input_when_pretrained(tmp_path: Path) -> None:
    for weights, shifts in (("none", False), ("default", True)):
        settings = {"backbone": "torchvision:googlenet", "head": "original", "num_classes": 3, "weights": weights}
        artifact = load_artifact("torchvision:googlenet", backbones=True)
        state = {f"network.{key}": value for key, value in _googlenet_state(artifact).items()}
        torch.save({"state_dict": state, "hyper_parameters": settings}, tmp_path / "x.ckpt")
        assert load_artifact(tmp_path / "x.ckpt").folded.transform_input is shifts


def _googlenet_state(artifact: Any) -> dict[str, torch.Tensor]:
    network = artifact.original()
    network.fc = nn.Linear(1024, 3)
    return network.state_dict()


class Reader(nn.Module):
    """Reads the weight of a layer instead of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv(images).mean((2, 3))
        return self.fc(nn.functional.linear(features, self.proj.weight, self.proj.bias))


def test_layers_whose_weight_is_read_fold_into_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OWN, "reader", (Reader, {"mean": [0.5] * 3, "std": [0.5] * 3}))
    task = TransferTask("bsdp:reader", num_classes=3, weights="none")
    prune(task)
    artifact = load_artifact(write_checkpoint(task, tmp_path / "x.ckpt"))
    images = artifact.example(2)

    assert type(artifact.folded.proj) is nn.Linear
    torch.testing.assert_close(artifact.folded(images), task.eval()(images), rtol=1e-4, atol=1e-5)


def test_folders_without_a_pruned_checkpoint_name_the_others(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no other checkpoint in it, either"):
        load_artifact(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "checkpoints")
    shutil.copy(run / "pruned.safetensors", tmp_path / "pruned-v1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no pruned.ckpt.*: checkpoints/last.ckpt, pruned-v1.safetensors"):
        load_artifact(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'gone'.*or the name of a backbone"):
        load_artifact("gone", backbones=True)
    with pytest.raises(FileNotFoundError, match="no file or folder ''"):  # not the present folder
        load_artifact("")


def test_a_folder_of_runs_names_the_newest(tmp_path: Path) -> None:
    for age, name in enumerate(("net/version_1", "net/version_0", "net/version_2")):
        path = tmp_path / name / "pruned.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    for folder in (tmp_path, tmp_path / "net"):
        with pytest.raises(FileNotFoundError, match=r"has 3 of them.* newest is '.*net.version_1'"):
            load_artifact(folder)


def test_foreign_modules_are_told_the_way_in_python(tmp_path: Path) -> None:
    module = Classifier()
    prune(module)
    path = write_checkpoint(module, tmp_path / "foreign.ckpt")
    with pytest.raises(UnknownNetworkError, match=r"another LightningModule.*bsdp.load_checkpoint\(module, '.*foreign"):
        load_artifact(path)
    bsdp.save(module.network, tmp_path / "foreign.safetensors")
    with pytest.raises(UnknownNetworkError, match=r"does not say which backbone.*bsdp.load\(MyNetwork\(\), '.*foreign"):
        load_artifact(tmp_path / "foreign.safetensors")

    # The ways that the errors name.
    again = Classifier()
    bsdp.load_checkpoint(again, path)
    images = torch.randn(2, 1, 8, 8)
    bsdp.export(again.network, tmp_path / "a.pt2", images)
    bsdp.export(bsdp.load(small_network(), tmp_path / "foreign.safetensors"), tmp_path / "b.pt2", images)
    found = [torch.export.load(tmp_path / name).module()(images) for name in ("a.pt2", "b.pt2")]
    for outputs in found:
        torch.testing.assert_close(outputs, module.network.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no zip", "cannot be read as a file of torch.save"),
        ([1], "is not a Lightning checkpoint"),
        (
            {"state_dict": {}, "hyper_parameters": {"backbone": "bsdp:resnet20", "head": "original"}},
            "number of classes",
        ),
        (
            {"state_dict": {}, "hyper_parameters": {"backbone": "a:b", "head": "original", "num_classes": 3}},
            "`backbone` must be `family:name`",
        ),
        (
            {"state_dict": {}, "hyper_parameters": {"backbone": "bsdp:resnet20", "head": "original", "num_classes": 3}},
            "does not fit the model",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        load_artifact(path)


@pytest.mark.parametrize("size", [0, -3, 2**20, "8", [8, 8, 8], True])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: Any) -> None:
    network = build_backbone("bsdp:resnet20", weights="none").network
    metadata = {"backbone": "bsdp:resnet20", "num_classes": 10, "image_size": size}
    bsdp.save(network, tmp_path / "x.safetensors", metadata=metadata)
    if size == 0:  # stands for an unknown size
        assert load_artifact(tmp_path / "x.safetensors").image_shape == (3, 32, 32)
        return
    with pytest.raises(ValueError, match="is no size"):
        load_artifact(tmp_path / "x.safetensors")


def test_run_folders_hold_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    assert run_folder_of(tmp_path / "pruned.ckpt") == run_folder_of(tmp_path / "checkpoints" / "last.ckpt") == tmp_path
    assert run_folder_of(tmp_path / "a" / "b" / "c" / "last.ckpt") is None


def test_reading_needs_no_lightning(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = ("lightning", "bsdp.task", "bsdp.callbacks", "bsdp.datamodules", "bsdp.trainer_cli")
    for name in [name for name in sys.modules if name.startswith(prefixes)]:
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error
    with pytest.raises(ImportError):
        importlib.import_module("bsdp.task")
    assert load_artifact(run).image_shape == (3, 8, 8)


def test_a_pruned_checkpoint_is_no_weight_file(run: Path) -> None:
    with pytest.raises(ValueError, match=r"`weights`: .*pruned.ckpt holds a pruned network"):
        build_backbone("bsdp:resnet20", weights=str(run / "pruned.ckpt"))
    whole = build_backbone("bsdp:resnet20", weights=str(run / "checkpoints" / "last.ckpt"))
    assert whole.num_classes == 4
