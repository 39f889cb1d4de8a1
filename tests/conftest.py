"""For all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# A shared machine may stand still for a moment in any example: tests have a time limit as a whole instead.
settings.register_profile("herder", settings.default, deadline=None)
settings.load_profile("herder")


class DeploymentsTogether(LoadScopeScheduling):
    """One of pytest-xdist's workers runs all of tests/e2e, in order, since they share the machine's Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "e2e" if nodeid.startswith("tests/e2e/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> DeploymentsTogether:
    return DeploymentsTogether(config, log)
