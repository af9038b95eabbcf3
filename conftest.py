"""Doctests of the real files below `bsdp/`: names they may use, and the symlinked folders left out."""

from pathlib import Path

import pytest

# The links lead to folders that are collected where they really are, under tests of their own.
collect_ignore = [str(link) for link in (Path(__file__).parent / "bsdp").iterdir() if link.is_symlink()]


@pytest.fixture(autouse=True)
def _doctest_names(request: pytest.FixtureRequest) -> None:
    """Put `bsdp`, `torch` and `nn` into the namespace of doctests; other tests do not pay for the import."""
    if request.node.__class__.__name__ != "DoctestItem":
        return
    import torch
    from torch import nn

    import bsdp

    torch.manual_seed(0)
    request.getfixturevalue("doctest_namespace").update(bsdp=bsdp, torch=torch, nn=nn)
