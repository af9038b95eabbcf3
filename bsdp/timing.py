"""Timing several calls in turn, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from bsdp._checks import check_at_least

_LEAST_REPEATS = 5
Name = TypeVar("Name", bound=Hashable)


def time_in_turn(
    calls: Mapping[Name, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    cuda: bool = False,
    seconds: float | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[Name, list[float]]:
    """Time calls one after the other, round by round.

    Args:
        calls: What to time, by name.
        repeats: Timed rounds.
        warmup: Rounds before them.
        cuda: Wait for the GPU before and after each call.
        seconds: End the timed rounds after this time, but not before the fifth; None for no limit.
        clock: What tells the seconds, by default ``time.perf_counter``; other load disturbs ``time.process_time`` less.

    Returns:
        Milliseconds of every timed call.
    """
    check_at_least("repeats", repeats, 1)
    check_at_least("warmup", warmup, 0)
    if seconds is not None:
        check_at_least("seconds", seconds, 0)
    times: dict[Name, list[float]] = {name: [] for name in calls}
    end = None
    clock = clock or time.perf_counter
    for i in range(warmup + repeats):
        now = time.perf_counter()
        end = now + seconds if i == warmup and seconds is not None else end
        if end is not None and now > end and i >= warmup + _LEAST_REPEATS:
            break
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            call()
            if cuda:
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(1000.0 * (clock() - start))
    return times
