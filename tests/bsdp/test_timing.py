"""Calls in turn; no test looks at how long anything takes."""

import itertools
from typing import Any

import pytest

from bsdp.timing import time_in_turn


def test_calls_take_turns_and_warm_up() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    times = time_in_turn(calls, repeats=3, warmup=2)
    assert seen == ["a", "b"] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"]) >= 0.0


def test_time_runs_out_after_five_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    calls = {"a": lambda: None}
    assert len(time_in_turn(calls, repeats=30, warmup=2, seconds=1.0)["a"]) == 5
    assert len(time_in_turn(calls, repeats=3, warmup=0, seconds=1.0)["a"]) == 3
    assert time_in_turn(calls, repeats=30, warmup=2, seconds=20.0)["a"] == [1000.0] * 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeats": 0, "warmup": 1}, "`repeats` must be at least 1"),
        ({"repeats": 1, "warmup": -1}, "`warmup` must be at least 0"),
        ({"repeats": 1, "warmup": 0, "seconds": -1.0}, "`seconds` must be at least 0"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        time_in_turn({}, **options)
