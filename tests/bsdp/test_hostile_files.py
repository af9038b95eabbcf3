"""Files that mean harm: nothing in them runs, errors are one paragraph, and the model stays as it was."""

import json
import os
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import bsdp
from bsdp.backbones import build_backbone
from bsdp.layers import named_pairs
from bsdp.structure import load_checkpoint, read_checkpoint
from bsdp.task import TransferTask
from bsdp.weight_files import read_weight_file
from tests.helpers.compare import (
    assert_same_state,
    decomposed,
    half_ranks,
    keep_ranks,
    randomize_scales,
    relative_error,
)
from tests.helpers.hostile import WRITERS, Payload, split_safetensors, unchanged, write_safetensors
from tests.helpers.nets import make_input, make_net

READERS: dict[str, Callable[[Path], object]] = {
    "load": lambda path: bsdp.load(make_net("conv"), path),
    "read_metadata": bsdp.read_metadata,
    "load_checkpoint": lambda path: load_checkpoint(make_net("conv"), path),
    "read_checkpoint": read_checkpoint,
    "read_weight_file": read_weight_file,
    "weights": lambda path: build_backbone("bsdp:resnet20", weights=str(path)),
}


def pruned(name: str = "conv") -> nn.Module:
    """A network at half its ranks."""
    net = decomposed(make_net(name))
    randomize_scales(net)
    keep_ranks(net, half_ranks(net))
    return net


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file of a pruned network."""
    return bsdp.save(pruned(), tmp_path / "good.safetensors")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A good checkpoint of a pruned network."""
    net = pruned()
    torch.save({"state_dict": net.state_dict(), "bsdp": bsdp.structure_of(net)}, tmp_path / "good.ckpt")
    return tmp_path / "good.ckpt"


def refused(path: Path, model: nn.Module, read: Callable[..., object] = bsdp.load) -> str:
    """Read a file that must be refused in one paragraph without any trace in the model; gives the paragraph."""
    with unchanged(model), pytest.raises(ValueError) as error:
        read(model, path)
    text = str(error.value)
    assert str(path) in text or "the saved structure" in text
    assert "\n" not in text and 40 < len(text) < 900
    return text


