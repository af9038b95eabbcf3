"""The picture of a run: right values in the right places, and nothing of the caller's matplotlib touched."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from bsdp.plots import plot_pruning_curves, pruning_figure
from tests.helpers.records import make_record


def _lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_show_the_best_of_every_round_against_what_is_kept() -> None:
    record = make_record(layers=4, rounds=3, chosen=2)
    params, macs, _heat, _bar = pruning_figure(record).axes
    for axes, kind in ((params, "params"), (macs, "macs")):
        kept = [100 * getattr(r, kind) / record.cost.original(kind) for r in record.rounds]
        curve = next(values for values in _lines(axes).values() if len(values[0]) == 4)
        best = [100 * (r.accuracy_best or 0) for r in record.rounds]
        assert curve == (pytest.approx(kept), pytest.approx(best))
        assert _lines(axes)["chosen"] == (pytest.approx(kept[2:3]), pytest.approx(best[2:3]))
        low, high = axes.get_xlim()
        assert low < min(kept) and high > 100
    assert "target 50 % kept" in _lines(params) and "target 50 % kept" not in _lines(macs)
    labels = [text.get_text() for text in params.get_legend().get_texts()]
    assert labels == ["reference 98.00 %", "tolerance 1 point", "target 50 % kept", "chosen"]


def test_the_heat_map_holds_the_shares_of_the_full_ranks() -> None:
    record = make_record(layers=4, rounds=3, chosen=2)
    heat = pruning_figure(record).axes[2]
    image = heat.images[0].get_array()
    expected = [[r.ranks[n] / c.full_rank for r in record.rounds] for n, c in record.cost.layers.items()]
    assert image.tolist() == expected
    assert [label.get_text() for label in heat.get_yticklabels()] == list(record.cost.layers)
    assert heat.patches[0].get_x() == 1.5  # the frame around column 2
    assert {text.get_text() for text in heat.texts} >= {"16", "64"}


@pytest.mark.parametrize(("layers", "labels"), [(20, 20), (56, 56), (200, 50)])
def test_labels_are_thinned(layers: int, labels: int) -> None:
    figure = pruning_figure(make_record(layers=layers, rounds=30))
    assert len(figure.axes[2].get_yticklabels()) == labels
    assert len(figure.axes[2].get_xticklabels()) <= 20
    assert figure.get_size_inches()[1] <= 12


def test_less_is_better_turns_the_tolerance_around() -> None:
    record = make_record(layers=2, rounds=2)
    record.monitor, record.mode, record.reference, record.tolerance = "val_loss", "min", 0.5, 0.2
    axes = pruning_figure(record).axes[0]
    band = next(patch for patch in axes.patches if patch.get_label() == "tolerance 0.2")
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((0.5, 0.7))
    assert axes.get_ylabel() == "val loss, best of a round"


def test_what_was_not_measured_is_said() -> None:
    record = make_record(layers=2, rounds=1, measured_macs=False)
    figure = pruning_figure(record)
    assert [text.get_text() for text in figure.axes[1].texts] == ["MACs were not measured"]
    record.rounds = [replace(entry, accuracy_best=None) for entry in record.rounds]
    record.reference = None
    figure = pruning_figure(record)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no validation values"]
    record.chosen = 0
    assert "Nothing removed" in pruning_figure(record).get_suptitle()


def test_the_file_is_a_picture_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    record = make_record(layers=2, rounds=1)
    path = plot_pruning_curves(record, tmp_path / "new" / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]
    (tmp_path / "new" / "folder.png").mkdir()
    with pytest.raises(OSError, match=r"folder\.png"):
        plot_pruning_curves(record, tmp_path / "new" / "folder.png")
    assert sorted(p.name for p in path.parent.iterdir()) == ["curves.png", "folder.png"]
    record.rounds.clear()
    with pytest.raises(ValueError, match="`record`"):
        plot_pruning_curves(record, path)
    assert path.exists() and list(tmp_path.iterdir()) == [path.parent]


def test_pyplot_which_has_global_state_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails now
    # Reading the entry `backend` would choose one.
    before = {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
    plot_pruning_curves(make_record(layers=2, rounds=1), tmp_path / "curves.png")
    assert {key: matplotlib.rcParams[key] for key in before} == before
