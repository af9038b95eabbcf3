"""Describing a structure, rebuilding it before weights load, and Lightning checkpoints without callbacks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bsdp
from bsdp.layers import BasisPair, named_pairs
from tests.helpers.compare import assert_same_state, decomposed, half_ranks, keep_ranks, randomize_scales, snapshot
from tests.helpers.nets import NETS, make_input, make_net


def pruned(name: str) -> nn.Module:
    """A network at half its ranks and random scales."""
    net = decomposed(make_net(name))
    randomize_scales(net)
    keep_ranks(net, half_ranks(net))
    return net


def test_the_structure_is_plain_values_with_every_name_of_a_pair() -> None:
    assert bsdp.structure_of(make_net("conv")) == {"version": 1, "pairs": {}}
    structure = bsdp.structure_of(pruned("shared"))
    assert structure == {"version": 1, "pairs": {"first": {"rank": 3}, "second": {"rank": 3}}}
    assert json.loads(json.dumps(structure)) == structure


# Oracle 10
@pytest.mark.parametrize("name", NETS)
def test_rebuilding_and_loading_gives_the_same_model(name: str) -> None:
    net, inputs = pruned(name), make_input(name)
    fresh = make_net(name)
    state = torch.random.get_rng_state()
    bsdp.rebuild(fresh, bsdp.structure_of(net))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bsdp.structure_of(fresh) == bsdp.structure_of(net)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(inputs), net(inputs))
    assert {n: p.requires_grad for n, p in named_pairs(fresh).popitem()[1].named_parameters()} == {
        **{"basis.weight": False, "scaling.weight": False, "scaling.delta": True, "scaling.bias": False},
    }


def test_rebuilding_resizes_pairs_in_both_directions_and_keeps_their_parameters() -> None:
    small, inputs = pruned("conv"), make_input("conv")
    full = decomposed(make_net("conv"))
    for source, target in ((small, copy.deepcopy(full)), (full, copy.deepcopy(small))):
        before = [id(p) for p in target.parameters()]
        bsdp.rebuild(target, bsdp.structure_of(source))
        assert bsdp.structure_of(target) == bsdp.structure_of(source)
        assert [id(p) for p in target.parameters()] == before
        target.load_state_dict(source.state_dict())
        assert torch.equal(target(inputs), source(inputs))


def test_a_rebuilt_shared_layer_is_still_shared() -> None:
    net = make_net("shared")
    bsdp.rebuild(net, bsdp.structure_of(pruned("shared")))
    assert net.first is net.second
    assert isinstance(net.first, BasisPair)


def test_rebuilding_takes_over_modes_and_hooks() -> None:
    net = make_net("conv")
    net.conv2.train()
    seen: list[int] = []
    handle = net.conv1.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    bsdp.rebuild(net, bsdp.structure_of(pruned("conv")))
    assert (net.conv1.training, net.conv2.training, net.conv2.basis.training) == (False, True, True)
    net(make_input("conv"))
    handle.remove()
    net(make_input("conv"))
    assert seen == [8]


def test_an_empty_structure_changes_nothing() -> None:
    net = make_net("conv")
    before = snapshot(net)
    bsdp.rebuild(net, {"version": 1, "pairs": {}})
    assert_same_state(net, before)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"version": 2, "pairs": {}}, "has version 2; this release reads version 1"),
        ({"pairs": {}}, "has version None"),
        ("nonsense", "has version 'nonsense'"),
        ({"version": 1}, "no table `pairs`"),
        ({"version": 1, "pairs": ["conv1"]}, "no table `pairs`"),
        ({"version": 1, "pairs": {"conv1": 3}}, "gives layer 'conv1' the rank None"),
        ({"version": 1, "pairs": {"conv1": {"rank": 0}}}, "gives layer 'conv1' the rank 0; a rank is an integer"),
        ({"version": 1, "pairs": {"conv1": {"rank": -2}}}, "the rank -2"),
        ({"version": 1, "pairs": {"conv1": {"rank": True}}}, "the rank True"),
        ({"version": 1, "pairs": {"conv1": {"rank": 2.0}}}, r"the rank 2\.0"),
        ({"version": 1, "pairs": {"conv1": {"rank": 9}}}, "gives 'conv1' the rank 9, but its full rank is 8"),
        (
            {"version": 1, "pairs": {"conv1": {"rank": 2}, "conv9": {"rank": 2}}},
            "a pair at 'conv9', but the model has no such layer",
        ),
        (
            {"version": 1, "pairs": {"conv1": {"rank": 2}, "bn1": {"rank": 2}}},
            "a pair at 'bn1', but the model has a BatchNorm2d there",
        ),
    ],
)
def test_structures_that_do_not_fit_are_refused_and_the_model_untouched(structure: object, message: str) -> None:
    net = make_net("conv")
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        bsdp.rebuild(net, structure)  # type: ignore[arg-type]
    assert_same_state(net, before)


def test_a_pair_that_the_structure_does_not_have_is_refused() -> None:
    net = decomposed(make_net("conv"))
    before = snapshot(net)
    with pytest.raises(ValueError, match="the model has a pair at 'conv2', but the saved structure has none there"):
        bsdp.rebuild(net, {"version": 1, "pairs": {"conv1": {"rank": 2}}})
    assert_same_state(net, before)


def test_pairs_that_must_stay_one_layer_are_remembered() -> None:
    net = decomposed(make_net("conv"))
    named_pairs(net)["conv2"].whole = True
    structure = bsdp.structure_of(net)
    assert structure["pairs"]["conv2"] == {"rank": named_pairs(net)["conv2"].rank, "whole": True}
    rebuilt = make_net("conv")
    bsdp.rebuild(rebuilt, structure)
    assert {name: pair.whole for name, pair in named_pairs(rebuilt).items()} == {"conv1": False, "conv2": True}


def test_a_layer_that_has_no_pair_is_not_rebuilt() -> None:
    net = nn.Sequential(nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="the model has a BatchNorm2d there"):
        bsdp.rebuild(net, {"version": 1, "pairs": {"0": {"rank": 2}}})


# --- checkpoints


def test_load_checkpoint_rebuilds_and_loads(tmp_path: Path) -> None:
    net, inputs = pruned("grouped"), make_input("grouped")
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": net.state_dict(), "bsdp": bsdp.structure_of(net), "epoch": 3}, path)
    fresh = make_net("grouped")
    checkpoint = bsdp.load_checkpoint(fresh, str(path))
    assert checkpoint["epoch"] == 3
    assert torch.equal(fresh(inputs), net(inputs))
    other = decomposed(make_net("grouped"))
    bsdp.load_checkpoint(other, str(path))
    assert torch.equal(other(inputs), net(inputs))


def test_load_checkpoint_of_a_model_that_was_never_decomposed(tmp_path: Path) -> None:
    net = make_net("conv")
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": net.state_dict()}, path)
    fresh = make_net("conv")
    bsdp.load_checkpoint(fresh, str(path))
    assert_same_state(fresh, net.state_dict())


def test_load_checkpoint_is_strict_unless_told_otherwise(tmp_path: Path) -> None:
    net = make_net("conv")
    path = tmp_path / "more.ckpt"
    torch.save({"state_dict": {**net.state_dict(), "loss.weight": torch.ones(4)}}, path)
    with pytest.raises(ValueError, match=r"more\.ckpt does not fit .* unknown \['loss\.weight'\]"):
        bsdp.load_checkpoint(make_net("conv"), str(path))
    fresh = make_net("conv")
    bsdp.load_checkpoint(fresh, str(path), strict=False)
    assert_same_state(fresh, net.state_dict())


@pytest.mark.parametrize("content", [{"weights": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_load_checkpoint_refuses_other_files(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.ckpt is not a Lightning checkpoint: it has no `state_dict`"):
        bsdp.load_checkpoint(make_net("conv"), str(path))


def test_load_checkpoint_never_runs_code_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "callback": nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match=r"evil\.ckpt cannot be read safely: .*\(torch\.nn\.modules\.linear\.Linear\)"):
        bsdp.load_checkpoint(make_net("conv"), str(path))
    with pytest.raises(FileNotFoundError):
        bsdp.load_checkpoint(make_net("conv"), str(tmp_path / "absent.ckpt"))
