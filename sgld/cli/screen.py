"""What the user sees: results on standard output; progress, seeds and warnings on standard error.

A bar for each stage on a terminal, plain lines elsewhere. A reader that goes away stops nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from sgld.cli.process import drop, unwritable
from sgld.messages import Event, Note, Progress

if TYPE_CHECKING:
    from tqdm.std import tqdm

QUIET_S = 5.0  # between plain lines within one stage
FRAME_S = 0.1  # between two states of a bar


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a line, by default to standard error. Raises OutputError where standard output fails."""
    stream = stream or sys.stderr
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise unwritable(error) from error
        drop(stream)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    say(f"warning: {text}")


class Screen:
    """The one writer of a run: lines go above the bar of the current stage."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._title = ""
        self._stage: str | None = None
        self._bar: tqdm | None = None
        self._started = self._printed = time.monotonic()

    def follow(self, title: str = "") -> Callable[[Event], None]:
        """Start a load or a generation. Return the function that takes its events."""
        self.close()
        self._title = f"{title} " if title else ""
        return self._on_event

    def line(self, text: str, stream: IO[str] | None = None) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._draw(self._bar.clear)
        say(text, stream or self._stream)

    def close(self) -> None:
        """End the current stage and its bar."""
        if self._bar is not None:
            self._draw(self._bar.close)
        self._stage = self._bar = None

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Note):
            self.line(f"warning: {event.text}")
        elif isinstance(event, Progress):
            self._advance(event)

    def _advance(self, event: Progress) -> None:
        if self._stage != event.stage:
            self.close()
            self._stage, self._started = event.stage, time.monotonic()
            self._printed = self._started
            if self._stream.isatty():
                self._draw(lambda: self._open_bar(event))
        if (bar := self._bar) is not None:
            bar.total = event.total
            self._draw(lambda: bar.update(event.step - bar.n))
        else:
            self._print(event, time.monotonic())
        if event.step == event.total:
            self.close()

    def _open_bar(self, event: Progress) -> None:
        from tqdm.std import tqdm  # slow to import, and without use elsewhere

        self._bar = tqdm(
            desc=self._title + event.stage, total=event.total, file=self._stream, mininterval=FRAME_S, miniters=1,
            ncols=_columns(self._stream), ascii=True,
        )  # fmt: skip

    def _print(self, event: Progress, now: float) -> None:
        """Print the time of a stage at its end, and a sign of life while it is long."""
        if event.step == event.total:
            say(f"{self._title}{event.stage}: {now - self._started:.1f} s", self._stream)
        elif event.step and now - self._printed > QUIET_S:
            self._printed = now
            say(f"{self._title}{event.stage}: {event.step}/{event.total}", self._stream)

    def _draw(self, action: Callable[[], object]) -> None:
        try:
            action()
            self._stream.flush()  # tqdm keeps silent of a terminal that has gone
        except OSError:
            drop(self._stream)


def _columns(stream: IO[str]) -> int:
    """Return the width of a terminal, 80 where it does not tell."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
