"""Backbones by name: architectures, weight files, heads, and what is said when something does not fit."""

import os
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import bsdp
from bsdp.backbones import build_backbone, bundled_weights, list_backbones
from bsdp.cifar_nets import CifarResNet, PadShortcut
from bsdp.datamodules import CIFAR10DataModule
from bsdp.heads import find_head, head_outputs, replace_head
from bsdp.weight_files import find_weight_file, looks_like_file, no_weight_files
from tests.helpers.marks import slow_but

# One model of each family, and what its head is called.
TORCHVISION = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "resnet18": "fc",
    "resnext50_32x4d": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_0": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
    "wide_resnet50_2": "fc",
}
# Those take a second each to build, and their heads are as those of others.
LARGE = {"efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mobilenet_v2", "resnext50_32x4d", "swin_v2_t"} | {
    "wide_resnet50_2"
}
DATA = os.environ.get("BSDP_DATA")


def save(network: nn.Module, path: Path, **extra: Tensor) -> str:
    torch.save(network.state_dict() | extra, path)
    return str(path)


def equal(first: nn.Module, second: nn.Module, *, but: str = "-") -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items() if not key.startswith(but))


@pytest.mark.parametrize(
    ("name", "millions", "head"),
    [
        ("resnet20", 0.2725, "fc"),
        ("resnet56", 0.8558, "fc"),
        ("resnet20_pad", 0.2697, "fc"),
        ("resnet56_pad", 0.8530, "fc"),
        ("densenet_bc100", 0.7692, "classifier"),
    ],
)
def test_own_backbones_have_the_published_size_and_classify_small_images(name: str, millions: float, head: str) -> None:
    backbone = build_backbone(f"bsdp:{name}", num_classes=10, weights="none")

    assert sum(p.numel() for p in backbone.network.parameters()) / 1e6 == pytest.approx(millions, abs=5e-5)
    assert (backbone.head, backbone.image_size, backbone.weights) == (head, 32, None)
    assert backbone.network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert backbone.network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_pad_shortcut_equals_the_slow_form() -> None:
    x = torch.randn(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, 2:6, row, column] = x[:, :, 2 * row, 2 * column]

    assert torch.equal(PadShortcut(4, 8, stride=2)(x), expected)


@pytest.mark.parametrize("name", slow_but(TORCHVISION.keys() - LARGE, TORCHVISION))
def test_head_of_every_torchvision_family_is_found_and_replaced(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(f"torchvision:{name}", num_classes=7, weights="none")
        images = torch.empty(2, 3, backbone.image_size, backbone.image_size)

    assert backbone.head == TORCHVISION[name]
    assert head_outputs(backbone.network.get_submodule(backbone.head)) == 7
    assert backbone.network.eval()(images).shape == (2, 7)
    assert backbone.network.train()(images).shape == (2, 7)  # no auxiliary outputs


def test_regnet_head_is_found() -> None:  # does not build on the meta device
    backbone = build_backbone("torchvision:regnet_x_400mf", num_classes=3, weights="none")

    assert backbone.head == "fc"
    assert backbone.network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("spec", list_backbones("torchvision"))
def test_head_of_every_torchvision_model_is_found_and_replaced(spec: str) -> None:
    with torch.device("cpu" if "regnet" in spec else "meta"):
        backbone = build_backbone(spec, num_classes=7, weights="none")

    assert head_outputs(backbone.network.get_submodule(backbone.head)) == 7


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "alexnet"])
def test_pool_linear_makes_the_large_heads_small(name: str) -> None:
    with torch.device("meta"):
        small = build_backbone(f"torchvision:{name}", num_classes=5, weights="none", head="pool_linear")
        images = torch.empty(2, 3, 64, 64)

    channels = 256 if name == "alexnet" else 512
    assert sum(p.numel() for p in small.network.classifier.parameters()) == channels * 5 + 5  # type: ignore[union-attr]
    assert isinstance(small.network.get_submodule(small.head), nn.Linear)
    assert small.network(images).shape == (2, 5)


