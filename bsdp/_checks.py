"""Argument checks that several files share."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase


def check_choice(argument: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a value that is not one of the allowed names."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), list(allowed), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{argument}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.{hint}")


def check_share(argument: str, value: float) -> None:
    """Refuse a value outside the open interval (0, 1)."""
    if not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise ValueError(f"`{argument}` is a share and must be in (0, 1), got {value!r}. Write 0.7 for 70 %.")


def check_fraction(argument: str, value: float) -> None:
    """Refuse a number outside the closed interval [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"`{argument}` must be in [0, 1], got {value!r}.")


def check_above(argument: str, value: float, limit: float) -> None:
    """Refuse a number that is infinite or not above a limit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not limit < value < math.inf:
        raise ValueError(f"`{argument}` must be above {limit} and finite, got {value!r}.")


def check_at_least(argument: str, value: float, minimum: float) -> None:
    """Refuse a number below a minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= minimum:
        raise ValueError(f"`{argument}` must be at least {minimum}, got {value!r}.")


def check_whole(argument: str, value: int, minimum: int) -> None:
    """Refuse anything but a whole number of at least a minimum."""
    if type(value) is not int or value < minimum:
        raise ValueError(f"`{argument}` must be at least {minimum} and a whole number, got {value!r}.")


def check_normalization(value: Mapping[str, Sequence[float]] | None) -> None:
    """Refuse anything but None and three finite numbers each for ``mean`` and ``std``, the latter above 0."""
    good = value is None or (
        set(value) == {"mean", "std"}
        and all(len(numbers) == 3 and all(map(math.isfinite, numbers)) for numbers in value.values())
        and min(value["std"]) > 0.0
    )
    if not good:
        raise ValueError(
            "`normalization` must be None or hold the lists `mean` and `std` of three finite numbers each (R, G, B), "
            f"with every `std` above 0, got {value}."
        )


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether a dotted name, or one of the modules that hold it, matches a shell-style pattern."""
    parts = name.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def check_patterns(argument: str, patterns: Iterable[str] | None, names: Collection[str]) -> list[str]:
    """Refuse a layer pattern that matches none of `names`; return the patterns as a list, empty for None."""
    if isinstance(patterns, str):
        raise ValueError(f"`{argument}` must be a list of name patterns, got the single string {patterns!r}.")
    patterns = list(patterns or ())
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3)
            shown = near or list(names)[:3]
            raise ValueError(
                f"`{argument}` has the pattern {pattern!r}, which matches no layer. Patterns are shell-style and match "
                f"a dotted layer name or a module that holds it; names here look like {', '.join(map(repr, shown))}."
            )
    return patterns
