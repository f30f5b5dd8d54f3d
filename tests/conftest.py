"""Fixtures for every test."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A test fails if sgld blocks its event loop."""
    with blockbuster_ctx("sgld") as guard:
        yield guard