def test_new_head_leaves_every_other_weight_alone(tmp_path: Path) -> None:
    pretrained = CifarResNet(3)
    file = save(pretrained, tmp_path / "net.pth")
    backbone = build_backbone("bsdp:resnet20", num_classes=4, weights=file)

    assert backbone.network.fc.weight.shape == (4, 64)  # type: ignore[union-attr]
    assert equal(backbone.network, pretrained, but="fc")
    assert backbone.weights == file


def test_a_new_head_is_new_even_for_the_same_number_of_classes(tmp_path: Path) -> None:
    pretrained = CifarResNet(3)
    file = save(pretrained, tmp_path / "net.pth")

    assert not equal(build_backbone("bsdp:resnet20", num_classes=10, weights=file).network, pretrained)
    assert equal(build_backbone("bsdp:resnet20", num_classes=10, weights=file, head="pretrained").network, pretrained)


def test_file_tells_its_own_number_of_classes(tmp_path: Path) -> None:
    pretrained = CifarResNet(3, num_classes=6)
    backbone = build_backbone("bsdp:resnet20", weights=save(pretrained, tmp_path / "net.pt"))

    assert backbone.num_classes == 6
    assert equal(backbone.network, pretrained)


def test_safetensors_tell_normalization_and_classes(tmp_path: Path) -> None:
    network = CifarResNet(3, num_classes=2)
    known = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 48, "class_names": ["cat", "dog"]}
    path = bsdp.save(network, tmp_path / "net.safetensors", metadata=known)
    kept = build_backbone("bsdp:resnet20", weights=str(path))
    new = build_backbone("bsdp:resnet20", weights=str(path), num_classes=3)

    assert kept.normalization == new.normalization == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert (kept.image_size, kept.class_names, new.class_names) == (48, ("cat", "dog"), None)
    assert equal(kept.network, network)


