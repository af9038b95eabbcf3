"""One small file per task, for a backbone that many tasks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bsdp
from bsdp.delta_files import fingerprint, read_delta_metadata
from tests.bsdp.test_diff_pruning import with_random_deltas
from tests.helpers.compare import assert_same_state, snapshot
from tests.helpers.hostile import unchanged
from tests.helpers.nets import ConvNet


def backbone() -> ConvNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ConvNet(bias=True).eval()


def task(path: Path, *, seed: int, classes: int = 4, density: float = 0.05) -> nn.Module:
    """Write the file of a task; gives the model it was written from."""
    model = backbone()
    torch.manual_seed(seed)
    model.head = nn.Linear(12, classes)
    deltas = with_random_deltas(model)
    for delta in deltas.values():
        nn.init.normal_(delta.value)
    bsdp.project_deltas(deltas, density)
    bsdp.save_delta(model, path, head=["head"], metadata={"class_names": ["a"] * classes})
    return model


def test_a_file_gives_the_very_model_it_was_written_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    source, model, images = task(path, seed=1), backbone(), torch.randn(3, 3, 8, 8)
    applied = bsdp.load_delta(model, path)
    assert torch.equal(model(images), source.eval()(images))
    assert applied.entries == sum(int(d.mask.sum()) for d in bsdp.named_deltas(source).values())  # type: ignore[union-attr]
    assert applied.metadata == read_delta_metadata(path) == {"class_names": ["a"] * 4}
    assert type(model.conv1) is nn.Conv2d


def test_several_tasks_on_one_backbone_that_stays_bit_for_bit(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sources = [task(first, seed=1), task(second, seed=2, classes=7)]
    model, images = backbone(), torch.randn(3, 3, 8, 8)
    state, objects = snapshot(model), list(model.parameters())
    for _ in range(2):
        for path, source in zip((first, second), sources, strict=True):
            with bsdp.load_delta(model, path):
                assert torch.equal(model(images), source.eval()(images))
                assert model.head.out_features == source.head.out_features
            assert_same_state(model, state)
            assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
            assert model.head.out_features == 4


def test_the_file_holds_the_entries_and_the_head_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    task(path, seed=1, density=0.02)
    tensors = load_file(path)
    assert tensors.keys() == {"indices", "values", "head.head.weight", "head.head.bias"}
    assert tensors["indices"].dtype == torch.int32
    assert tensors["values"].numel() == round(
        0.02 * sum(p.numel() for n, p in backbone().named_parameters() if not n.startswith("head"))
    )
    assert path.stat().st_size < 8 * tensors["values"].numel() + 4 * 52 + 1500


def test_a_delta_is_only_for_the_backbone_it_was_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    task(path, seed=1)
    for change in ("conv1.weight", "bn2.running_var"):
        other = backbone()
        other.state_dict()[change].flatten()[0] += 1e-3
        with unchanged(other), pytest.raises(ValueError, match="other backbone weights"):
            bsdp.load_delta(other, path)
    model = backbone()
    applied = bsdp.load_delta(model, path)
    with pytest.raises(ValueError, match="`remove` the delta of another task first"):
        bsdp.load_delta(model, path)
    applied.remove()
    applied.remove()
    assert fingerprint(model, head=["head"]) == fingerprint(backbone(), head=["head"])
    bsdp.attach_deltas(model)
    with pytest.raises(ValueError, match="detach_deltas"):
        bsdp.load_delta(model, path)


def broken(path: Path, *, header: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of a file with other metadata or tensors."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["bsdp_delta"])
    values = {**load_file(path), **tensors}
    target = path.with_name("broken.safetensors")
    text = json.dumps({**old, **(header or {})})
    save_file({k: v for k, v in values.items() if v is not None}, target, metadata={"bsdp_delta": text})
    return target


def test_hostile_and_misfitting_files_leave_the_model_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    task(path, seed=1)
    good = load_file(path)
    indices, values, count = good["indices"], good["values"], good["values"].numel()
    huge = indices.clone()
    huge[-1] = 10**6
    cases: list[tuple[str, dict[str, Any]]] = [
        ("format version", {"header": {"format_version": 2}}),
        ("`backbone`", {"header": {"backbone": 3}}),
        ("`parameters`", {"header": {"parameters": {}}}),
        ("other backbone", {"header": {"backbone": "0" * 64}}),
        ("no such parameter", {"header": {"parameters": [[1]]}}),
        (r"not ascending|too few", {"header": {"parameters": [["conv1.weight", [8, 3, 3, 3], 10**12]]}}),
        ("no such parameter", {"header": {"parameters": [["conv1.weight", [8, 3, 9], count]]}}),
        ("no such parameter", {"header": {"parameters": [["conv1.weight", [8, 3, 3, 3], True]]}}),
        ("no such parameter", {"header": {"parameters": [["bn1.running_var", [8], count]]}}),
        ("no such parameter", {"header": {"parameters": [[["conv1"], [8], count]]}}),
        (r"not ascending|too few", {"indices": indices.flip(0)}),
        (r"not ascending|too few", {"indices": torch.zeros_like(indices)}),
        (r"not ascending|too few", {"indices": huge}),
        (r"not ascending|too few", {"indices": indices - 10**6}),
        ("belong to no parameter", {"header": {"parameters": []}}),
        ("one length", {"values": values[:-1].clone()}),
        ("one length", {"indices": None}),
        ("type torch.float32", {"indices": indices.float()}),
        ("NaN or infinity", {"values": torch.full_like(values, float("nan"))}),
        ("is torch.int32", {"values": indices.clone()}),
        ("does not fit the head", {"head.head.bias": None}),
        ("does not fit the head", {"more": torch.zeros(3)}),
        ("of shape", {"head.head.weight": torch.zeros(4, 13)}),
        ("of shape", {"head.head.bias": torch.zeros(5)}),
        ("NaN or infinity", {"head.head.bias": torch.full((4,), float("inf"))}),
        ("a head", {"header": {"head": ["tail"]}}),
        ("a head", {"header": {"head": [["head"]]}}),
    ]
    model = backbone()
    for match, change in cases:
        with unchanged(model), pytest.raises(ValueError, match=match):
            bsdp.load_delta(model, broken(path, **change))
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    bsdp.save(ConvNet(), tmp_path / "model.safetensors")
    for name, match in (("cut", "not a readable safetensors"), ("model", "not written by `bsdp.save_delta`")):
        with unchanged(model), pytest.raises(ValueError, match=match):
            bsdp.load_delta(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        bsdp.load_delta(model, tmp_path / "none.safetensors")
    bsdp.load_delta(model, path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = backbone()
    with pytest.raises(ValueError, match="no deltas"):
        bsdp.save_delta(model, tmp_path / "a", head=[])
    deltas = with_random_deltas(model)
    with pytest.raises(ValueError, match="gated deltas"):
        bsdp.save_delta(model, tmp_path / "a", head=[])
    bsdp.project_deltas(deltas, 0.1)
    for name in ("tail", "conv1", ""):
        with pytest.raises(ValueError, match="`head` must name modules without deltas"):
            bsdp.save_delta(model, tmp_path / "a", head=[name])
    assert not list(tmp_path.iterdir())


def test_a_delta_of_zeros_and_half_precision(tmp_path: Path) -> None:
    model = backbone().to(torch.bfloat16)
    deltas = bsdp.attach_deltas(model, exclude=["head"])
    bsdp.project_deltas(deltas, 0.1)
    bsdp.save_delta(model, tmp_path / "zero.safetensors", head=[])
    plain = backbone().to(torch.bfloat16)
    assert bsdp.load_delta(plain, tmp_path / "zero.safetensors").entries == 0
    nn.init.constant_(deltas["conv1.weight"].value, 0.25)
    deltas["conv1.weight"].mask.fill_(True)  # type: ignore[union-attr]
    bsdp.save_delta(model, tmp_path / "a.safetensors", head=["head"])
    bsdp.load_delta(plain, tmp_path / "a.safetensors")
    assert torch.equal(plain.conv1.weight, model.conv1.weight) and plain.conv1.weight.dtype == torch.bfloat16
