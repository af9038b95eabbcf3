"""Where data are looked for, and what is said when they are not there."""

import os
from collections.abc import Sequence
from pathlib import Path

_VARIABLE = "BSDP_DATA"
_DEFAULT = "./data"


def data_root(data_dir: str | None) -> Path:
    """Find the folder that holds the data sets: the argument, else the environment variable, else the default."""
    return Path(data_dir or os.environ.get(_VARIABLE) or _DEFAULT).expanduser()


def places_of(path: str, root: Path) -> list[Path]:
    """Where a path of the user may be: below the folder of all data sets, and as it is given."""
    given = Path(path).expanduser()  # joining drops what stands before an absolute path
    return list(dict.fromkeys([root / given, *([given] if path else [])]))


def first_there(places: Sequence[Path]) -> Path:
    """The first of some places that exists; the first of all where none does."""
    return next((place for place in places if place.exists()), places[0])


def not_found(name: str, *, looked_for: Sequence[Path], data_dir: str | None, download: bool) -> FileNotFoundError:
    """Make the error for absent data.

    Args:
        name: The data set.
        looked_for: Every file or folder that would have been taken.
        data_dir: The data module's argument.
        download: Whether the data module can download this set.

    Returns:
        An error that names every place, the rule behind it, and the way out.
    """
    places = ", ".join(f"'{path.absolute()}'" for path in looked_for)
    given = f"'{data_dir}'" if data_dir else "not given"
    variable = f"'{os.environ[_VARIABLE]}'" if os.environ.get(_VARIABLE) else "not set"
    way_out = "Give the folder that holds it with `--data.data_dir FOLDER` (`--data-dir` of `bsdp compress`)"
    if download:
        way_out += ", or let it be downloaded with `--data.download true`"
    return FileNotFoundError(
        f"{name} was not found. Looked for {places}. The first of these that is set decides where: the argument "
        f"`data_dir` ({given}), the environment variable {_VARIABLE} ({variable}), the default '{_DEFAULT}'. {way_out}."
    )