@pytest.mark.parametrize("prefix", ["module.", "network.", "module.network."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_wrapped_state_dicts_are_unwrapped(tmp_path: Path, prefix: str, key: str | None) -> None:
    network = CifarResNet(3)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "net.ckpt")

    assert equal(build_backbone("bsdp:resnet20", weights=str(tmp_path / "net.ckpt")).network, network)


def test_file_without_a_classifier_gets_a_new_one(tmp_path: Path) -> None:
    full = build_backbone("torchvision:squeezenet1_1", num_classes=5, weights="none").network
    state = {key: value for key, value in full.state_dict().items() if not key.startswith("classifier")}
    torch.save(state, tmp_path / "features.pth")
    file = str(tmp_path / "features.pth")

    loaded = build_backbone("torchvision:squeezenet1_1", num_classes=5, weights=file).network
    assert equal(loaded, full, but="classifier")
    with pytest.raises(ValueError, match=r"`num_classes`.*no pretrained head"):
        build_backbone("torchvision:squeezenet1_1", weights=file)


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    network = build_backbone("torchvision:googlenet", num_classes=5, weights="none").network
    file = save(network, tmp_path / "net.pth", **{"aux1.fc2.weight": torch.zeros(5, 1024)})

    assert equal(
        build_backbone("torchvision:googlenet", num_classes=5, weights=file, head="pretrained").network, network
    )


def test_weights_are_found_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    save(CifarResNet(3), tmp_path / "weights" / "net.pth")
    monkeypatch.setenv("BSDP_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_weight_file("net.pth") == find_weight_file("weights/net.pth") == tmp_path / "weights" / "net.pth"
    assert find_weight_file("~/weights/net.pth") == tmp_path / "weights" / "net.pth"
    with pytest.raises(FileNotFoundError, match=r"`weights`: no file 'other.pth'") as caught:
        find_weight_file("other.pth")
    assert str(tmp_path / "weights" / "other.pth") in str(caught.value)
    assert looks_like_file("a.pth") and looks_like_file("folder/file") and not looks_like_file("IMAGENET1K_V1")


def test_no_file_is_read_inside_no_weight_files() -> None:
    with no_weight_files():
        backbone = build_backbone("bsdp:resnet20", num_classes=3, weights="gone.pth")
        published = build_backbone("torchvision:mobilenet_v3_small", num_classes=3)

    assert (backbone.num_classes, published.num_classes) == (3, 3)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        build_backbone("bsdp:resnet20", num_classes=3, weights="gone.pth")


def test_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    deep = save(CifarResNet(9), tmp_path / "deep.pth")
    wide = save(nn.Sequential(nn.Linear(3, 4)), tmp_path / "wide.pth")
    stem = save(CifarResNet(3), tmp_path / "stem.pth", **{"conv1.weight": torch.zeros(16, 1, 3, 3)})

    with pytest.raises(ValueError, match=r"deep.pth does not fit.*'bsdp:resnet20'.* unknown \(layer1.3.conv1.weight"):
        build_backbone("bsdp:resnet20", num_classes=3, weights=deep)
    with pytest.raises(ValueError, match=r"missing \(conv1.weight, .*; 2 unknown \(0.weight, 0.bias\)"):
        build_backbone("bsdp:resnet20", weights=wide)
    with pytest.raises(
        ValueError, match=r"1 of another shape \(conv1.weight \[16, 1, 3, 3\] instead of \[16, 3, 3, 3\]"
    ):
        build_backbone("bsdp:resnet20", num_classes=3, weights=stem)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(CifarResNet(3), tmp_path / "pickle.pth")  # a pickled module could run code
    model = CifarResNet(3)
    bsdp.decompose(model)
    bsdp.save(model, tmp_path / "pruned.safetensors")

    for name, words in (
        ("text.pth", "cannot be read"),
        ("text.safetensors", "cannot be read"),
        ("list.pth", "holds no state dict"),
        ("pickle.pth", "cannot be read"),
        ("pruned.safetensors", "pruned network"),
    ):
        with pytest.raises(ValueError, match=rf"`weights`: .*{name}.*{words}"):
            build_backbone("bsdp:resnet20", num_classes=3, weights=str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"spec": "torchvision:resnet81"}, r"`backbone`: unknown 'torchvision:resnet81'. Near: torchvision:resnet18"),
        ({"spec": "bsdp:resnet21"}, r"Near: bsdp:resnet20"),
        ({"spec": "resnet18"}, r"`backbone` must be `family:name`.*Near: torchvision:resnet18"),
        ({"spec": "torchvison:resnet18"}, r"families bsdp, torchvision, timm.*Near: torchvision:resnet18"),
        ({"spec": "bsdp:"}, r"`backbone` must be `family:name`"),
        ({"num_classes": 0}, r"`num_classes` must be at least 1"),
        ({"head": "new"}, r"`head` must be 'original', 'pool_linear' or 'pretrained', got 'new'"),
        ({"head": "pool_linear"}, r"`head='pool_linear'` is for the VGG and AlexNet families"),
        ({"head": "pretrained", "num_classes": 3}, r"`num_classes` is 3, but the pretrained head .* has 10"),
        ({"spec": "bsdp:resnet56", "weights": "default"}, r"`weights`: 'bsdp:resnet56' has no weights named 'default'"),
        ({"spec": "torchvision:resnet18", "weights": "V9"}, r"`weights`: .*named 'V9'.*IMAGENET1K_V1"),
    ],
)
def test_refusals(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_backbone(**({"spec": "bsdp:resnet20", "weights": "none"} | arguments))  # type: ignore[arg-type]


def test_failed_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models.get_model", fail)
    with pytest.raises(ValueError, match=r"`weights`: .* could not be downloaded .*no network.*`none` for random"):
        build_backbone("torchvision:resnet18", num_classes=3)


@pytest.mark.parametrize(("weights", "version"), [("default", "V2"), ("IMAGENET1K_V1", "V1"), ("imagenet1k_v2", "V2")])
def test_published_weights_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch, weights: str, version: str) -> None:
    chosen: list[str] = []

    def without_download(name: str, *, weights: models.WeightsEnum, **options: object) -> nn.Module:
        chosen.append(weights.name)
        return get_model(name, weights=None, **options)

    get_model = models.get_model
    monkeypatch.setattr("torchvision.models.get_model", without_download)
    with torch.device("meta"):
        backbone = build_backbone("torchvision:mobilenet_v2", weights=weights)

    assert chosen == [f"IMAGENET1K_{version}"]
    assert (backbone.num_classes, backbone.weights) == (1000, weights)


