"""Models that lost channels, in structures, checkpoints, safetensors files, reports and plots."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bsdp
from bsdp.channel_graph import channel_groups
from bsdp.channel_pruner import ChannelPruner
from bsdp.channel_scales import add_scales
from bsdp.channel_settings import ChannelPruningSettings
from bsdp.plots import pruning_figure
from bsdp.report import summarize
from bsdp.scale_hooks import scales_of
from bsdp.stats import described_layers, layer_rows, measure_positions
from bsdp.structure import rebuild, set_shape, shape_of
from tests.helpers.channel_removal import TRACEABLE, halved, traceable_batch, traceable_net
from tests.helpers.compare import assert_same_state, decomposed, half_ranks, keep_ranks, randomize_scales, snapshot
from tests.helpers.nets import ConvNet

FORMS = ["plain", "pairs", "scales"]


def small_net(name: str, form: str) -> nn.Module:
    """A network that lost half of its channels, then (as the form says) half of its ranks, or got scales."""
    net, example = traceable_net(name), traceable_batch(name, batch=1)
    if form == "pairs":
        net = decomposed(net)
        halved(net, example)
        randomize_scales(net)
        keep_ranks(net, half_ranks(net))
        return net
    halved(net, example)
    if form == "scales":
        nn.init.uniform_(add_scales(net, channel_groups(net, example)).weight, 0.5, 1.5)
    return net


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRACEABLE)
def test_structures_are_rebuilt_before_weights_load(name: str, form: str) -> None:
    net, batch, fresh = small_net(name, form), traceable_batch(name), traceable_net(name)
    rebuild(fresh, bsdp.structure_of(net), state_dict=net.state_dict())
    assert bsdp.structure_of(fresh) == bsdp.structure_of(net)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(batch), net(batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRACEABLE)
def test_a_description_counts_from_the_original(name: str, form: str) -> None:
    net, batch, plain = small_net(name, form), traceable_batch(name, batch=1), traceable_net(name)
    before, after = bsdp.describe(plain, batch), bsdp.describe(net, batch)
    assert (after.params_original, after.macs_original) == (before.params, before.macs)
    assert after.params == sum(p.numel() for p in bsdp.fold(net).parameters()) < before.params
    rows = {row.name: (row.params, row.macs) for row in before.layers}
    assert {row.name: (row.params_original, row.macs_original) for row in after.layers} == rows


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_are_read_without_callbacks(form: str, tmp_path: Path) -> None:
    net, batch = small_net("concat", form), traceable_batch("concat")
    path = tmp_path / "pruned.ckpt"
    torch.save({"state_dict": net.state_dict(), "bsdp": bsdp.structure_of(net)}, path)
    fresh = traceable_net("concat")
    bsdp.load_checkpoint(fresh, path)
    assert torch.equal(fresh(batch), net(batch))
    again = small_net("concat", form)  # one that lost channels already
    bsdp.load_checkpoint(again, path)
    assert torch.equal(again(batch), net(batch))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TRACEABLE)
def test_files_hold_the_folded_model(name: str, form: str, tmp_path: Path) -> None:
    net, batch = small_net(name, form), traceable_batch(name)
    before = snapshot(net)
    path = bsdp.save(net, tmp_path / "pruned.safetensors")
    assert_same_state(net, before)
    loaded = bsdp.load(traceable_net(name), path)
    torch.testing.assert_close(loaded(batch), net(batch), rtol=0, atol=1e-12)
    assert scales_of(loaded) is None
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in bsdp.fold(net).parameters())
    assert bsdp.read_metadata(path)["widths"].keys() == shape_of(net)["widths"].keys()


def test_a_whole_model_has_no_widths_in_its_file(tmp_path: Path) -> None:
    path = bsdp.save(ConvNet(), tmp_path / "whole.safetensors")
    assert "widths" not in bsdp.read_metadata(path)


def test_the_name_widths_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not have the key 'widths'"):
        bsdp.save(ConvNet(), tmp_path / "x.safetensors", metadata={"widths": {}})


def test_shapes_go_back_and_forth() -> None:
    net, batch = small_net("flatten", "scales"), traceable_batch("flatten")
    shape, state, expected = copy.deepcopy(shape_of(net)), snapshot(net), net(batch)
    set_shape(net, {})
    assert shape_of(net) == {}
    big = traceable_net("flatten")
    net.load_state_dict(big.state_dict())
    assert torch.equal(net(batch), big(batch))
    set_shape(net, shape)
    net.load_state_dict(state)
    assert torch.equal(net(batch), expected)


MISFITS = (
    "unknown module",
    "larger",
    "no table",
    "scales of nothing",
    "scales no table",
    "rank above the width",
    "pair at nothing",
)


def structures() -> dict[str, Any]:
    """Structures that do not fit, the parts that do being applied first."""
    good = bsdp.structure_of(small_net("flatten", "plain"))
    pairs = bsdp.structure_of(small_net("flatten", "pairs"))
    widths = good["widths"]
    return {
        "unknown module": {**good, "widths": {**widths, "conv9": widths["conv"]}},
        "larger": {**good, "widths": {**widths, "conv": {"attributes": {"out_channels": 99}, "shapes": {}}}},
        "no table": {**good, "widths": 3},
        "scales of nothing": {**good, "scales": {"nothing": {"units": 1, "readers": {}}}},
        "scales no table": {**good, "scales": [1]},
        "rank above the width": {**pairs, "pairs": {"conv": {"rank": 4}, "hidden": {"rank": 1}}},
        "pair at nothing": {**pairs, "pairs": {**pairs["pairs"], "conv9": {"rank": 1}}},
    }


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("lost", [False, True], ids=["whole", "cut before"])
def test_hostile_structures_leave_the_model_as_it_was(kind: str, lost: bool) -> None:
    net, batch = traceable_net("flatten"), traceable_batch("flatten")
    if lost:
        halved(net, batch[:1], seed=2)
    before, shape, expected = snapshot(net), shape_of(net), net(batch)
    with pytest.raises(ValueError, match="the saved structure"):
        rebuild(net, structures()[kind])
    assert_same_state(net, before)
    assert shape_of(net) == shape
    assert torch.equal(net(batch), expected)


def test_weights_of_other_widths_leave_the_model_as_it_was() -> None:
    small, net, batch = small_net("flatten", "plain"), traceable_net("flatten"), traceable_batch("flatten")
    before, expected = snapshot(net), net(batch)
    with pytest.raises(ValueError, match="does not fit"):
        rebuild(net, bsdp.structure_of(small), state_dict=before)
    assert_same_state(net, before)
    assert torch.equal(net(batch), expected)


@pytest.mark.parametrize(
    "widths",
    [{"conv9": {"attributes": {}, "shapes": {}}}, 3, {"conv": {"attributes": {}, "shapes": {"weight": [9, 9, 9, 9]}}}],
)
def test_files_with_hostile_widths_are_refused(widths: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net("flatten", "plain")
    with monkeypatch.context() as patch:
        patch.setattr("bsdp.files.widths_of", lambda model: widths)
        path = bsdp.save(net, tmp_path / "hostile.safetensors")
    fresh = traceable_net("flatten")
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=r"hostile\.safetensors: the saved structure has"):
        bsdp.load(fresh, path)
    assert_same_state(fresh, before)


# --- reports


def test_rows_of_layers_tell_channels_against_the_original() -> None:
    whole, net, example = traceable_net("flatten"), small_net("flatten", "pairs"), traceable_batch("flatten", batch=1)
    rows = layer_rows(net, measure_positions(net, described_layers(net), example), new_bias=False)
    assert [row["name"] for row in rows] == ["conv", "hidden", "head"]
    conv, hidden, head = rows
    assert (conv["channels"], conv["channels_original"], conv["full_rank"]) == (3, 6, 6)
    assert conv["kind"] == "pair"
    assert (conv["params"], conv["params_original"]) == (27 + 3 + 3, 6 * 27 + 6)
    assert (conv["macs"], conv["macs_original"]) == (64 * 30, 64 * 162)
    assert hidden["channels_original"] == 5
    assert (head["kind"], head["channels"], head["params_original"]) == ("plain", 3, 5 * 3 + 3)
    for row in rows:
        assert row["params_kept"] == row["params"] / row["params_original"]
    assert sum(row["params_original"] for row in rows) == sum(
        p.numel() for name, p in whole.named_parameters() if "norm" not in name
    )
    assert all(row["macs"] is None and row["macs_kept"] is None for row in layer_rows(net))


@pytest.mark.parametrize("name", TRACEABLE)
def test_rows_of_a_whole_model_keep_everything(name: str) -> None:
    net, example = traceable_net(name), traceable_batch(name, batch=1)
    for row in layer_rows(net, measure_positions(net, described_layers(net), example)):
        assert row["params_kept"] == row["macs_kept"] == 1.0
        assert row["channels"] == row["channels_original"]
    halved(net, example)
    for row, again in zip(layer_rows(net), layer_rows(traceable_net(name)), strict=True):
        assert row["params_original"] == again["params"]


def pruned_record() -> bsdp.record.PruningRecord:
    model = ConvNet()
    settings = ChannelPruningSettings(target=0.4, rounds=2, tolerance=0.05, criterion="l1")
    pruner = ChannelPruner(model, settings, torch.zeros(1, 3, 8, 8))
    pruner.observe(0.9)
    for epoch in (1, 2):
        pruner.cut(epoch)
        pruner.observe(0.89)
    pruner.restore()
    return pruner.record


def test_summaries_tell_channels() -> None:
    record = pruned_record()
    summary = summarize(record)
    last = record.rounds[-1]
    assert summary["channels_original"] == 20
    assert summary["channels_pruned"] == sum(last.channels.values()) < 20
    assert summary["channels_kept"] == summary["channels_pruned"] / 20
    assert summary["reached_target"] is True
    assert [row["name"] for row in summary["layers"]] == ["conv1", "conv2", "head"]
    assert summary["layers"][0]["channels"] == last.channels["conv1"]
    assert summary["params_pruned"] == last.params


def test_the_heat_map_shows_channels_where_no_layer_is_decomposed() -> None:
    record = pruned_record()
    figure = pruning_figure(record)
    axes = next(a for a in figure.axes if "per layer" in a.get_title())
    assert axes.get_title() == "channels / original per layer"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2"]
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [str(r.channels[n]) for n in ("conv1", "conv2") for r in record.rounds]
