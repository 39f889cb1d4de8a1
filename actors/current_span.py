"""The span of the request that is under way, for whoever works on it. Imports nothing of OpenTelemetry.

Where traces are off, or this request is not sampled, there is none.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from cluster.config import TracingConfig

if TYPE_CHECKING:
    from actors.tracing import RequestSpan, Tracing

_current: ContextVar[RequestSpan | None] = ContextVar("span", default=None)


def current_span() -> RequestSpan | None:
    return _current.get()


def set_current_span(span: RequestSpan) -> None:
    """For the rest of this task, and for those that it begins: a request has tasks of its own."""
    _current.set(span)


def start_tracing(config: TracingConfig, role: str) -> Tracing | None:
    """Of this process, which is one of those of `role`; None where traces are off."""
    if config.endpoint is None:
        return None
    from actors.tracing import Tracing

    return Tracing.over_otlp(config.endpoint, config.sample, role)
