"""Widths as plain values, giving them to other models, and widths that do not fit."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from bsdp.layers import named_pairs
from bsdp.structure import set_shape, shape_of
from bsdp.widths import forget_widths, original_widths, set_widths, widths_of
from tests.helpers.channel_removal import TRACEABLE, halved, traceable_batch, traceable_net
from tests.helpers.compare import assert_same_state, decomposed, half_ranks, keep_ranks, snapshot
from tests.helpers.nets import ConvNet


def half(name: str, *, pairs: bool = False) -> nn.Module:
    net = traceable_net(name)
    if pairs:
        net = decomposed(net)
        keep_ranks(net, half_ranks(net))
    return halved(net, traceable_batch(name, batch=1))


def test_a_whole_model_has_no_widths() -> None:
    assert widths_of(ConvNet()) == {}
    assert original_widths(ConvNet().conv1) is None


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
def test_widths_are_plain_values(pairs: bool) -> None:
    net = half("flatten", pairs=pairs)
    widths = widths_of(net)
    assert json.loads(json.dumps(widths)) == widths
    assert widths["conv"] == {"attributes": {"out_channels": 3}, "shapes": {"weight": [3, 3, 3, 3], "bias": [3]}}
    assert widths["hidden"]["attributes"] == {"in_features": 12, "out_features": 3}
    assert widths["norm"]["shapes"].keys() == {"weight", "bias", "running_mean", "running_var"}
    assert original_widths(net.norm)["attributes"]["num_features"] == 6


@pytest.mark.parametrize("name", TRACEABLE)
def test_another_model_takes_widths_and_weights(name: str) -> None:
    small, batch, fresh = half(name), traceable_batch(name), traceable_net(name)
    identities = [id(p) for p in fresh.parameters()]
    set_widths(fresh, widths_of(small))
    assert widths_of(fresh) == widths_of(small)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(batch), small(batch))
    assert [id(p) for p in fresh.parameters()] == identities


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
@pytest.mark.parametrize("name", TRACEABLE)
def test_back_to_the_original_sizes_and_forward_again(name: str, pairs: bool) -> None:
    small, batch = half(name, pairs=pairs), traceable_batch(name)
    widths, state, expected = widths_of(small), snapshot(small), small(batch)
    big = traceable_net(name)
    set_widths(small, {})
    assert widths_of(small) == {}
    if not pairs:
        small.load_state_dict(big.state_dict())
        assert torch.equal(small(batch), big(batch))
    else:
        assert small(batch).shape == expected.shape
    set_widths(small, widths)
    small.load_state_dict(state)
    assert widths_of(small) == widths
    torch.testing.assert_close(small(batch), expected, rtol=0, atol=0)


def test_widths_of_two_cuts_are_told_against_the_first_model() -> None:
    net = half("concat")
    first = widths_of(net)
    halved(net, traceable_batch("concat", batch=1), seed=1)
    assert original_widths(net.stem)["attributes"]["out_channels"] == 4
    assert (first["stem"]["attributes"], widths_of(net)["stem"]["attributes"]) == (
        {"out_channels": 2},
        {"out_channels": 1},
    )
    fresh = traceable_net("concat")
    set_widths(fresh, widths_of(net))
    fresh.load_state_dict(net.state_dict())


def test_marks_are_copied_and_can_be_forgotten() -> None:
    net = copy.deepcopy(half("flatten"))
    assert widths_of(net)
    forget_widths(net)
    assert widths_of(net) == {}


def test_flags_and_precision_stay() -> None:
    fresh = traceable_net("flatten")
    fresh.conv.weight.requires_grad_(False)
    set_widths(fresh, widths_of(half("flatten")))
    assert not fresh.conv.weight.requires_grad
    assert fresh.hidden.weight.requires_grad
    assert {t.dtype for t in fresh.state_dict().values()} == {torch.float64, torch.int64}


GOOD = {"attributes": {"out_channels": 3}, "shapes": {"weight": [3, 3, 3, 3], "bias": [3]}}


def changed(**entry: Any) -> dict[str, Any]:
    return {"conv": {**GOOD, **entry}}


HOSTILE: dict[str, Any] = {
    "no table": [1, 2],
    "unknown module": {"conv9": GOOD},
    "name of another type": {7: GOOD},
    "no entry": {"conv": 3},
    "no shapes": {"conv": {"attributes": {}}},
    "larger": changed(attributes={"out_channels": 7}),
    "larger shape": changed(shapes={"weight": [7, 3, 3, 3]}),
    "zero": changed(attributes={"out_channels": 0}),
    "negative": changed(shapes={"weight": [-1, 3, 3, 3], "bias": [3]}),
    "bool": changed(attributes={"out_channels": True}),
    "text": changed(attributes={"out_channels": "3"}),
    "float": changed(shapes={"weight": [3.0, 3, 3, 3]}),
    "fewer axes": changed(shapes={"weight": [3, 27]}),
    "more axes": changed(shapes={"weight": [3, 3, 3, 3, 1]}),
    "number for a shape": changed(shapes={"weight": 3}),
    "unknown tensor": changed(shapes={"wieght": [3, 3, 3, 3]}),
    "unknown attribute": changed(attributes={"outs": 3}),
    "not a size": changed(attributes={"padding_mode": "zeros"}),
}


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
@pytest.mark.parametrize("widths", HOSTILE.values(), ids=HOSTILE)
def test_widths_that_do_not_fit_are_refused_and_the_model_is_as_it_was(widths: Any, pairs: bool) -> None:
    net = traceable_net("flatten")
    net = decomposed(net) if pairs else net
    halved(net, traceable_batch("flatten", batch=1))
    before, shape, batch = snapshot(net), shape_of(net), traceable_batch("flatten")
    expected = net(batch)
    with pytest.raises(ValueError, match=r"the saved structure has (widths of|a table `widths`)"):
        set_shape(net, {"widths": widths})
    assert_same_state(net, before)
    assert shape_of(net) == shape
    assert torch.equal(net(batch), expected)


def test_pairs_follow_with_a_rank_that_the_shape_allows() -> None:
    net = decomposed(traceable_net("flatten"))
    set_widths(net, widths_of(half("flatten", pairs=True)))
    assert {name: pair.rank for name, pair in named_pairs(net).items()} == {"conv": 3, "hidden": 3}
    assert net(traceable_batch("flatten")).shape == (4, 3)
