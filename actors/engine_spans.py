"""Where what engines tell of traced requests goes."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from actors.current_span import current_span
from actors.engine_links import EngineLink
from engine.request import RequestOutput

if TYPE_CHECKING:
    from actors.tracing import RequestSpan


class EngineSpans:
    """The spans of requests that are at an engine: from their submission until it has ended them, or is lost.

    An engine may end a request after its client has what it wanted: it then tells of it all the same.
    """

    def __init__(self) -> None:
        self._spans: WeakKeyDictionary[EngineLink, dict[str, RequestSpan]] = WeakKeyDictionary()

    def expect(self, link: EngineLink, request_id: str) -> None:
        """The current request is submitted to this engine."""
        if (span := current_span()) is not None:
            self._spans.setdefault(link, {})[request_id] = span

    def forget(self, link: EngineLink, request_id: str) -> None:
        """The engine has not taken it."""
        self._spans.get(link, {}).pop(request_id, None)

    def end(self, link: EngineLink, output: RequestOutput) -> None:
        """The last output of a request at this engine, if it is a timed one."""
        if output.timeline is None:
            return
        if (span := self._spans.get(link, {}).pop(output.request_id, None)) is not None:
            span.at_engine(link.name, output.request_id, output.timeline, output.error)
