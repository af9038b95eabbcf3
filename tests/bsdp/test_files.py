"""One file for a pruned model: round trips, and everything that can be wrong with a file."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import bsdp
from bsdp.layers import named_pairs
from tests.helpers.compare import (
    assert_same_state,
    decomposed,
    half_ranks,
    keep_ranks,
    randomize_scales,
    relative_error,
    snapshot,
)
from tests.helpers.nets import NETS, ConvNet, make_input, make_net


def pruned(name: str = "conv", *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network at half its ranks, one layer at a rank where it is fused."""
    net = decomposed(make_net(name, dtype=dtype))
    randomize_scales(net)
    ranks = half_ranks(net)
    first = next(iter(ranks))
    ranks[first] = named_pairs(net)[first].full_rank
    keep_ranks(net, ranks)
    return net


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("name", NETS)
def test_round_trip_into_a_fresh_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = pruned(name, dtype=dtype)
    before = snapshot(net)
    path = bsdp.save(net, tmp_path / "pruned.safetensors")
    assert path == tmp_path / "pruned.safetensors"
    assert_same_state(net, before)
    fresh = make_net(name, dtype=dtype).train()
    loaded = bsdp.load(fresh, path)
    assert loaded is fresh
    assert not loaded.training
    expected = bsdp.fold(net)
    assert_same_state(loaded, expected.state_dict())
    inputs = make_input(name, dtype=dtype)
    assert torch.equal(loaded(inputs), expected(inputs))
    if dtype == torch.float64:
        assert relative_error(loaded(inputs), net(inputs)) < 1e-12


def test_a_function_that_builds_the_model_will_do(tmp_path: Path) -> None:
    path = bsdp.save(pruned(), tmp_path / "a.safetensors")
    loaded = bsdp.load(lambda: make_net("conv"), str(path))
    assert isinstance(loaded, ConvNet)
    assert not named_pairs(loaded)


def test_both_forms_are_in_the_plan() -> None:
    folded = bsdp.fold(pruned())
    assert (type(folded.conv1), type(folded.conv2)) == (nn.Conv2d, nn.Sequential)


def test_a_plain_model_can_be_saved_too(tmp_path: Path) -> None:
    net = make_net("conv")
    path = bsdp.save(net, tmp_path / "plain.safetensors")
    assert bsdp.read_metadata(path)["layers"] == {
        "conv1": {"kind": "plain", "rank": 8, "bias": False},
        "conv2": {"kind": "plain", "rank": 12, "bias": False},
        "head": {"kind": "plain", "rank": 4, "bias": True},
    }
    assert_same_state(bsdp.load(make_net("conv"), path), net.state_dict())


def test_a_saved_shared_layer_is_shared_after_loading(tmp_path: Path) -> None:
    net = pruned("shared")
    path = bsdp.save(net, tmp_path / "a.safetensors")
    assert sorted(bsdp.read_metadata(path)["layers"]) == ["first", "head", "second"]
    loaded = bsdp.load(make_net("shared"), path)
    assert loaded.first is loaded.second


def test_tied_and_non_contiguous_parameters_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        net[1].weight = net[0].weight
        return net.double()

    net = build()
    net[2].weight = nn.Parameter(net[2].weight.detach().T.contiguous().T)
    bsdp.decompose(net)
    loaded = bsdp.load(build, bsdp.save(net, tmp_path / "a.safetensors"))
    inputs = torch.randn(3, 6, dtype=torch.float64)
    assert relative_error(loaded(inputs), net(inputs)) < 1e-12
    assert loaded[1].weight is loaded[0].weight


def test_metadata_is_json_with_the_plan_and_the_callers_values(tmp_path: Path) -> None:
    net = pruned()
    values = {"backbone": "bsdp:resnet20", "classes": ["cat", "d\u00f6g"], "mean": [0.5], "note": None}
    path = bsdp.save(net, tmp_path / "a.safetensors", metadata=values)
    header = bsdp.read_metadata(path)
    assert header == {
        "format_version": 1,
        "layers": {
            "conv1": {"kind": "fused", "rank": 8, "bias": False},
            "conv2": {"kind": "pair", "rank": 6, "bias": False},
            "head": {"kind": "plain", "rank": 4, "bias": True},
        },
        **values,
    }
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["bsdp"]) == header
        assert file.metadata()["format"] == "pt"


def test_the_file_holds_no_pickle_and_loading_unpickles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bsdp.save(pruned(), tmp_path / "a.safetensors")

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    bsdp.load(make_net("conv"), path)
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    json.loads(path.read_bytes()[8 : 8 + size])


def test_missing_folders_are_made_and_nothing_else_is_left_there(tmp_path: Path) -> None:
    path = bsdp.save(pruned(), tmp_path / "a" / "b" / "c.safetensors")
    assert os.listdir(path.parent) == ["c.safetensors"]