# --- pickles


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_is_in_a_file(reader: str, writer: str, suffix: str, tmp_path: Path) -> None:
    path, marker = tmp_path / f"evil{suffix}", tmp_path / "marker"
    WRITERS[writer]({"state_dict": {"conv1.weight": Payload(marker)}}, path)
    with pytest.raises(ValueError, match=r"safetensors file|torch\.save") as error:
        READERS[reader](path)
    assert not marker.exists()
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_the_error_names_what_would_have_run_and_the_way_out(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    WRITERS[writer]({"state_dict": {}, "x": Payload(tmp_path / "marker")}, path)
    text = refused(path, make_net("conv"), load_checkpoint)
    assert "cannot be read safely" in text and ".mkdir)" in text
    assert "Nothing of it was run. Ask its author for a safetensors file or a plain state dict" in text


def test_a_task_does_not_unpickle_either(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": Payload(marker)}}, path)
    with pytest.raises(Exception, match="mkdir"):
        TransferTask.load_from_checkpoint(path)
    assert not marker.exists()


# --- damage


def offsets(size: int, count: int = 60) -> list[int]:
    """Some numbers below a size, the smallest and the largest among them."""
    few = random.Random(0).sample(range(size), min(size, count))
    return sorted({*range(min(size, 12)), size // 2, size - 1, *few})


def test_files_cut_short_anywhere_are_refused(file: Path, checkpoint: Path) -> None:
    for path, read in ((file, bsdp.load), (checkpoint, load_checkpoint)):
        content = path.read_bytes()
        for size in offsets(len(content)):
            path.write_bytes(content[:size])
            refused(path, make_net("conv"), read)


def test_a_flipped_bit_is_refused_or_changes_values_only(file: Path, checkpoint: Path) -> None:
    rng = random.Random(0)
    for path, read in ((file, bsdp.load), (checkpoint, load_checkpoint)):
        content, loaded = path.read_bytes(), 0
        for position in offsets(len(content), 70):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(damaged))
            model = make_net("conv")
            try:
                with unchanged(model):
                    read(model, path)
            except ValueError as error:
                assert "\n" not in str(error)
            except AssertionError:  # it was loaded
                loaded += 1
                assert all(value.isfinite().all() for value in model.state_dict().values())
        assert 0 < loaded < 80


def test_a_flipped_bit_leaves_what_torch_reads_as_a_checkpoint_whole(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content.replace(b"PK", b"QK"))
    assert "cannot be read as a file of torch.save" in refused(checkpoint, make_net("conv"), load_checkpoint)


@pytest.mark.parametrize("read", [bsdp.load, load_checkpoint], ids=["load", "load_checkpoint"])
def test_no_file_and_a_folder(read: Callable[..., object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent$"):
        read(make_net("conv"), tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(make_net("conv"), tmp_path)


# --- lies in the header of a safetensors file


def entry(begin: object = 0, end: object = 8, *, shape: object = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, dict[str, Any] | str] = {
    "overlap": {"a": entry(0, 8), "b": entry(0, 8)},
    "outside": {"a": entry(0, 80, shape=(20,))},
    "negative": {"a": entry(-8, 0)},
    "backwards": {"a": entry(8, 0)},
    "hole": {"a": entry(0, 4, shape=(1,)), "b": entry(6, 8, shape=(1,), dtype="F16")},
    "size_of_another": {"a": entry(0, 8, shape=(3,))},
    "overflow": {"a": entry(0, 8, shape=(2**40, 2**40))},
    "unknown_type": {"a": entry(dtype="F7")},
    "text_shape": {"a": entry(shape="2")},
    "deep": '{"a":' * 50_000,
    "list": "[]",
    "no_json": "hello",
    "metadata_number": {"__metadata__": {"bsdp": 5}, "a": entry()},
    "twice": '{"a":X,"a":X}'.replace("X", json.dumps(entry())),
    "metadata_twice": '{"__metadata__":{"bsdp":"{}","bsdp":"{}"},"a":X}'.replace("X", json.dumps(entry())),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_lie_are_refused(header: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", HEADERS[header], b"\0" * 8)
    refused(path, make_net("conv"))
    with pytest.raises(ValueError, match=r"`weights`: .*cannot be read as a weight file"):
        read_weight_file(path)


@pytest.mark.parametrize("size", [0, 1, 2**20, 2**31, 2**62, 2**64 - 1])
def test_a_header_of_another_length_is_refused(size: int, file: Path) -> None:
    header, data = split_safetensors(file)
    refused(write_safetensors(file, header, data, size=size), make_net("conv"))


def change(file: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Edit plan and tensors of a good file."""
    header, tensors = bsdp.read_metadata(file), safetensors.torch.load_file(file)
    edit(header, tensors)
    safetensors.torch.save_file(tensors, file, metadata={"bsdp": json.dumps(header)})


PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "plain_rank": (lambda p: p["head"].update(rank=3), r"'head' at the full rank 3 .* has the full rank 4"),
    "plain_bias": (lambda p: p["head"].update(bias=False), r"'head' at the full rank 4 with no bias.* 4 and a bias"),
    "plain_pruned": (lambda p: p["conv2"].update(kind="plain"), r"'conv2' at the full rank 6 .* full rank 12"),
    "plain_norm": (lambda p: p.update(bn1=dict(p["head"])), r"a plan for 'bn1', but the model has a BatchNorm2d"),
    "float_rank": (lambda p: p["conv2"].update(rank=6.0), r"has the plan .*6\.0.* for layer 'conv2'"),
    "huge_entry": (lambda p: p.update(conv2="x" * 10**6), r"has the plan 'x+\.\.\.x+' for layer 'conv2'"),
    "huge_name": (lambda p: p.update({"y" * 10**6: p["head"]}), r"a plan for 'y+\.\.\.y+', but"),
    "many": (lambda p: p.update({f"conv{i}": p["head"] for i in range(9, 999)}), "no such layer"),
    "deep_entry": (lambda p: p.update(conv2=json.loads("[" * 500 + "]" * 500)), r"has the plan \[+\.\.\.\]+ for"),
    "control_characters": (lambda p: p.update({"\x1b[31m\nred": p["head"]}), r"a plan for '\\x1b\[31m\\nred', but"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans_that_lie_are_refused(plan: str, file: Path) -> None:
    edit, message = PLANS[plan]
    change(file, lambda header, tensors: edit(header["layers"]))
    with pytest.raises(ValueError, match=message):
        bsdp.load(make_net("conv"), file)
    refused(file, make_net("conv").train().requires_grad_(False))


def test_a_plan_with_a_key_twice_is_refused(file: Path) -> None:
    header, tensors = bsdp.read_metadata(file), safetensors.torch.load_file(file)
    text = json.dumps(header).replace('"rank": 6,', '"rank": 6, "rank": 6,')
    safetensors.torch.save_file(tensors, file, metadata={"bsdp": text})
    assert "the key 'rank' stands twice" in refused(file, make_net("conv"))


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1], 2, 0, -1])
def test_other_format_versions_are_refused(version: object, file: Path) -> None:
    change(file, lambda header, tensors: header.update(format_version=version))
    assert f"has format version {version!r}" in refused(file, make_net("conv"))


def test_files_without_plain_layers_are_read_as_they_were_at_first(file: Path) -> None:
    expected = bsdp.load(make_net("conv"), file).state_dict()
    change(file, lambda header, tensors: header["layers"].pop("head"))
    assert_same_state(bsdp.load(make_net("conv"), file), expected)


def test_one_layer_under_two_names_has_one_plan_and_one_weight(tmp_path: Path) -> None:
    file = bsdp.save(pruned("shared"), tmp_path / "a.safetensors")
    change(file, lambda header, tensors: tensors["second.0.weight"].add_(1))
    assert "'first.0.weight' and 'second.0.weight' are one tensor there, but differ" in refused(
        file, make_net("shared")
    )
    change(file, lambda header, tensors: header["layers"]["second"].update(rank=2))
    assert "two plans for one layer, 'second'" in refused(file, make_net("shared"))


def test_a_decomposed_model_is_refused_whatever_the_plan_says(file: Path) -> None:
    net = decomposed(make_net("conv"))
    change(file, lambda header, tensors: header.update(layers={}))
    assert "the model has a BasisPair at 'conv1': pass the original architecture" in refused(file, net)


# --- tensors of another type


@pytest.mark.parametrize(("stored", "own"), [("float16", "float32"), ("bfloat16", "float64"), ("float64", "float16")])
def test_another_precision_is_converted_to_the_models(stored: str, own: str, file: Path) -> None:
    wanted, given = (getattr(torch, name) for name in (own, stored))

    def convert(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.update({k: v.to(given) for k, v in tensors.items() if v.is_floating_point()})

    expected = bsdp.load(make_net("conv"), file)
    change(file, convert)
    loaded = bsdp.load(make_net("conv", dtype=wanted), file)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    inputs = make_input("conv")
    assert relative_error(loaded.double()(inputs), expected(inputs)) < 0.02


TENSORS: dict[str, tuple[str, Tensor, str]] = {
    "integers": ("head.bias", torch.zeros(4, dtype=torch.int64), r"'head\.bias' is torch\.int64, the model needs"),
    "booleans": ("head.bias", torch.zeros(4, dtype=torch.bool), r"'head\.bias' is torch\.bool"),
    "complex": ("head.bias", torch.zeros(4, dtype=torch.complex64), r"'head\.bias' is torch\.complex64"),
    "float_counter": ("bn1.num_batches_tracked", torch.tensor(1.0), r"tracked' is torch\.float32.* torch\.int64"),
    "too_large": ("head.bias", torch.full((4,), 1e300, dtype=torch.float64), r"NaN or infinity .*\(in torch\.float32"),
    "nan_in_8_bit": ("head.bias", torch.full((4,), float("nan")).to(torch.float8_e4m3fn), r"NaN or infinity"),
    "rows_of_nothing": ("head.bias", torch.zeros(0, 2**40), r"'head\.bias' has shape \(0, 1099511627776\)"),
}


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_tensors_of_another_kind_are_refused(tensor: str, kind: str, file: Path, checkpoint: Path) -> None:
    key, value, message = TENSORS[tensor]
    net = make_net("conv", dtype=torch.float32)
    if kind == "file":
        change(file, lambda header, tensors: tensors.update({key: value}))
        text = refused(file, net)
    else:
        edit(checkpoint, lambda c: c["state_dict"].update({key: value}))
        text = refused(checkpoint, net, load_checkpoint)
    assert re.search(message, text), text


def test_infinity_is_allowed_where_the_model_has_it_too(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = make_net("conv")
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        return net

    path = bsdp.save(build(), tmp_path / "a.safetensors")
    bsdp.load(build(), path)
    change(path, lambda header, tensors: tensors["mask"].neg_())
    assert "NaN or infinity in 'mask'" in refused(path, build())


def test_saving_nan_is_told_at_once(tmp_path: Path) -> None:
    net = pruned()
    net.head.bias.data[0] = torch.nan
    with pytest.warns(UserWarning, match=r"'head\.bias' holds NaN: `bsdp\.load` will refuse .*a\.safetensors"):
        path = bsdp.save(net, tmp_path / "a.safetensors")
    assert "NaN or infinity in 'head.bias'" in refused(path, make_net("conv"))


# --- checkpoints


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a good checkpoint."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


def at(name: str, rank: object) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["bsdp"]["pairs"].update({name: {"rank": rank}})


def versions(value: object) -> Callable[[dict[str, Any]], object]:
    def set_metadata(content: dict[str, Any]) -> None:
        content["state_dict"] = OrderedDict(content["state_dict"])
        content["state_dict"]._metadata = value

    return set_metadata


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "structure_list": (lambda c: c.update(bsdp=[1]), r"structure has version \[1\]"),
    "structure_none": (lambda c: c.update(bsdp=None), "structure has version None"),
    "version_true": (lambda c: c["bsdp"].update(version=True), "structure has version True"),
    "numbers_for_names": (lambda c: c["bsdp"]["pairs"].update({1: {"rank": 1}}), "no table `pairs` of layer names"),
    "huge_rank": (at("conv1", 10**90), r"'conv1' the rank 10+\.\.\.0+, but its full rank is 8"),
    "text_rank": (at("conv1", "4"), r"'conv1' the rank '4'"),
    "another_rank": (
        at("conv1", 3),
        r"'conv1\.basis\.weight' has shape \(4, 3, 3, 3\), the model needs \(3, 3, 3, 3\)",
    ),
    "no_pair_there": (at("head", 2), r"lacks \['head\.basis\.weight'"),
    "pair_missing": (lambda c: c["bsdp"]["pairs"].pop("conv1"), r"lacks \['conv1\.weight'\] and has unknown"),
    "the_model": (at("", 2), r"a pair at '', but the model has a ConvNet there"),
    "no_structure": (lambda c: c.pop("bsdp"), r"lacks \['conv1\.weight'"),
    "state_list": (lambda c: c.update(state_dict=[torch.zeros(2)]), "has no state dict of names and tensors"),
    "state_tensor": (lambda c: c.update(state_dict=torch.zeros(2)), "has no state dict of names and tensors"),
    "state_numbers": (lambda c: c["state_dict"].update({1: torch.zeros(1)}), "no state dict of names and tensors"),
    "state_versions": (versions({"conv1": 3}), "no state dict of names and tensors"),
    "state_version": (versions({"": {"version": "2"}}), "no state dict of names and tensors"),
    "state_missing": (lambda c: c["state_dict"].pop("head.bias"), r"lacks \['head\.bias'\]"),
    "state_text": (lambda c: c["state_dict"].update({"head.bias": "x"}), r"'head\.bias' is not an ordinary dense"),
    "state_sparse": (
        lambda c: c["state_dict"].update({"head.bias": torch.zeros(4, dtype=torch.float64).to_sparse()}),
        r"'head\.bias' is not an ordinary dense tensor",
    ),
    "state_meta": (
        lambda c: c["state_dict"].update({"head.bias": torch.empty(4, dtype=torch.float64, device="meta")}),
        r"'head\.bias' is not an ordinary dense tensor",
    ),
    "state_huge_view": (
        lambda c: c["state_dict"].update({"head.weight": torch.zeros(1).expand(2**30, 2**20)}),
        r"'head\.weight' has shape \(1073741824, 1048576\)",
    ),
    "state_nan": (lambda c: c["state_dict"]["conv2.scaling.delta"].fill_(torch.nan), "NaN or infinity in 'conv2"),
    "callbacks": (lambda c: c.update(callbacks=[1]), "not a Lightning checkpoint: its `callbacks` is no table"),
    "step": (lambda c: c.update(global_step=-1), "not a Lightning checkpoint: its `global_step` is -1"),
    "epoch": (lambda c: c.update(epoch="x" * 10**5), r"not a Lightning checkpoint: its `epoch` is 'x+\.\.\.x+'"),
}


@pytest.mark.parametrize("lie", CHECKPOINTS)
def test_checkpoints_that_lie_are_refused(lie: str, checkpoint: Path) -> None:
    change, message = CHECKPOINTS[lie]
    edit(checkpoint, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(make_net("conv"), checkpoint)
    refused(checkpoint, make_net("conv").train(), load_checkpoint)


@pytest.mark.parametrize("lie", ["another_rank", "pair_missing", "state_missing", "state_nan", "huge_rank"])
def test_a_decomposed_model_is_as_untouched(lie: str, checkpoint: Path) -> None:
    edit(checkpoint, CHECKPOINTS[lie][0])
    refused(checkpoint, decomposed(make_net("conv")), load_checkpoint)


def test_a_pair_inside_a_pair_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, at("conv1.basis", 2))
    assert "a pair at 'conv1.basis', but the model has no such layer" in refused(
        checkpoint, decomposed(make_net("conv")), load_checkpoint
    )


def test_one_layer_under_two_names_has_one_rank(tmp_path: Path) -> None:
    structure = {"version": 1, "pairs": {"first": {"rank": 2}, "second": {"rank": 3}}}
    for net in (make_net("shared"), decomposed(make_net("shared"))):
        with unchanged(net), pytest.raises(ValueError, match=r"one layer, \['first', 'second'\], different ranks"):
            bsdp.rebuild(net, structure)


def test_weights_need_not_be_all_there_unless_strict_but_must_fit(checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c["state_dict"].pop("head.bias"))
    net = make_net("conv")
    load_checkpoint(net, checkpoint, strict=False)
    assert len(named_pairs(net)) == 2
    edit(checkpoint, lambda c: c["state_dict"].update({"head.weight": torch.zeros(3)}))
    with unchanged(net := make_net("conv")), pytest.raises(ValueError, match=r"'head\.weight' has shape \(3,\)"):
        load_checkpoint(net, checkpoint, strict=False)


def test_a_decomposed_model_follows_the_ranks_of_a_checkpoint_without_structure(checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c.pop("bsdp"))
    net = decomposed(make_net("conv"))
    load_checkpoint(net, checkpoint)
    assert {name: pair.rank for name, pair in named_pairs(net).items()} == {"conv1": 4, "conv2": 6}


def test_records_that_grow_when_they_are_read_are_refused_unread(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(checkpoint) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", b"\0" * 2**24)
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was read"))
    assert "its records claim" in refused(checkpoint, make_net("conv"), load_checkpoint)


# --- weight files


def test_a_head_of_many_empty_rows_is_refused_before_it_is_built(tmp_path: Path) -> None:
    state = build_backbone("bsdp:resnet20", weights="none", num_classes=3).network.state_dict()
    for shape in ((2**40, 0), (0, 64), (), (2**40, 0, 2)):
        path = tmp_path / "head.safetensors"
        safetensors.torch.save_file({**state, "fc.weight": torch.empty(shape)}, path)
        with pytest.raises(ValueError, match=r"of another shape \(fc\.weight"):
            build_backbone("bsdp:resnet20", weights=str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((3,), torch.nan), r"NaN or infinity in 'fc\.bias'"),
        (torch.zeros(3, dtype=torch.int32), r"'fc\.bias' is torch\.int32"),
        (torch.zeros(3).to_sparse(), r"not ordinary dense ones, first 'fc\.bias'"),
    ],
    ids=["nan", "integers", "sparse"],
)
def test_weights_of_another_kind_are_refused(values: Tensor, message: str, tmp_path: Path) -> None:
    state = build_backbone("bsdp:resnet20", weights="none", num_classes=3).network.state_dict()
    torch.save({**state, "fc.bias": values}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"`weights`: .*{message}"):
        build_backbone("bsdp:resnet20", weights=str(tmp_path / "a.pth"))


@pytest.mark.parametrize(
    "entry",
    [
        {"mean": 3},
        {"mean": [0.5]},
        {"mean": [1, 2, float("nan")]},
        {"std": [1.0, 0.0, 1.0]},
        {"std": ["a", "b", "c"]},
        {"image_size": "32"},
        {"image_size": 10**9},
        {"image_size": True},
        {"class_names": "cat"},
        {"class_names": [1]},
    ],
    ids=str,
)
def test_impossible_metadata_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    network = build_backbone("bsdp:resnet20", weights="none", num_classes=3).network
    path = bsdp.save(network, tmp_path / "a.safetensors", metadata=entry)
    with pytest.raises(ValueError, match=f"`weights`: .* metadata with an impossible `{next(iter(entry))}`"):
        build_backbone("bsdp:resnet20", weights=str(path))


@pytest.mark.parametrize("text", ["[1]", "3", "null", '{"layers": 3}', '{"layers": {"fc": 1}}'])
def test_odd_metadata_of_a_weight_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"fc.weight": torch.zeros(3, 64)}, path, metadata={"bsdp": text})
    with pytest.raises(ValueError, match=r"`weights`: .*(metadata that is no table|holds a pruned network)"):
        read_weight_file(path)


@pytest.mark.parametrize("forced", [None, "1"])
def test_published_weights_are_not_unpickled_either(
    forced: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, marker = tmp_path / "cached.pth", tmp_path / "marker"
    torch.save({"fc.weight": Payload(marker)}, path)
    if forced is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    before = dict(os.environ)
    for target in ("torchvision.models.get_model", "timm.create_model"):
        monkeypatch.setattr(target, lambda *args, **options: torch.load(path, weights_only=False))
    for spec in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.raises(ValueError, match=r"`weights`: .*UnpicklingError"):
            build_backbone(spec, weights="default")
    assert not marker.exists()
    assert dict(os.environ) == before


def test_a_plain_file_of_ours_is_a_weight_file(tmp_path: Path) -> None:
    network = build_backbone("bsdp:resnet20", weights="none", num_classes=3).network
    path = bsdp.save(network, tmp_path / "a.safetensors", metadata={"mean": None})
    loaded = build_backbone("bsdp:resnet20", weights=str(path))
    assert loaded.num_classes == 3
    assert_same_state(loaded.network, network.state_dict())
