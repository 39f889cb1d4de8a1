"""For all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A shared machine may stand still for a moment in any example: tests have a time limit as a whole instead.
settings.register_profile("herder", settings.default, deadline=None)
settings.load_profile("herder")

# Each worker's Ray is out of the other one's sight, and its actors let the other one's start: Ray gives a node thirty
# seconds to come up.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ |= {"RAY_TMPDIR": f"/tmp/ray-{worker}", "RAY_worker_niceness": "10"}

_APART = {
    f"tests/e2e/test_{name}.py"
    for name in ("deploy_yaml", "failover_layouts", "head", "hosts", "standalone", "topology")
}

# What kills and starts most actors is first, beside no other deployment: those apart are started when their worker has
# run all the rest. Image encoders are the nicest of all, and a burst from none waits for minutes beside what wants the
# CPU: they come when the other worker has run the units and the hosts. What only takes its time is last, and not beside
# the hosts: while one comes back it needs the CPU.
_TURNS = {"failover": 0, "balance": 2, "elastic": 3, "vision": 4, "soak": 5}
_OTHERS, _UNITS, _HOSTS, _LAST = 1, 6, 7, 8


def _turn(file: str) -> int:
    if file == "tests/e2e/test_hosts.py":
        return _HOSTS
    if file in _APART:
        return _LAST
    if not file.startswith("tests/e2e/"):
        return _UNITS
    name = file.removeprefix("tests/e2e/test_")
    return next((turn for start, turn in _TURNS.items() if name.startswith(start)), _OTHERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(_file(item.nodeid)))


class DeploymentsTogether(LoadScopeScheduling):
    """One of pytest-xdist's workers runs most of tests/e2e, in order, since they share a Ray.

    The other one runs all the rest, and at its end what needs none of the deployments that others use.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = _file(nodeid)
        if file in _APART:
            return file
        return "e2e" if file.startswith("tests/e2e/") else nodeid


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> DeploymentsTogether:
    config.option.loadscopereorder = False  # in the order of the collection
    return DeploymentsTogether(config, log)
