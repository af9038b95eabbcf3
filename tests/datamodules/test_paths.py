from pathlib import Path

import pytest

from bsdp.datamodules._paths import data_root, not_found


def test_argument_comes_before_variable_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSDP_DATA", "/variable")
    assert data_root("/argument") == Path("/argument")
    assert data_root(None) == Path("/variable")
    monkeypatch.delenv("BSDP_DATA")
    assert data_root(None) == Path("data")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert data_root("~/sets") == Path("/home/me/sets")


def test_error_names_every_place_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BSDP_DATA", raising=False)
    text = str(not_found("A set", looked_for=[Path("/a/x"), Path("/a/y")], data_dir=None, download=True))
    assert text == (
        "A set was not found. Looked for '/a/x', '/a/y'. The first of these that is set decides where: the argument "
        "`data_dir` (not given), the environment variable BSDP_DATA (not set), the default './data'. Give the folder "
        "that holds it with `--data.data_dir FOLDER` (`--data-dir` of `bsdp compress`), or let it be downloaded "
        "with `--data.download true`."
    )


def test_error_shows_what_was_given_and_offers_no_download_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSDP_DATA", "/variable")
    text = str(not_found("A set", looked_for=[Path("x")], data_dir="/here", download=False))
    assert "`data_dir` ('/here'), the environment variable BSDP_DATA ('/variable')" in text
    assert str(Path("x").absolute()) in text
    assert "download" not in text
