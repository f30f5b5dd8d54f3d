"""The command line: `sgld generate`, `sgld serve`, `sgld version`. Commands are imported when they run."""

from __future__ import annotations

import logging
import sys
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


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0 made, 1 failed, 2 bad arguments, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
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


def complain(message: str, code: int) -> int:
    """One line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    return code
