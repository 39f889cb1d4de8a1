"""A collector of OpenTelemetry traces, which a live deployment sends its spans to over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it gets at `url`, each with the service that it comes from."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.spans: list[tuple[str, Span]] = []

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
            self.spans += [(named["service.name"], span) for scope in resource.scope_spans for span in scope.spans]

    def trace_of(self, request_id: str) -> list[tuple[str, str, str | None]]:
        """Service, name, and parent's name of each span in the traces of the request, in the order of their names."""
        spans = list(self.spans)
        traces = {span.trace_id for _, span in spans if _attribute(span, "gen_ai.response.id") == request_id}
        own = [(service, span) for service, span in spans if span.trace_id in traces]
        names = {span.span_id: span.name for _, span in own}
        return sorted(
            ((service, span.name, names.get(span.parent_span_id)) for service, span in own), key=lambda s: s[1]
        )


def _attribute(span: Span, key: str) -> str:
    return next((found.value.string_value for found in span.attributes if found.key == key), "")


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers["content-encoding"] == "gzip":
            body = gzip.decompress(body)
        if self.path == "/v1/traces":
            self.server.take(ExportTraceServiceRequest.FromString(body))
        self.send_response(200 if self.path == "/v1/traces" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        try:
            yield collector
        finally:
            collector.shutdown()
