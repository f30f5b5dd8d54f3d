"""Logging: plain lines on standard error."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up(level: str) -> None:
    """Log sgld at `level`; libraries only their warnings."""
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    logging.getLogger("sgld").setLevel(level.upper())
