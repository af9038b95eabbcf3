"""Layers read off files whose network cannot be built."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bsdp
from bsdp.stored_layers import StoredLayer, stored_layers, stored_layers_table
from tests.helpers.nets import make_net
from tests.helpers.pruning_runs import Classifier
from tests.helpers.tiny_run import write_checkpoint


def cut_net() -> nn.Module:
    net = make_net("grouped")
    bsdp.decompose(net, include=["stem", "grouped"])
    bsdp.named_pairs(net)["grouped"].keep(torch.tensor([0, 1, 6, 7]))
    return net


def test_checkpoints_of_any_module(tmp_path: Path) -> None:
    module = Classifier()
    module.network = cut_net()
    layers = stored_layers(write_checkpoint(module, tmp_path / "x.ckpt"))
    described = {s.name: s for s in bsdp.describe(module.network).layers}

    assert [layer.name for layer in layers] == ["network.stem", "network.grouped"]
    for layer in layers:
        known = described[layer.name.removeprefix("network.")]
        assert (layer.rank, layer.full_rank) == (known.rank, known.full_rank)
        assert layer.break_even_rank == known.break_even_rank
    assert layers[1] == StoredLayer("network.grouped", "bases", 2, 6, 432 / 84, 2 * 84)


def test_transposed_layers_in_checkpoints(tmp_path: Path) -> None:
    module = Classifier()
    module.network = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Conv2d(6, 4, 1))
    bsdp.decompose(module, include=["network.0"])
    pair = bsdp.named_pairs(module)["network.0"]
    (layer,) = stored_layers(write_checkpoint(module, tmp_path / "x.ckpt"))
    assert (layer.rank, layer.full_rank) == (pair.rank, pair.full_rank)


def test_saved_weights_of_any_network(tmp_path: Path) -> None:
    net = cut_net()
    layers = stored_layers(bsdp.save(net, tmp_path / "x.safetensors"))
    by_name = {layer.name: layer for layer in layers}
    assert by_name["grouped"] == StoredLayer("grouped", "pair", 2, None, None, 2 * 84)
    assert (by_name["stem"].form, by_name["stem"].rank, by_name["stem"].weights) == ("fused", 8, 216)
    assert (by_name["head"].form, by_name["head"].full_rank, by_name["head"].weights) == ("plain", 3, 36)
    table = stored_layers_table(tmp_path / "x.safetensors")
    assert (
        "grouped" in table
        and "168" in table
        and table.endswith(f"{sum(x.weights for x in layers):,} weights in these layers")
    )


@pytest.mark.parametrize(
    "plan", [{"a": {"kind": "pair", "rank": 2}}, {"a": 3}, {"a": {"kind": "fused", "rank": "2"}}, {"b": {"kind": "x"}}]
)
def test_plans_that_do_not_fit_are_refused(tmp_path: Path, plan: object) -> None:
    header = {"bsdp": json.dumps({"format_version": 1, "layers": plan})}
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(ValueError, match="does not fit the tensors; the file is damaged"):
        stored_layers(tmp_path / "x.safetensors")


def test_files_without_pairs_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no decomposed layer"):
        stored_layers(tmp_path / "x.ckpt")
    torch.save({"state_dict": {"a.scaling.delta": torch.zeros(2)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="pair at 'a' lacks a tensor"):
        stored_layers(tmp_path / "x.ckpt")
