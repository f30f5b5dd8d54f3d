"""What the user sees: results on standard output; progress, seeds and warnings on standard error.

A bar per stage on a terminal, plain lines otherwise. A reader that has gone away stops nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO

from sgld.cli.process import drop, unwritable
from sgld.messages import Event, Note, Progress

QUIET_S = 5.0  # between plain lines within one stage
FRAME_S = 0.1  # between two states of a bar
BAR_CELLS = 24
MIN_COLUMNS = 40  # for a bar


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a line, to standard error unless told otherwise. Raises OutputError where a result cannot be told."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise unwritable(error) from error
        drop(stream)


def warn(text: str) -> None:
    """One line that the user should not miss."""
    say(f"warning: {text}")


class Screen:
    """The one writer of a run: lines go above the bar of the stage under way."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._columns = _columns(self._stream)
        self._bars = self._columns >= MIN_COLUMNS
        self._title = ""
        self._stage: Progress | None = None
        self._started = self._drawn = time.monotonic()

    def follow(self, title: str = "") -> Callable[[Event], None]:
        """Start a load or a generation; the answer takes its events."""
        self.close()
        self._title = f"{title} " if title else ""
        self._started = time.monotonic()
        return self._on_event

    def line(self, text: str, stream: IO[str] | None = None) -> None:
        """A line that stays."""
        if self._stage is not None and self._bars:
            self._draw("\r\x1b[K")
        say(text, stream or self._stream)

    def close(self) -> None:
        """Leave the line of a bar that did not come to its end."""
        if self._stage is not None and self._bars:
            self._draw("\n")
        self._stage = None

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Note):
            self.line(f"warning: {event.text}")
        elif isinstance(event, Progress):
            self._advance(event)

    def _advance(self, event: Progress) -> None:
        now = time.monotonic()
        if self._stage is None or self._stage.stage != event.stage:
            self._started = self._started if event.stage == "load" else now
            self._drawn = now
        self._stage = event
        ended = event.step == event.total
        if self._bars:
            self._draw_bar(event, now, ended)
        elif ended:
            say(f"{self._title}{event.stage}: {now - self._started:.1f} s", self._stream)
        elif event.step and now - self._drawn > QUIET_S:
            self._drawn = now
            say(f"{self._title}{event.stage}: {event.step}/{event.total}", self._stream)
        if ended:
            self._stage = None

    def _draw_bar(self, event: Progress, now: float, ended: bool) -> None:
        if event.step and not ended and now - self._drawn < FRAME_S:
            return
        self._drawn = now
        text = self._title + bar(event, now - self._started)
        self._draw(f"\r\x1b[K{text[: self._columns - 1]}" + ("\n" if ended else ""))

    def _draw(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._bars = False


def _columns(stream: IO[str]) -> int:
    """Width of a terminal; 0 where there is none."""
    if not stream.isatty():
        return 0
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def bar(event: Progress, seconds: float) -> str:
    """`denoise  [######------] 10/20  4.1 s, 4.1 s left`."""
    full = BAR_CELLS * event.step // max(1, event.total)
    cells = "#" * full + "-" * (BAR_CELLS - full)
    left = f", {seconds * (event.total - event.step) / event.step:.1f} s left" if 0 < event.step < event.total else ""
    return f"{event.stage:<8} [{cells}] {event.step}/{event.total}  {seconds:.1f} s{left}"
