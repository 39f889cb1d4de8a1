"""An OpenTelemetry collector, as far as OTLP over HTTP goes; and spans by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True)
class Received:
    """A span, and the service that it comes from."""

    service: str
    span: Span

    @property
    def attributes(self) -> dict[str, object]:
        return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in self.span.attributes}


@dataclass(frozen=True)
class Collector:
    url: str
    received: list[Received]

    def one(self, name: str) -> Received:
        (found,) = [one for one in self.received if one.span.name == name]
        return found

    def parent(self, name: str) -> str | None:
        """The name of its parent, if that has come."""
        wanted = self.one(name).span.parent_span_id
        return next((one.span.name for one in self.received if one.span.span_id == wanted), None)

    def trace_of(self, request_id: str) -> list[tuple[str, str, str | None]]:
        """Service, name, and parent's name of each span in the traces of the request, in the order of their names."""
        received = list(self.received)
        traces = {one.span.trace_id for one in received if one.attributes.get("gen_ai.response.id") == request_id}
        own = [one for one in received if one.span.trace_id in traces]
        names = {one.span.span_id: one.span.name for one in own}
        found = [(one.service, one.span.name, names.get(one.span.parent_span_id)) for one in own]
        return sorted(found, key=lambda service_name_parent: service_name_parent[1])


@contextmanager
def collector() -> Iterator[Collector]:
    received: list[Received] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    received.extend(Received(names["service.name"], span) for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Collector(f"http://127.0.0.1:{server.server_port}", received)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