def test_a_crash_in_the_write_leaves_the_older_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bsdp.save(make_net("conv"), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def crash(tensors: dict[str, torch.Tensor], filename: str | Path, metadata: dict[str, str] | None = None) -> None:
        Path(filename).write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        bsdp.save(pruned(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_later_save_replaces_the_file(tmp_path: Path) -> None:
    path = bsdp.save(make_net("conv"), tmp_path / "a.safetensors")
    net = pruned()
    bsdp.save(net, path)
    assert_same_state(bsdp.load(make_net("conv"), path), bsdp.fold(net).state_dict())


@pytest.mark.parametrize("key", ["layers", "format_version"])
def test_metadata_may_not_take_the_names_of_the_format(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`metadata` must not have the key '{key}'"):
        bsdp.save(pruned(), tmp_path / "a.safetensors", metadata={key: 1})
    assert os.listdir(tmp_path) == []


def test_metadata_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        bsdp.save(pruned(), tmp_path / "a.safetensors", metadata={"mean": torch.zeros(3)})
    assert os.listdir(tmp_path) == []


def test_a_single_pair_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrap it"):
        bsdp.save(bsdp.pair_from_layer(nn.Linear(4, 4)), tmp_path / "a.safetensors")


# --- files that are not what they should be


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], object], *, tensors: dict[str, torch.Tensor] | None = None
) -> None:
    """Change the JSON metadata of a file, or its tensors."""
    header = bsdp.read_metadata(path)
    content = safetensors.torch.load_file(path)
    content.update(tensors or {})
    replaced = change(header)
    text = replaced if isinstance(replaced, str) else json.dumps(header)
    safetensors.torch.save_file(content, path, metadata={"bsdp": text})


def broken_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))


def with_entry(layer: str, entry: object) -> Callable[[Path], None]:
    """Put an entry into the plan."""
    return lambda path: rewrite(path, lambda header: header["layers"].update({layer: entry}))


