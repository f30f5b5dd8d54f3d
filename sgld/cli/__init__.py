"""The command line: `sgld generate`, `sgld serve`, `sgld version`. Commands are imported when they run."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from sgld import __version__
from sgld.cli.process import drop, unwritable
from sgld.errors import SgldError, nearest

USAGE = """\
usage: sgld COMMAND [flags]

  generate   make images or videos from prompts, then exit
  serve      run the OpenAI-compatible HTTP server
  version    print the version

`sgld COMMAND --help` lists every flag of a command.
"""
LONGEST = 500  # characters of an internal error
COMMANDS = ("generate", "serve", "version")
VERSION = ("version", "--version", "-V")


def main() -> int:
    """Run a command as a process: SIGTERM is ^C, and missing or closed standard streams do no harm."""
    _repair_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = dispatch(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `sgld generate --help | head`
        drop(sys.stdout)
        return 0
    except OSError as error:
        return complain(unwritable(error).message, 1)
    _leave_downloads(code)
    return code


def _leave_downloads(code: int) -> None:
    """Exit at once if an interrupted download goes on in its thread, for the interpreter would wait."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        from sgld.cli.process import exit_now

        exit_now(code)


def _repair_streams() -> None:
    """Give a closed standard stream a place to go, and print paths as the bytes the file system has."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number: this one
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())


def dispatch(words: list[str]) -> int:
    """Run one command. Returns 0 made, 1 failed, 2 bad arguments, 130 interrupted."""
    if not words:
        print(USAGE, end="")
        return 2
    plain = {**dict.fromkeys(("-h", "--help", "help"), USAGE), **dict.fromkeys(VERSION, f"sgld {__version__}\n")}
    if words[0] in plain:
        if words[1:]:
            return complain(f"unexpected argument {words[1]!r}; `sgld {words[0]}` takes none", 2)
        print(plain[words[0]], end="")
        return 0
    if words[0] not in COMMANDS:
        known = f"not one of {', '.join(COMMANDS)}{nearest(words[0], COMMANDS)}"
        return complain(f"unknown command {words[0]!r}, {known}", 2)
    return _guarded(words[0], words[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    if name == "generate":
        from sgld.cli.generate import run
    else:
        from sgld.cli.serve import run
    return run


def _guarded(name: str, words: list[str]) -> int:
    """Run a command, and print every failure as one line."""
    try:
        return _command(name)(words)
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        if _debugging(words):
            traceback.print_exc()
        if isinstance(error, SgldError):
            return complain(error.message, error.exit_code)
        if isinstance(error, OSError):  # such as no room for a temporary file
            return complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
        message = f"internal error: {type(error).__name__}: {error}"
        return complain(f"{message[:LONGEST]}; --log-level debug shows the traceback", 1)


def _debugging(words: list[str]) -> bool:
    """Check that debug is the level of the log, or was asked for."""
    asked = "--log-level debug" in " ".join(words).replace("=", " ").replace("_", "-")
    return asked or logging.getLogger("sgld").isEnabledFor(logging.DEBUG)


def complain(message: str, code: int) -> int:
    """Print an error as one line. Return the exit code."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
