"""Functions as words of the command line."""

import argparse
from typing import Literal

import pytest

from bsdp.command_parser import call_with_words


def act(
    place: str,
    image_size: int | None = None,
    batch_size: list[int] = [1, 32],  # noqa: B006 (only read)
    dry_run: bool = False,
    check: bool = True,
    mode: Literal["fast", "slow"] = "fast",
) -> tuple[object, ...]:
    """Act somewhere.

    What it is for.

    Args:
        place: Where it happens.
        image_size: Side of the images.
        batch_size: One or more sizes.
        dry_run: Change nothing.
        check: Look at the result.
        mode: How it is done.
    """
    return place, image_size, batch_size, dry_run, check, mode


def call(line: str, *, positional: bool = True) -> tuple[object, ...]:
    result: tuple[object, ...] = call_with_words(act, line.split(), name="act", positional=positional)
    return result


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("here", ("here", None, [1, 32], False, True, "fast")),
        ("here --image-size 8 --dry-run", ("here", 8, [1, 32], True, True, "fast")),
        ("--dry-run --image-size=8 here", ("here", 8, [1, 32], True, True, "fast")),
        ("here --image_size 8 --dry_run=false --check false", ("here", 8, [1, 32], False, False, "fast")),
        ("here --batch-size 4", ("here", None, [4], False, True, "fast")),
        ("here --batch-size 4 8 --mode slow", ("here", None, [4, 8], False, True, "slow")),
        ("here --batch_size=[2,3] --check", ("here", None, [2, 3], False, True, "fast")),
        ("here --batch_size [2,3]", ("here", None, [2, 3], False, True, "fast")),
    ],
)
def test_options_as_people_write_them(line: str, expected: tuple[object, ...]) -> None:
    assert call(line) == expected


def test_required_arguments_may_be_options() -> None:
    assert call("--place here --check", positional=False)[0] == "here"
    with pytest.raises(argparse.ArgumentError, match="place"):
        call("--check", positional=False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "place"),
        ("here --image-size big", "image_size"),
        ("here --batch-size", "batch-size"),
        ("here --batch-size 2 x", "batch_size"),
        ("here --dry-run maybe", "dry_run"),
        ("here --mode idle", "mode"),
        ("here --image-siz 3", "image-siz"),
        ("here there", "there"),
    ],
)
def test_mistakes(line: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=words):
        call(line)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        call("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    assert text.startswith("usage: bsdp act") and text.count("Act somewhere.") == 1 and "What it is for." in text
    for words in ("Where it happens", "Side of the images", "One or more", "Change nothing", "Look at", "How it is"):
        assert words in text
    assert "--image-size" in text and "--image_size" not in text and "--batch-size+" not in text
