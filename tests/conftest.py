"""For all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A shared machine may stand still for a moment in any example: tests have a time limit as a whole instead.
settings.register_profile("herder", settings.default, deadline=None)
settings.load_profile("herder")

_APART = ("tests/e2e/test_deploy_yaml.py", "tests/e2e/test_hosts.py")  # from the Ray of other tests

# What kills and starts most actors is first, and what measures for minutes last: neither beside another deployment,
# such as those apart, which the other worker comes to when it has run all the rest.
_TURNS = {"failover": 0, "balance": 2, "elastic": 3, "soak": 4}
_OTHERS, _UNITS, _LAST = 1, 5, 6


def _turn(file: str) -> int:
    if file in _APART:
        return _LAST
    if not file.startswith("tests/e2e/"):
        return _UNITS
    name = file.removeprefix("tests/e2e/test_")
    return next((turn for start, turn in _TURNS.items() if name.startswith(start)), _OTHERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _turn(_file(item.nodeid)))


class DeploymentsTogether(LoadScopeScheduling):
    """One of pytest-xdist's workers runs tests/e2e, in order, since they share the machine's Ray.

    The other one runs all the rest, and at its end the files that keep their Ray apart.
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
