"""Parameters of which only some are run by default."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """All values for ``parametrize``; those that are not `quick` are marked slow. A tuple stands for its arguments."""
    quick, values = list(quick), list(values)
    assert all(value in values for value in quick), "a quick value is none of the values"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in quick else pytest.mark.slow
        )
        for value in values
    ]
