"""Random structures and file plans: they are refused with the model untouched, or mean what they say."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsdp
from bsdp.layers import named_pairs
from bsdp.weight_files import read_weight_file
from tests.helpers.compare import assert_same_state, decomposed, half_ranks, keep_ranks
from tests.helpers.hostile import unchanged
from tests.helpers.nets import NETS, make_input, make_net

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 14),
    st.sampled_from([10**12, -(10**30), 2**63]),
    st.floats(),
    st.sampled_from(
        ["", "0", "6", "pair", "fused", "plain", "conv1", "conv2", "head", "bn1", "rank", "kind", "conv1.0"]
    ),
    st.text(max_size=5),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["conv1", "conv2", "head", "bn1", "conv9", "", "conv1.basis", "rank", "kind", "bias", "version"])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in nested tables."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    return found


@st.composite
def altered(draw: st.DrawFn, good: dict[str, Any]) -> Any:
    """A table with one to three of its parts replaced, removed or added."""
    table: Any = {"it": copy.deepcopy(good)}
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(table)[1:]))
        holder = table
        for key in parents:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove" and parents:
            del holder[last]
        elif action == "add" and isinstance(holder[last], dict):
            known = [value for value in holder[last].values() if isinstance(value, dict)]
            holder[last][draw(KEYS)] = draw(st.sampled_from(known) | JSON) if known else draw(JSON)
        else:
            holder[last] = draw(JSON)
    return table["it"]


def halved(name: str = "conv") -> torch.nn.Module:
    """A network at half its ranks."""
    net = decomposed(make_net(name))
    keep_ranks(net, half_ranks(net))
    return net


torch.manual_seed(0)
NET = halved()
STATE, STRUCTURE, INPUTS = NET.state_dict(), bsdp.structure_of(NET), make_input("conv")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of `NET`."""
    return bsdp.save(NET, tmp_path_factory.mktemp("plans") / "good.safetensors")


GOOD_HEADER = {
    "format_version": 1,
    "layers": {
        "conv1": {"kind": "pair", "rank": 4, "bias": False},
        "conv2": {"kind": "pair", "rank": 6, "bias": False},
        "head": {"kind": "plain", "rank": 4, "bias": True},
    },
    "backbone": "x",
}


def one_paragraph(error: BaseException) -> None:
    text = str(error)
    assert 20 < len(text) < 1500 and text.isprintable(), text


def test_the_header_that_is_altered_is_the_one_of_the_file(good: Path) -> None:
    header = bsdp.read_metadata(good)
    assert {**header, "backbone": "x"} == GOOD_HEADER


@settings(max_examples=120)
@given(altered(GOOD_HEADER))
def test_altered_headers_of_files(good: Path, header: Any) -> None:
    path = good.with_name("altered.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(good), path, metadata={"bsdp": json.dumps(header)})
    model = make_net("conv")
    try:
        loaded = bsdp.load(copy.deepcopy(model), path)
    except ValueError as error:
        one_paragraph(error)
        with unchanged(model), pytest.raises(ValueError):
            bsdp.load(model, path)
    else:
        # What was altered says nothing of the layers that change.
        changing = {name: entry for name, entry in header["layers"].items() if entry["kind"] != "plain"}
        assert changing.keys() == {"conv1", "conv2"}
        assert torch.equal(loaded(INPUTS), bsdp.load(model, good)(INPUTS))


@settings(max_examples=120)
@given(altered(STRUCTURE), st.booleans())
def test_altered_structures_of_checkpoints(good: Path, structure: Any, decompose_first: bool) -> None:
    path = good.with_name("altered.ckpt")
    torch.save({"state_dict": STATE, "bsdp": structure}, path)
    model = make_net("conv")
    if decompose_first:
        bsdp.decompose(model)
    trial = copy.deepcopy(model)
    try:
        bsdp.load_checkpoint(trial, path)
    except ValueError as error:
        one_paragraph(error)
        with unchanged(model), pytest.raises(ValueError):
            bsdp.load_checkpoint(model, path)
    else:
        assert bsdp.structure_of(trial)["pairs"] == STRUCTURE["pairs"]
        assert torch.equal(trial(INPUTS), NET(INPUTS))


@settings(max_examples=60)
@given(st.sampled_from(sorted(NETS)), st.integers(0, 10**9), st.booleans())
def test_every_possible_structure_is_rebuilt_as_it_is(name: str, seed: int, decompose_first: bool) -> None:
    rng = random.Random(seed)
    net = decomposed(make_net(name))
    keep_ranks(net, {n: rng.randint(1, pair.rank) for n, pair in named_pairs(net).items()})
    fresh = make_net(name)
    if decompose_first:
        bsdp.decompose(fresh)
        keep_ranks(fresh, {n: rng.randint(1, pair.rank) for n, pair in named_pairs(fresh).items()})
    structure = json.loads(json.dumps(bsdp.structure_of(net)))
    bsdp.rebuild(fresh, structure, state_dict=net.state_dict())
    assert bsdp.structure_of(fresh) == structure
    fresh.load_state_dict(net.state_dict())
    assert_same_state(fresh, net.state_dict())
    inputs = make_input(name)
    assert torch.equal(fresh(inputs), net(inputs))


@settings(max_examples=100)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{", b"\x80\x02}q"])
)
def test_files_of_random_bytes(good: Path, content: bytes, start: bytes) -> None:
    path = good.with_name("random.safetensors")
    path.write_bytes(start + content)
    other = good.with_name("random.ckpt")
    other.write_bytes(start + content)
    model = make_net("conv")
    with unchanged(model):
        for read in (bsdp.load, bsdp.load_checkpoint):
            for file in (path, other):
                with pytest.raises(ValueError) as error:
                    read(model, file)
                one_paragraph(error.value)
        for file in (path, other):
            with pytest.raises(ValueError, match=r"^`weights`: "):
                read_weight_file(file)
