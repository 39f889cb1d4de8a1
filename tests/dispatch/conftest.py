from collections.abc import Iterator

import pytest

from dispatch.store import host_store
from tests.dispatch import p2p_world
from tests.dispatch.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    processes = Pool()
    yield processes
    processes.close()


@pytest.fixture
def alone() -> Iterator[Pool]:
    """A process that has run nothing yet, to count descriptors and threads in: those of other tests come and go."""
    process = Pool()
    yield process
    process.close()


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


@pytest.fixture(scope="module", params=["sockets", "lanes"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How rows of the p2p transport travel: by its sockets, or as between GPUs, over gloo instead of NCCL."""
    p2p_world.use(request.param)
    yield request.param
    p2p_world.use("sockets")
