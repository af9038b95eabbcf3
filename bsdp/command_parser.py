"""Plain functions as words of the command line: their arguments become options, their docstrings the help.

Imported only when one of them is asked for.
"""

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser


def call_with_words(function: Callable[..., Any], words: Sequence[str], *, name: str, positional: bool) -> Any:
    """Call a function with arguments from the command line.

    An argument ``image_size`` is the option ``--image-size`` (``--image_size`` is the same); a boolean one needs no
    value; a list takes all words up to the next option.

    Args:
        function: With types and a Google docstring.
        words: What stands behind the name on the command line.
        name: The word of the command line, for the usage.
        positional: Whether arguments without a default go without an option's name.

    Returns:
        What the function returns.

    Raises:
        argparse.ArgumentError: If the words do not fit.
    """
    types = {key: hint for key, hint in typing.get_type_hints(function).items() if key != "return"}
    parser = ArgumentParser(prog=f"bsdp {name}", description=_description(function), exit_on_error=False)
    parser.allow_abbrev = False
    parser.add_function_arguments(function, as_positional=positional, fail_untyped=False)
    for action in parser._actions:
        if action.option_strings and action.dest in types:
            _respell(parser, action, types[action.dest])
    for group in parser._action_groups:
        if group.title and group.title not in ("positional arguments", "options"):
            group.title = "arguments"  # would be the docstring's first line once more
    return function(**vars(parser.parse_args(_gathered(list(words), types))))


def _description(function: Callable[..., Any]) -> str:
    """The docstring up to its first section."""
    document = inspect.getdoc(function) or ""
    return document.split("\n\nArgs:")[0]


def _respell(parser: ArgumentParser, action: Any, kind: Any) -> None:
    """Give an option dashes, a boolean one the value true where none stands, and a list a readable placeholder."""
    dashed = f"--{action.dest.replace('_', '-')}"
    parser._option_string_actions[dashed] = action
    action.option_strings = [dashed]
    if kind is bool:
        action.nargs, action.const = "?", True
    elif typing.get_origin(kind) is list:
        action.metavar = "N [N ...]"


def _gathered(words: list[str], types: dict[str, Any]) -> list[str]:
    """Bring ``--sizes 1 2`` to ``--sizes=[1, 2]``, the form that the parser takes for lists."""
    gathered: list[str] = []
    while words:
        word = words.pop(0)
        kind = types.get(word.removeprefix("--").replace("-", "_")) if word.startswith("--") else None
        if typing.get_origin(kind) is list:
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
            if values:
                whole = len(values) == 1 and values[0].startswith("[")
                word = f"{word}={values[0] if whole else '[' + ', '.join(values) + ']'}"
        gathered.append(word)
    return gathered
