"""What a command inherits from whoever started it: standard streams and signals."""

from __future__ import annotations

import os
import signal
import sys
from typing import IO

from sgld.errors import OutputError


def put(text: str) -> None:
    """Write to standard output. Raises OutputError, or BrokenPipeError where the reader has gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable(error) from error


def unwritable(error: OSError) -> OutputError:
    """Give up standard output, which failed so; what to raise."""
    drop(sys.stdout)
    return OutputError(f"cannot write to standard output: {error.strerror or error}")


def drop(stream: IO[str]) -> None:
    """Send nowhere whatever is still written to that stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those signals that were not ignored when we were started, as `nohup` and a script's `command &` have it."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
