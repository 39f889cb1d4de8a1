from collections.abc import Iterator

import pytest

from dispatch.store import host_store
from tests.dispatch.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    processes = Pool()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def port() -> Iterator[int]:
    """Of a store outside all ranks, as the rule is."""
    store, port = host_store("127.0.0.1")
    yield port
    del store


_epochs = iter(range(10**6))


@pytest.fixture
def epoch() -> int:
    """First of a thousand epochs that no other test uses."""
    return 1000 * next(_epochs)
