"""How much of the model is left after each pruning round."""

from __future__ import annotations

from bsdp._checks import check_at_least, check_choice, check_share

SCHEDULES = ("geometric", "cubic", "constant")


def kept_share(round_index: int, *, rounds: int, target: float, schedule: str = "cubic") -> float:
    """Share of the original cost to keep after a round.

    ``"geometric"`` removes the same share of what is left in every round, ``"constant"`` the same share of the
    original, ``"cubic"`` follows ``target * (1 - (1 - i / n)^3)`` (Zhu and Gupta, arXiv 1710.01878): much at first,
    little at last.

    Args:
        round_index: 1 to `rounds`; 0 gives 1.0.
        rounds: Number of rounds.
        target: Share removed after the last round, in (0, 1).
        schedule: One of `SCHEDULES`.

    Example:
        >>> [round(kept_share(i, rounds=2, target=0.75, schedule="geometric"), 2) for i in (1, 2)]
        [0.5, 0.25]
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_share("target", target)
    check_at_least("rounds", rounds, 1)
    progress = min(max(round_index, 0), rounds) / rounds
    if schedule == "geometric":
        return float((1.0 - target) ** progress)
    if schedule == "constant":
        return 1.0 - target * progress
    return 1.0 - target * (1.0 - (1.0 - progress) ** 3)
