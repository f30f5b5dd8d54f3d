"""Fixtures for every test."""

import signal
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from sgld.config import set_default_environment

set_default_environment(OMP_WAIT_POLICY="passive")  # threads that spin would starve the other test process

# a shell's background job ignores ^C, and so would every command that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A test fails if sgld blocks its event loop."""
    with blockbuster_ctx("sgld") as guard:
        yield guard
