"""Schedules of what is kept."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsdp.schedules import SCHEDULES, kept_share

ORACLE = {
    # target 0.8 in 4 rounds, by hand
    "constant": [1.0, 0.8, 0.6, 0.4, 0.2],
    "geometric": [1.0, 0.2**0.25, 0.2**0.5, 0.2**0.75, 0.2],
    "cubic": [1.0, 1 - 0.8 * (1 - 27 / 64), 1 - 0.8 * 7 / 8, 1 - 0.8 * 63 / 64, 0.2],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values(schedule: str) -> None:
    values = [kept_share(i, rounds=4, target=0.8, schedule=schedule) for i in range(5)]
    assert values == pytest.approx(ORACLE[schedule], rel=1e-12)


def test_every_schedule_has_an_oracle_and_cubic_is_the_default() -> None:
    assert ORACLE.keys() == set(SCHEDULES)
    assert kept_share(1, rounds=4, target=0.8) == kept_share(1, rounds=4, target=0.8, schedule="cubic")


@given(st.sampled_from(SCHEDULES), st.integers(1, 30), st.floats(0.01, 0.99))
def test_shares_fall_from_one_to_exactly_what_the_target_leaves(schedule: str, rounds: int, target: float) -> None:
    values = [kept_share(i, rounds=rounds, target=target, schedule=schedule) for i in range(rounds + 1)]
    assert values[0] == 1.0
    assert values[-1] == 1.0 - target
    assert all(later < earlier for earlier, later in pairwise(values))


@given(st.integers(2, 30), st.floats(0.01, 0.99))
def test_geometric_removes_the_same_share_of_what_is_left(rounds: int, target: float) -> None:
    values = [kept_share(i, rounds=rounds, target=target, schedule="geometric") for i in range(rounds + 1)]
    ratios = [later / earlier for earlier, later in pairwise(values)]
    assert ratios == pytest.approx([ratios[0]] * rounds, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounds_outside_the_range_are_clamped(schedule: str) -> None:
    assert kept_share(-3, rounds=4, target=0.8, schedule=schedule) == 1.0
    assert kept_share(9, rounds=4, target=0.8, schedule=schedule) == 1.0 - 0.8
    assert kept_share(1, rounds=1, target=0.8, schedule=schedule) == 1.0 - 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0, "target": 0.5}, "`rounds` must be at least 1"),
        ({"rounds": 3, "target": 1.0}, "`target` is a share"),
        ({"rounds": 3, "target": 0.0}, "`target` is a share"),
        (
            {"rounds": 3, "target": 0.5, "schedule": "linear"},
            "`schedule` must be one of 'geometric', 'cubic', 'constant'",
        ),
    ],
)
def test_settings_that_are_not_allowed_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_share(1, **options)  # type: ignore[arg-type]
