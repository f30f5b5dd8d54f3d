"""Progress on standard error: a bar per stage on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any

from sgld.messages import Event, Note, Progress

QUIET_S = 5.0  # between plain lines within one stage


class ProgressPrinter:
    """Follows the events of one load or one generation."""

    def __init__(self, title: str = "") -> None:
        self._title = f"{title} " if title else ""
        self._on_terminal = sys.stderr.isatty()
        self._stage, self._started, self._printed = "", 0.0, 0.0
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            warn(event.text)
        elif isinstance(event, Progress):
            if event.stage != self._stage:
                self._begin(event)
            self._advance(event)

    def close(self) -> None:
        """Leave the line of the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _begin(self, event: Progress) -> None:
        self.close()
        self._stage, self._started, self._printed = event.stage, time.monotonic(), time.monotonic()
        if self._on_terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=event.total, desc=f"{self._title}{event.stage}", file=sys.stderr, leave=True)

    def _advance(self, event: Progress) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(event.step - self._bar.n)
        elif event.step == event.total:
            print(f"{self._title}{event.stage}: {now - self._started:.1f} s", file=sys.stderr, flush=True)
        elif event.step and now - self._printed > QUIET_S:
            self._printed = now
            print(f"{self._title}{event.stage}: {event.step}/{event.total}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that the user should not miss."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
