"""What a command inherits from whoever started it: standard streams and signals."""

from __future__ import annotations

import os
import signal
import sys
from typing import IO, NoReturn

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
    """Give up standard output after a failed write. Return the error to raise."""
    drop(sys.stdout)
    return OutputError(f"cannot write to standard output: {error.strerror or error}")


def drop(stream: IO[str]) -> None:
    """Send all further output of a stream nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """List the signals that were not ignored at the start, unlike under `nohup` and a script's `command &`."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def exit_now(code: int) -> NoReturn:
    """Exit without waiting for threads, and leave no fork server behind: `os._exit` runs no exit handlers."""
    from sgld.engine.forkserver import FORK_SERVER

    FORK_SERVER.stop()
    sys.stderr.flush()
    os._exit(code)
