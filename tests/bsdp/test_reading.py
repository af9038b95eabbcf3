"""Files of unknown origin: short words for what is wrong, and no code from them (more in `test_hostile_files`)."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bsdp.reading import (
    open_safetensors,
    parse_json,
    read_pickled,
    reason_of,
    refuse_absent,
    shown,
    tensors_of,
    without_unpickling,
)


def test_huge_and_deep_values_are_shown_in_one_short_line() -> None:
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10_000, list(range(10_000)), deep, {str(i): i for i in range(1000)}):
        assert len(shown(value)) < 120 and "\n" not in shown(value)
    assert shown("name") == "'name'"


def test_reasons_are_one_line() -> None:
    assert reason_of(ValueError("two\n  lines")) == "ValueError: two lines"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(ValueError("x" * 1000))) < 250


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse_absent(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*is a folder"):
        refuse_absent(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone$"):
        refuse_absent(tmp_path / "gone")


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4, dtype=torch.int8)}
    save_file(tensors, tmp_path / "t.safetensors")
    with open_safetensors(tmp_path / "t.safetensors") as file:
        found = tensors_of(file, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pth")
    for other in (found, read_pickled(tmp_path / "t.pth")):
        assert other.keys() == tensors.keys() and all(torch.equal(other[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x02" + b"\0" * 7 + b"{}tail"])
def test_a_file_that_is_none_of_ours_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a readable safetensors file"), open_safetensors(path):
        pass
    with pytest.raises(ValueError, match=r"cannot be read as a file of torch.save|cannot be read safely"):
        read_pickled(path)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', "{", "[" * 100_000])
def test_json_that_is_none_or_says_a_thing_twice_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="odd has metadata that is not JSON"):
        parse_json(text, tmp_path / "odd")


def test_json_of_different_tables_may_repeat_a_key(tmp_path: Path) -> None:
    assert parse_json('{"a": {"k": 1}, "b": {"k": 2}}', tmp_path) == {"a": {"k": 1}, "b": {"k": 2}}


def test_no_load_inside_unpickles_and_the_environment_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save(Path("x"), tmp_path / "object.pth")
    with pytest.raises(Exception, match=r"(?i)weights"), without_unpickling():
        torch.load(tmp_path / "object.pth", weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
