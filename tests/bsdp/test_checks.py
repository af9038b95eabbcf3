"""Argument checks."""

import pytest

from bsdp._checks import check_at_least, check_choice, check_patterns, check_share, matches


def test_check_choice_accepts_what_is_allowed() -> None:
    check_choice("metric", "b", ("a", "b"))


def test_check_choice_names_argument_alternatives_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"`metric` must be one of 'euclidean', 'activation', got 'euclidian'.*'euclidean'\?"
    ):
        check_choice("metric", "euclidian", ("euclidean", "activation"))


def test_check_choice_gives_no_hint_for_something_quite_different() -> None:
    with pytest.raises(ValueError, match=r"got 'zzz'.$"):
        check_choice("metric", "zzz", ("euclidean", "activation"))


@pytest.mark.parametrize("value", [0.7, 1e-9, 0.999])
def test_check_share_accepts_the_open_interval(value: float) -> None:
    check_share("target", value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.1, 70, float("nan"), True, "0.5", None])
def test_check_share_refuses_the_rest(value: object) -> None:
    with pytest.raises(ValueError, match="`target` is a share"):
        check_share("target", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 1.0, 5, float("inf")])
def test_check_at_least_accepts(value: float) -> None:
    check_at_least("rounds", value, 1)


@pytest.mark.parametrize("value", [0, 0.99, -1, float("nan"), True])
def test_check_at_least_refuses(value: float) -> None:
    with pytest.raises(ValueError, match="`rounds` must be at least 1"):
        check_at_least("rounds", value, 1)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("layer1.0.conv1", "layer1.0.conv1", True),
        ("layer1.0.conv1", "layer1", True),  # a module that holds it
        ("layer1.0.conv1", "layer1.0", True),
        ("layer1.0.conv1", "layer?.*.conv1", True),
        ("layer1.0.conv1", "*conv1", True),
        ("layer1.0.conv1", "conv1", False),  # no substring search
        ("layer10.0", "layer1", False),  # no prefix of a part
        ("layer1.0.conv1", "Layer1", False),
        ("layer1.0", "layer1.0.conv1", False),
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, [pattern]) is expected


def test_matches_any_of_several_patterns_and_nothing_without_patterns() -> None:
    assert matches("a.b", ["x", "a"])
    assert not matches("a.b", [])


def test_check_patterns_returns_a_list_also_of_a_generator_and_of_none() -> None:
    assert check_patterns("include", (p for p in ("a", "b*")), ["a", "bc"]) == ["a", "b*"]
    assert check_patterns("include", None, ["a"]) == []


def test_check_patterns_refuses_a_pattern_without_a_match_and_shows_near_names() -> None:
    with pytest.raises(
        ValueError, match=r"`exclude` has the pattern 'layer1.conv9', which matches no layer.*'layer1.conv1'"
    ):
        check_patterns("exclude", ["layer1", "layer1.conv9"], ["layer1.conv1", "head"])


def test_check_patterns_refuses_a_single_string() -> None:
    with pytest.raises(ValueError, match="`include` must be a list of name patterns, got the single string 'conv'"):
        check_patterns("include", "conv", ["c", "o", "n", "v"])
