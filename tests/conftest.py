"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# A shared machine may stand still for a moment in any example: tests have a time limit as a whole instead.
settings.register_profile("herder", settings.default, deadline=None)
settings.load_profile("herder")
