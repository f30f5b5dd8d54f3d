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
from sgld.errors import SgldError, nearest

USAGE = """\
usage: sgld COMMAND [flags]

  generate   make images or videos from prompts, then exit
  serve      run the OpenAI-compatible HTTP server
  version    print the version

`sgld COMMAND --help` lists every flag of a command.
"""
COMMANDS = ("generate", "serve", "version")


def main() -> int:
    """`dispatch` as a process of its own: SIGTERM is ^C, and standard streams that are missing or gone do no harm."""
    _repair_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = dispatch(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `sgld generate --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return complain(f"cannot write to standard output: {error.strerror}", 1)
    _leave_downloads(code)
    return code


def _leave_downloads(code: int) -> None:
    """An interrupted download goes on in its thread, and the interpreter would wait for it."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stderr.flush()
        os._exit(code)


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
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] in ("version", "--version", "-V"):
        print(f"sgld {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return complain(f"unknown command {words[0]!r}{nearest(words[0], COMMANDS)}; one of {', '.join(COMMANDS)}", 2)
    return _guarded(_command(words[0]), words[1:])


def _command(name: str) -> Callable[[list[str]], int]:
    if name == "generate":
        from sgld.cli.generate import run
    else:
        from sgld.cli.serve import run
    return run


def _guarded(command: Callable[[list[str]], int], words: list[str]) -> int:
    try:
        return command(words)
    except SgldError as error:
        if logging.getLogger("sgld").isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        return complain(error.message, error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except BrokenPipeError:
        raise
    except OSError as error:  # such as no room for a temporary file
        return complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def complain(message: str, code: int) -> int:
    """One line on standard error."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code
