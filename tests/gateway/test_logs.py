"""What the gateway logs of requests: their ids, and nothing of what they ask."""

from __future__ import annotations

import json
import logging
import traceback

import grpc
import pytest

from actors.api_keys import NO_KEYS
from actors.grpc_api import Refused
from actors.logs import JsonFormatter, set_level, set_up_logs
from engine.request import ErrorCode, RequestRejected
from herder.v1 import inference_pb2 as pb
from herder.v1.types_pb2 import SamplingParams
from tests.gateway.conftest import Servicer
from tests.gateway.fakes import MAX_CONTEXT

MARK = "XYZZY"


@pytest.fixture
def everything(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Records of all levels, by all loggers."""
    caplog.set_level(logging.DEBUG)
    return caplog


def texts(logged: pytest.LogCaptureFixture) -> str:
    """What has been logged in this test, with the tracebacks."""
    return "\n".join(logging.Formatter("%(message)s").format(record) for record in logged.records)


def chat(content: object, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 2, **fields}


class ServeContext:
    """Ray Serve's, as far as it is used here."""

    code: grpc.StatusCode | None = None
    details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()


BAD = [
    chat(MARK, max_tokens=10_000),
    chat(MARK, temperature=MARK),
    chat(MARK * MAX_CONTEXT),
    chat([{"type": MARK, "text": MARK}]),
    chat(MARK, model=MARK),
    chat(MARK, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": MARK}}),
    {"model": "tiny", "messages": MARK},
    {MARK: MARK},
]


async def test_prompts_over_http_are_in_no_record(asgi, engine, everything):
    headers = {"X-Request-Id": "mine"}
    assert (await asgi.post("/v1/chat/completions", json=chat(MARK), headers=headers)).status_code == 200
    for body in BAD:
        answer = await asgi.post("/v1/chat/completions", json=body, headers=headers)
        assert 400 <= answer.status_code < 500
    broken = await asgi.post("/v1/chat/completions", content='{"messages": "' + MARK, headers=headers)
    assert broken.status_code == 400
    engine.failure = RuntimeError("broken")
    assert (await asgi.post("/v1/chat/completions", json=chat(MARK), headers=headers)).status_code == 500
    engine.failure, engine.rejection = None, RequestRejected("full", code=ErrorCode.RESOURCE_EXHAUSTED)
    assert (await asgi.post("/v1/chat/completions", json=chat(MARK), headers=headers)).status_code == 429
    said = texts(everything)
    assert MARK not in said
    assert said.count("request refused request_id=mine") == len(BAD) + 2
    for event in ("accepted", "failed", "ended"):
        assert f"request {event} request_id=chatcmpl-mine" in said


async def test_prompts_over_grpc_are_in_no_record(inference, engine, everything):
    def message(**fields: object) -> pb.ChatRequest:
        content = [pb.ContentPart(text=MARK)]
        return pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=content)], request_id="mine", **fields)

    await inference.Chat(message())
    bad = [
        message(sampling=SamplingParams(max_tokens=10_000)),
        message(sampling=SamplingParams(temperature=-1)),
        message(model=MARK),
        pb.ChatRequest(messages=[pb.ChatMessage(role=MARK, content=[pb.ContentPart(text=MARK)])], request_id="mine"),
    ]
    for one in bad:
        with pytest.raises(grpc.aio.AioRpcError):
            await inference.Chat(one)
    said = texts(everything)
    assert MARK not in said
    assert said.count("request refused request_id='mine' message=ChatRequest") == len(bad)
    assert "request accepted request_id=mine" in said and "request ended request_id=mine" in said


async def test_serve_gets_no_prompt_to_log(core):
    """Its proxy logs the exceptions of calls, whose status is set before."""
    context = ServeContext()
    servicer = Servicer(core, NO_KEYS, 1000)
    turn = pb.ChatMessage(role=MARK, content=[pb.ContentPart(text=MARK)])
    with pytest.raises(Refused) as caught:
        await servicer.Chat(pb.ChatRequest(messages=[turn]), context)
    assert MARK not in "".join(traceback.format_exception(caught.value))
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT and MARK in context.details


async def test_prompts_are_logged_if_asked(asgi, core, everything):
    core.log_prompts = True
    await asgi.post("/v1/chat/completions", json=chat(MARK))
    (found,) = [record for record in everything.records if record.getMessage().startswith("prompt ")]
    assert MARK in found.getMessage() and found.levelno == logging.INFO


def test_only_herders_own_lines_are_for_debugging(everything):
    set_up_logs("DEBUG", "json")
    assert logging.getLogger("herder").isEnabledFor(logging.DEBUG)
    for library in ("PIL.PngImagePlugin", "urllib3.connectionpool", "grpc._cython.cygrpc"):
        assert not logging.getLogger(library).isEnabledFor(logging.DEBUG)
        assert logging.getLogger(library).isEnabledFor(logging.INFO)
    set_level("WARNING")
    assert not logging.getLogger("urllib3.connectionpool").isEnabledFor(logging.INFO)


def test_a_record_as_json():
    def line(message: str, *values: object) -> dict[str, object]:
        record = logging.LogRecord("herder", logging.INFO, "file", 1, message, values, None)
        found: dict[str, object] = json.loads(JsonFormatter().format(record))
        assert found.pop("time") and found.pop("level") == "INFO" and found.pop("logger") == "herder"
        return found

    assert line("request ended request_id=%s seconds=%.3f tokens=%d", "a", 0.1234567, 3) == {
        "event": "request ended",
        "request_id": "a",
        "seconds": 0.1234567,
        "tokens": 3,
    }
    assert line("%s loaded bytes=%d", "attention-0", 5) == {"event": "attention-0 loaded bytes=5"}
    assert line("no status") == {"event": "no status"}


def test_a_traceback_stays_on_the_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("herder", logging.ERROR, "file", 1, "failed request_id=%s", ("a",), info)
    written = JsonFormatter().format(record)
    assert "\n" not in written and "two\nlines" in json.loads(written)["traceback"]
