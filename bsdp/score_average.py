"""Scores that outlive a cut: an exponential average over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_momentum(momentum: float) -> None:
    """Refuse a momentum of scores outside [0, 1)."""
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0.0 <= momentum < 1.0:
        raise ValueError(f"`score_momentum` must be in [0, 1), got {momentum!r}. 0 averages nothing.")


class ScoreAverage:
    """Averages the scores of a round with those that the surviving bases had in the rounds before.

    ``score = momentum * carried + (1 - momentum) * new``; the first round has nothing carried and takes the new scores
    as they are. The calls of one round are `average`, `gather` once the cut is planned, and `advance` once it is made;
    a cut that is only tried leaves out the last one.

    Args:
        momentum: In [0, 1); 0 carries nothing.
    """

    def __init__(self, momentum: float) -> None:
        check_momentum(momentum)
        self.momentum = float(momentum)
        self.drop()

    def drop(self) -> None:
        """Forget everything: the bases that the scores belong to are gone."""
        self.carried: dict[str, Tensor] = {}
        self._newest: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}

    def average(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average of new scores and the carried ones, by layer."""
        self._newest = {
            name: torch.lerp(new, self.carried[name].to(new), self.momentum) if name in self.carried else new
            for name, new in scores.items()
        }
        return dict(self._newest)

    def gather(self, keep: Mapping[str, Tensor]) -> None:
        """Note what the bases at the given positions scored in the newest average."""
        if self.momentum > 0.0:
            newest = self._newest
            self._next = {n: newest[n][kept.to(newest[n].device)] for n, kept in keep.items() if n in newest}

    def advance(self) -> None:
        """Carry what was gathered into the next round; nothing if nothing was."""
        self.carried, self._newest, self._next = self._next, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, to be taken between cuts."""
        return {"carried": dict(self.carried)}

    def load_state_dict(self, state: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        """Continue from `state_dict`.

        Args:
            state: The state.
            sizes: Number of bases by layer now.

        Raises:
            ValueError: If the scores belong to a model of other ranks.
        """
        self.drop()
        carried = dict(state.get("carried", {})) if self.momentum > 0.0 else {}
        odd = next((name for name, score in carried.items() if len(score) != sizes.get(name)), None)
        if odd is not None:
            raise ValueError(f"the carried scores belong to another rank of layer {odd!r}.")
        self.carried = carried
