"""What surrounds the runs of a comparison: its display, and that it is alone in its folder."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO


class Display:
    """The newest line of a run, rewritten in place; nothing where standard output is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.start = stream, time.monotonic()

    def tick(self, line: str) -> None:
        """Show a line and the minutes since the start."""
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[K  {(time.monotonic() - self.start) / 60:.1f} min  {line[:100]}")
            self.stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[tuple[int, ...]]:
    """Hold a folder while a comparison runs; the runs hold it, too, so one that outlived its comparison is noticed.

    Yields:
        File descriptors to hand to the runs.

    Raises:
        ValueError: If somebody else holds it.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # so that a run does not outlive it
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield ()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another comparison, or a run of one that was killed, still works on {folder}: wait for "
                "its end, or end it."
            ) from error
        yield (file.fileno(),)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
