"""Logging: plain lines on standard error."""

from __future__ import annotations

import logging
import sys

from sgld.config import set_default_environment

FORMAT = "%(asctime)s %(levelname)s %(message)s"
QUIET = {  # read by libraries as they are imported, in this process and in its workers
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def set_up(level: str) -> None:
    """Log sgld at `level`; libraries only their warnings, and none of their bars but a terminal's download bar."""
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    logging.getLogger("sgld").setLevel(level.upper())
    if level != "debug":
        set_default_environment(**QUIET)
    if sys.stderr is None or not sys.stderr.isatty():
        set_default_environment(HF_HUB_DISABLE_PROGRESS_BARS="1")
