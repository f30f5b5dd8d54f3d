"""Signals that end a run."""

from __future__ import annotations

import signal


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those that were not ignored when we were started, as `nohup` and a script's `command &` have it."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
