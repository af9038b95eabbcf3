"""Comparisons whose fits are not run."""

import signal
from pathlib import Path

import pytest

from benchmarks import _runs
from bsdp import plots
from tests.helpers.fake_fits import FakeFits


@pytest.fixture
def fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFits:
    fake = FakeFits(tmp_path / "logs")
    monkeypatch.setattr(_runs, "call", fake)
    monkeypatch.setattr(plots, "save_figure", lambda *_: None)  # drawing takes half a second
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers of the test run stay
    return fake