def with_tensor(name: str, values: torch.Tensor) -> Callable[[Path], None]:
    """Put a tensor into the file."""
    return lambda path: rewrite(path, lambda header: None, tensors={name: values})


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header; a string replaces its JSON."""
    return lambda path: rewrite(path, change)


UNREADABLE = "not a readable safetensors file"
ENTRY = {"kind": "pair", "rank": 6, "bias": False}  # what `pruned` has for conv2

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), UNREADABLE),
    "truncated_header": (lambda p: p.write_bytes(p.read_bytes()[:40]), UNREADABLE),
    "truncated_data": (lambda p: p.write_bytes(p.read_bytes()[:-8]), UNREADABLE),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x" * 9), UNREADABLE),
    "broken_header": (broken_header, UNREADABLE),
    "huge_header": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), UNREADABLE),
    "text": (lambda p: p.write_text("hello" * 50), UNREADABLE),
    "pickle": (lambda p: torch.save({"a": torch.zeros(2)}, p), UNREADABLE),
    "foreign": (lambda p: safetensors.torch.save_file({"a": torch.zeros(2)}, p), "not written by `bsdp.save`"),
    "no_json": (with_header(lambda h: "{"), "metadata that is not JSON"),
    "deep_json": (with_header(lambda h: "[" * 100_000), "metadata that is not JSON"),
    "json_list": (with_header(lambda h: "[1]"), "format version None"),
    "version": (with_header(lambda h: h.update(format_version=9)), "format version 9; this release reads version 1"),
    "no_plan": (with_header(lambda h: h.pop("layers")), "no table `layers`"),
    "list_plan": (with_header(lambda h: h.update(layers=["conv1"])), "no table `layers`"),
    "missing_entry": (with_header(lambda h: h["layers"].pop("conv2")), r"lacks \['conv2\.weight'\]"),
    "negative_rank": (with_entry("conv2", {**ENTRY, "rank": -1}), r"-1.* layer 'conv2'; it needs .* rank in 1\.\.12"),
    "zero_rank": (with_entry("conv2", {**ENTRY, "rank": 0}), r"for layer 'conv2'; it needs"),
    "huge_rank": (with_entry("conv2", {**ENTRY, "rank": 10**12}), r"for layer 'conv2'; it needs"),
    "text_rank": (with_entry("conv2", {**ENTRY, "rank": "6"}), r"for layer 'conv2'; it needs"),
    "boolean_rank": (with_entry("conv2", {**ENTRY, "rank": True}), r"for layer 'conv2'; it needs"),
    "unknown_kind": (with_entry("conv2", {**ENTRY, "kind": "sparse"}), r"for layer 'conv2'; it needs a kind"),
    "list_kind": (with_entry("conv2", {**ENTRY, "kind": ["pair"]}), r"for layer 'conv2'; it needs a kind"),
    "no_bias_entry": (with_entry("conv2", {"kind": "pair", "rank": 6}), r"for layer 'conv2'; it needs a kind, a bias"),
    "no_entry": (with_entry("conv2", None), r"for layer 'conv2'; it needs a kind"),
    "unknown_layer": (with_entry("conv9", ENTRY), r"has a plan for 'conv9', but the model has no such layer"),
    "other_module": (with_entry("bn1", ENTRY), r"has a plan for 'bn1', but the model has a BatchNorm2d there"),
    "the_model_itself": (with_entry("", ENTRY), r"has a plan for '', but the model has no such layer"),
    "other_rank": (
        with_entry("conv2", {**ENTRY, "rank": 5}),
        r"'conv2\.0\.weight' has shape \(6, 8, 3, 3\), the model needs \(5, 8, 3, 3\)",
    ),
    "other_kind": (
        with_entry("conv2", {**ENTRY, "kind": "fused"}),
        r"lacks \['conv2\.weight'\] and has unknown \['conv2\.0\.weight'",
    ),
    "other_bias": (with_entry("conv2", {**ENTRY, "bias": True}), r"lacks \['conv2\.1\.bias'\]"),
    "extra_tensor": (with_tensor("extra", torch.zeros(1)), r"has unknown \['extra'\]"),
    "other_classes": (
        with_tensor("head.weight", torch.zeros(7, 12)),
        r"'head\.weight' has shape \(7, 12\), the model needs \(4, 12\).*number of classes",
    ),
    "nan": (with_tensor("head.bias", torch.tensor([0, float("nan"), 0, 0])), r"NaN or infinity in 'head\.bias'"),
    "infinity": (with_tensor("bn1.bias", torch.full((8,), float("inf"))), r"NaN or infinity in 'bn1\.bias'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_refused_by_name_and_the_model_untouched(damage: str, tmp_path: Path) -> None:
    path = bsdp.save(pruned(), tmp_path / "a.safetensors")
    harm, message = DAMAGE[damage]
    harm(path)
    fresh = make_net("conv")
    before, modules = snapshot(fresh), list(fresh.modules())
    fresh.train()
    with pytest.raises(ValueError, match=message) as error:
        bsdp.load(fresh, path)
    assert str(path) in str(error.value)
    assert_same_state(fresh, before)
    assert list(fresh.modules()) == modules
    assert fresh.training


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        for read in (bsdp.read_metadata, lambda p: bsdp.load(make_net("conv"), p)):
            with pytest.raises(FileNotFoundError, match="no such file"):
                read(path)


def test_a_model_that_is_already_decomposed_or_of_another_family_is_refused(tmp_path: Path) -> None:
    path = bsdp.save(pruned(), tmp_path / "a.safetensors")
    net = decomposed(make_net("conv"))
    before = snapshot(net)
    with pytest.raises(ValueError, match="the model has a BasisPair there: pass the original architecture"):
        bsdp.load(net, path)
    assert_same_state(net, before)
    with pytest.raises(ValueError, match="has a plan for 'conv1', but the model has no such layer"):
        bsdp.load(make_net("residual"), path)


def test_the_check_before_loading_takes_no_random_numbers_and_leaves_dtype_to_the_model(tmp_path: Path) -> None:
    path = bsdp.save(pruned(dtype=torch.float32), tmp_path / "a.safetensors")
    fresh = make_net("conv")
    state = torch.random.get_rng_state()
    loaded = bsdp.load(fresh, path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


class Versioned(nn.Module):
    """Reads files of its oldest format, which name no version, in another way, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_module_that_asks_for_its_version_is_told(tmp_path: Path) -> None:
    net = decomposed(Versioned())
    loaded = bsdp.load(Versioned(), bsdp.save(net, tmp_path / "net.safetensors"))
    assert torch.equal(loaded.head.weight, net.head.weight)


def test_others_can_read_a_file_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        path = bsdp.save(decomposed(make_net("conv")), tmp_path / "net.safetensors")
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_a_module_around_the_network_is_told_to_pass_the_network(tmp_path: Path) -> None:
    path = bsdp.save(decomposed(make_net("conv")), tmp_path / "net.safetensors")
    module = nn.ModuleDict({"net": make_net("conv")})
    with pytest.raises(ValueError, match=r"no such layer: pass the network in it, `model\.net`"):
        bsdp.load(module, path)


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append(os.fstat(number).st_ino), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("moved"), replace(old, new)))
    path = bsdp.save(nn.Sequential(nn.Linear(4, 4)), tmp_path / "net.safetensors")
    assert steps == [path.stat().st_ino, "moved"]
