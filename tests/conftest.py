"""For all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A shared machine may stand still for a moment in any example: tests have a time limit as a whole instead.
settings.register_profile("herder", settings.default, deadline=None)
settings.load_profile("herder")

_WITH_A_RAY_OF_THEIR_OWN = ("tests/e2e/test_deploy_yaml.py", "tests/e2e/test_hosts.py")


class DeploymentsTogether(LoadScopeScheduling):
    """One of pytest-xdist's workers runs tests/e2e, in order, since they share the machine's Ray.

    A file that keeps its Ray apart may run beside them.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file in _WITH_A_RAY_OF_THEIR_OWN:
            return file
        return "e2e" if file.startswith("tests/e2e/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> DeploymentsTogether:
    return DeploymentsTogether(config, log)
