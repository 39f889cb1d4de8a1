"""Traces of requests, by OpenTelemetry. Imported only where traces are on.

A request's span is begun by the interface that it comes through, and has the attributes of the semantic conventions for
generative AI (https://opentelemetry.io/docs/specs/semconv/gen-ai/). Its children: the encoding of its images, which the
encoder continues in its own process; and for each engine that it was at, what that engine's `Timeline` tells.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.current_span import set_current_span
from engine.request import ErrorCode, ExpertSeconds, Request, RequestError, RequestRejected, Timeline

_SEND_EVERY_MS = 1000
_W3C = TraceContextTextMapPropagator()
_SERVER_FAULTS = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.DEADLINE_EXCEEDED, ErrorCode.INTERNAL})

Attribute = str | int | float | bool


class Tracing:
    """A process's way to make spans. They go to `processor`."""

    def __init__(self, processor: SpanProcessor, sample: float, role: str) -> None:
        """`sample`: the part of the requests that are traced, among those whose caller has not decided it."""
        resource = Resource.create(
            {
                "service.name": f"herder-{role}",
                "service.namespace": "herder",
                "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
            }
        )
        self._provider = TracerProvider(ParentBased(TraceIdRatioBased(sample)), resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("herder")

    @classmethod
    def over_otlp(cls, endpoint: str, sample: float, role: str) -> Tracing:
        """To the collector at `endpoint`, in batches, by a thread of their own; it may be away, and spans are lost."""
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        return cls(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS), sample, role)

    def close(self) -> None:
        """Sends what is left; for as long as that takes."""
        self._provider.shutdown()

    @contextmanager
    def request(self, operation: str, model: str, headers: Mapping[str, str]) -> Iterator[RequestSpan]:
        """The span of a request, current until its end. `headers`, by lower-case names, may say whose child it is."""
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "herder",
            "gen_ai.request.model": model,
        }
        parent = _W3C.extract(headers, Context())
        span = self._tracer.start_span(f"{operation} {model}", parent, SpanKind.SERVER, attributes)
        request = RequestSpan(self._tracer, span)
        if span.is_recording():
            set_current_span(request)
        try:
            yield request
        except RequestRejected as error:
            request.fail(error.code)
            raise
        except Exception:
            request.fail(ErrorCode.INTERNAL)
            raise
        finally:
            span.end()

    @contextmanager
    def continued(self, name: str, traceparent: str | None) -> Iterator[Span | None]:
        """The part of a traced request that is done in this process; nothing for one that is not traced."""
        if traceparent is None:
            yield None
            return
        parent = _W3C.extract({"traceparent": traceparent}, Context())
        with _ending(self._tracer.start_span(name, parent, SpanKind.SERVER)) as span:
            yield span


class RequestSpan:
    """A request's span. What comes of its answers adds up, where it has several."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._reasons: list[str] = []
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    def ask(self, request: Request) -> None:
        """One of its answers is begun."""
        params = request.params
        self._span.set_attributes(
            {
                "gen_ai.response.id": request.request_id,
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "herder.images": len(request.images),
            }
        )

    def answer(self, reason: str, prompt_tokens: int, cached_tokens: int, generated_tokens: int) -> None:
        """One of its answers has ended."""
        self._reasons.append(reason)
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached_tokens
        self._generated_tokens += generated_tokens
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": self._reasons,
                "gen_ai.usage.input_tokens": self._prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": self._cached_tokens,
                "gen_ai.usage.output_tokens": self._generated_tokens,
            }
        )

    def fail(self, code: ErrorCode) -> None:
        """It is refused, or has failed. What is the client's own fault is no error of this server's span."""
        self._span.set_attribute("error.type", code.value)
        if code in _SERVER_FAULTS:
            self._span.set_status(StatusCode.ERROR)

    def set(self, name: str, value: Attribute) -> None:
        self._span.set_attribute(name, value)

    def event(self, name: str, **attributes: Attribute) -> None:
        self._span.add_event(name, {f"herder.{key}": value for key, value in attributes.items()})

    @contextmanager
    def child(self, name: str, **attributes: Attribute) -> Iterator[str]:
        """A span below it, for as long as the context lasts. Gives its `traceparent`, for other processes."""
        named = {f"herder.{key}": value for key, value in attributes.items()}
        with _ending(self._tracer.start_span(name, self._context, SpanKind.CLIENT, named)) as span:
            carrier: dict[str, str] = {}
            _W3C.inject(carrier, set_span_in_context(span, Context()))
            yield carrier["traceparent"]

    def at_engine(self, engine: str, request_id: str, timeline: Timeline, error: RequestError | None) -> None:
        """What it came to at an engine, which has just ended it."""
        started, first_token, ended = timeline.started, timeline.first_token, timeline.ended
        root = self._tracer.start_span(
            "engine",
            self._context,
            attributes={"herder.engine": engine, "herder.request_id": request_id},
            start_time=_ns(timeline.queued),
        )
        if error is not None:
            root.set_attribute("error.type", error.code.value)
            root.set_status(StatusCode.ERROR)
        inside = set_span_in_context(root, Context())
        self._phase("queue", inside, timeline.queued, ended if started is None else started)
        if started is not None:
            self._phase("prefill", inside, started, ended if first_token is None else first_token, timeline.prefill)
        if first_token is not None:
            self._phase("decode", inside, first_token, ended, timeline.decode)
        root.end(_ns(ended))

    def _phase(
        self, name: str, inside: Context, start: float, end: float, experts: ExpertSeconds | None = None
    ) -> None:
        span = self._tracer.start_span(name, inside, start_time=_ns(start))
        if experts is not None:
            span.set_attribute("herder.dispatch_seconds", experts.dispatch)
            span.set_attribute("herder.combine_seconds", experts.combine)
        span.end(_ns(end))


@contextmanager
def _ending(span: Span) -> Iterator[Span]:
    """Ends it with the context. An exception is not recorded: its message may quote the prompt."""
    try:
        yield span
    except Exception:
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