def test_timm_backbones() -> None:
    pytest.importorskip("timm")
    backbone = build_backbone("timm:resnet10t", num_classes=4, weights="none")

    assert (backbone.head, backbone.image_size) == ("fc", 176)
    assert backbone.network(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert "timm:resnet18" in list_backbones("timm")
    with pytest.raises(ValueError, match=r"Near: timm:resnet10t.*list_backbones\(\"timm\"\)\)'` lists them"):
        build_backbone("timm:resnet10x", weights="none")


def test_missing_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "bsdp\[timm\]"'):
        build_backbone("timm:resnet18")


def test_list_of_backbones_can_be_built() -> None:
    assert "bsdp:resnet20" in list_backbones() and "torchvision:resnet50" in list_backbones()
    assert not any(":" not in spec for spec in list_backbones())


def test_head_is_the_last_layer_with_that_many_outputs() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(3, 3, 3), nn.Linear(5, 3), nn.Linear(3, 2))

    assert find_head(network, num_classes=3, spec="x") == "2"
    with pytest.raises(ValueError, match=r"`backbone`: 'x' has no linear layer or 1x1 convolution with 8 outputs"):
        find_head(network, num_classes=8, spec="x")
    replace_head(network.double(), "2", num_classes=6)
    assert network[2].weight.dtype == torch.float64 and network[2].weight.shape == (6, 5)


def test_bundled_weights_load_and_are_trained() -> None:
    backbone = build_backbone("bsdp:resnet20")

    assert (backbone.num_classes, backbone.image_size, backbone.weights) == (10, 32, "default")
    assert backbone.class_names == CIFAR10DataModule.CLASS_NAMES
    assert backbone.normalization["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    assert not equal(backbone.network, build_backbone("bsdp:resnet20", weights="none").network)
    assert bundled_weights("resnet20").stat().st_size < 1.3e6


@pytest.mark.skipif(not DATA, reason="needs CIFAR-10 below BSDP_DATA")
def test_bundled_weights_classify_cifar10() -> None:
    backbone = build_backbone("bsdp:resnet20")
    data = CIFAR10DataModule(normalization=backbone.normalization, batch_size=500)
    data.setup("validate")  # cut off the training images; the test images lie class after class
    images, labels = next(iter(data.val_dataloader()))
    with torch.no_grad():
        guesses = backbone.network.eval()(images).argmax(1)

    assert len(labels.unique()) > 1
    assert (guesses == labels).float().mean() > 0.85


@pytest.mark.skipif(not DATA, reason="needs weight files below BSDP_DATA")
@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("bsdp:resnet20_pad", "cifar10_resnet20.pth"),
        ("bsdp:resnet56_pad", "cifar10_resnet56.pth"),
        ("bsdp:densenet_bc100", "cifar10_densenet_bc100_k12.pth"),
        ("torchvision:mobilenet_v2", "imagenet_mobilenet_v2.pth"),
        ("torchvision:squeezenet1_0", "imagenet_squeezenet1_0.pth"),
    ],
)
def test_public_weight_files_load(spec: str, file: str) -> None:
    assert build_backbone(spec, weights=file).num_classes in (10, 1000)


def test_weights_of_a_network_with_fewer_channels_give_the_backbone_its_widths(tmp_path: Path) -> None:
    network = build_backbone("bsdp:resnet20", num_classes=3).network.eval()
    images = torch.randn(2, 3, 32, 32)
    groups = bsdp.channel_groups(network, images[:1])
    half = {name: torch.arange(group.size // 2) for name, group in groups.items()}
    bsdp.remove_channels(network, bsdp.plan_removal(network, images[:1], groups, half))
    path = bsdp.save(network, tmp_path / "pruned.safetensors")
    again = build_backbone("bsdp:resnet20", num_classes=3, weights=str(path), head="pretrained").network.eval()
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
    with pytest.raises(ValueError, match="does not fit the backbone"):
        build_backbone("bsdp:resnet56", num_classes=3, weights=str(path))
