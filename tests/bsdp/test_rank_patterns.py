"""``structure.json``: there and back, and files that are not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bsdp
from bsdp.rank_patterns import RankPattern, load_pattern, save_pattern
from bsdp.selection import select_ranks
from tests.helpers.nets import ConvNet, GroupedNet

PATTERN = RankPattern(ranks={"conv1": 3, "conv2": 5}, full_ranks={"conv1": 8, "conv2": 12})


def test_there_and_back(tmp_path: Path) -> None:
    path = save_pattern(PATTERN, tmp_path / "structure.json", target=0.5)
    assert load_pattern(path) == PATTERN
    assert json.loads(path.read_text())["target"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "is no structure of version 1"),
        ('{"version": 2, "layers": {"a": {"rank": 1, "full_rank": 1}}}', "is no structure of version 1"),
        ('{"version": 1, "layers": {}}', "is no structure"),
        ('{"version": 1, "layers": {"a": 3}}', "the entry 3 for layer 'a'"),
        ('{"version": 1, "layers": {"a": {"rank": 0, "full_rank": 2}}}', "1 <= rank <= full_rank"),
        ('{"version": 1, "layers": {"a": {"rank": 3, "full_rank": 2}}}', "1 <= rank <= full_rank"),
        ('{"version": 1, "layers": {"a": {"rank": true, "full_rank": 2}}}', "whole numbers"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "structure.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pattern(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pattern(tmp_path / "structure.json")


def check(pattern: RankPattern, net: Any) -> None:
    bsdp.decompose(net, include=["conv*"])
    pairs = bsdp.named_pairs(net)
    pattern.check(bsdp.measure_cost(net).layers, {name: pair.rank for name, pair in pairs.items()})


def test_a_pattern_fits_its_own_architecture_only() -> None:
    check(PATTERN, ConvNet())
    other = RankPattern(ranks={**PATTERN.ranks, "conv3": 1}, full_ranks={**PATTERN.full_ranks, "conv3": 2})
    with pytest.raises(ValueError, match="only the structure has the decomposed layer 'conv3'"):
        check(other, ConvNet())
    with pytest.raises(ValueError, match="only the network has the decomposed layer 'conv2'"):
        check(RankPattern(ranks={"conv1": 3}, full_ranks={"conv1": 8}), ConvNet())
    with pytest.raises(ValueError, match="layer 'conv2' had the full rank 16 and has 12 here"):
        check(RankPattern(ranks=PATTERN.ranks, full_ranks={"conv1": 8, "conv2": 16}), ConvNet())


def test_a_network_that_has_lost_bases_is_refused() -> None:
    net = ConvNet()
    bsdp.decompose(net, include=["conv*"])
    with pytest.raises(ValueError, match="wants rank 5 in layer 'conv2', which has 4 left"):
        PATTERN.check(bsdp.measure_cost(net).layers, {"conv1": 8, "conv2": 4})


def test_ranks_are_planned_from_the_weakest_up_and_alike_in_all_groups() -> None:
    net = GroupedNet()
    bsdp.decompose(net, include=["grouped"])
    plan = select_ranks({"grouped": torch.arange(12.0)}, bsdp.measure_cost(net), {"grouped": 2})
    assert plan.keep["grouped"].tolist() == [4, 5, 10, 11]
    assert (plan.ranks, plan.ranks_before, plan.reached) == ({"grouped": 2}, {"grouped": 6}, True)


def test_layers_that_must_stay_whole_keep_their_rank() -> None:
    net = ConvNet()
    bsdp.decompose(net, include=["conv*"])
    bsdp.named_pairs(net)["conv2"].whole = True
    scores = {name: torch.ones(pair.rank) for name, pair in bsdp.named_pairs(net).items()}
    assert select_ranks(scores, bsdp.measure_cost(net), PATTERN.ranks).ranks == {"conv1": 3, "conv2": 12}
