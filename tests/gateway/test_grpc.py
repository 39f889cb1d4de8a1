"""The gRPC interface on a plain grpc.aio server, and what Ray Serve's proxy needs of it."""

from __future__ import annotations

import asyncio
import inspect

import grpc
import pytest

from actors.grpc_api import ControlServicer, InferenceServicer
from actors.status import ClusterStatus
from engine.request import ErrorCode, RequestError, RequestRejected
from engine.tokenizer import Tokenizer
from herder.v1 import control_pb2, inference_pb2, types_pb2
from herder.v1 import inference_pb2 as pb
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from herder.v1.types_pb2 import SamplingParams, TokenIds
from tests.gateway.fakes import MAX_CONTEXT, MODEL, VOCAB_SIZE, FakeEngine, logprob


async def test_generate(inference: InferenceServiceStub, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(logprobs=1, prompt_logprobs=0, temperature=0.0, seed=5)
    answer = await inference.Generate(pb.GenerateRequest(model=MODEL, text="Hi", sampling=sampling, request_id="me"))
    (choice,) = answer.choices
    assert (answer.request_id, choice.text) == ("me", "Hello wörld")
    assert choice.finish_reason == types_pb2.FINISH_REASON_STOP
    assert tuple(choice.token_ids) == engine.answer
    first = logprob(engine.answer[0], 1)
    assert (choice.logprobs[0].token_id, choice.logprobs[0].logprob) == (first.token_id, first.logprob)
    assert [(top.token_id, top.logprob) for top in choice.logprobs[0].top] == list(first.top)
    assert [entry.token_id for entry in answer.prompt_logprobs] == tokenizer.encode("Hi")
    assert [entry.HasField("logprob") for entry in answer.prompt_logprobs] == [False, True, True]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, len(engine.answer))
    params = engine.requests[0].params
    assert (params.temperature, params.seed, params.max_tokens) == (0.0, 5, MAX_CONTEXT - 3)


async def test_generate_stream(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    request = pb.GenerateStreamRequest(token_ids=TokenIds(ids=[1, 2]), sampling=SamplingParams(logprobs=0))
    events = [event async for event in inference.GenerateStream(request)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["prompt", *["tokens"] * (len(events) - 2), "finished"]
    assert {event.request_id for event in events} == {engine.requests[0].request_id}
    assert events[0].prompt.prompt_tokens == 2
    assert "".join(event.tokens.text for event in events) == "Hello wörld"
    assert [i for event in events for i in event.tokens.token_ids] == list(engine.answer)
    assert [entry.token_id for event in events for entry in event.tokens.logprobs] == list(engine.answer)
    assert events[-1].finished.finish_reason == types_pb2.FINISH_REASON_STOP
    assert events[-1].finished.usage.total_tokens == 2 + len(engine.answer)


async def test_chat(inference: InferenceServiceStub, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    messages = [pb.ChatMessage(role="user", content=[pb.ContentPart(text="H"), pb.ContentPart(text="i")])]
    answer = await inference.Chat(pb.ChatRequest(messages=messages, sampling=SamplingParams(stop=["wö"])))
    assert (answer.request_id[:9], answer.choices[0].text) == ("chatcmpl-", "Hello ")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert engine.requests[0].prompt_token_ids == tuple(prompt)
    stream = inference.ChatStream(pb.ChatStreamRequest(messages=messages))
    assert "".join([event.tokens.text async for event in stream]) == "Hello wörld"
    tokenized = await inference.Tokenize(pb.TokenizeRequest(chat=pb.Conversation(messages=messages)))
    assert list(tokenized.token_ids) == prompt


async def test_tokenize(inference: InferenceServiceStub, tokenizer: Tokenizer) -> None:
    answer = await inference.Tokenize(pb.TokenizeRequest(text="Hi"))
    assert (list(answer.token_ids), answer.max_context) == (tokenizer.encode("Hi"), MAX_CONTEXT)
    answer = await inference.Tokenize(pb.TokenizeRequest(text="Hi", add_special_tokens=False))
    assert list(answer.token_ids) == tokenizer.encode("Hi", add_special_tokens=False)


async def test_control(control: ControlServiceStub, tokenizer: Tokenizer) -> None:
    server = await control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (server.version, server.ready, server.epoch, server.actors[0].name) == ("1.2.3", True, 3, "attention-0")
    assert (server.actors[0].role, server.actors[0].pid) == (control_pb2.ACTOR_ROLE_ATTENTION, 7)
    model = await control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert (model.name, model.max_context, model.vocab_size) == (MODEL, MAX_CONTEXT, VOCAB_SIZE)
    assert (tuple(model.eos_token_ids), model.has_tokenizer, model.has_chat_template) == (
        tokenizer.eos_token_ids,
        True,
        True,
    )
    load = await control.GetLoad(control_pb2.GetLoadRequest())
    assert (load.engines[0].actor, load.engines[0].running, load.engines[0].kv_pages[0].used) == ("attention-0", 1, 2)
    placement = await control.GetExpertPlacement(control_pb2.GetExpertPlacementRequest())
    experts = placement.layers[0].experts
    assert (placement.epoch, placement.layers[0].layer) == (3, 1)
    assert [(e.expert, list(e.slots), e.tokens) for e in experts] == [(0, [0], 5), (1, [0, 1], 6)]


async def test_control_without_a_controller(
    control: ControlServiceStub, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "status", lambda: 1 / 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await control.GetLoad(control_pb2.GetLoadRequest())
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "the controller does not answer",
    )


async def test_status_not_ready(control: ControlServiceStub, engine: FakeEngine) -> None:
    engine.cluster = ClusterStatus(ready=False, reason="expert-1 is loading")
    server = await control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (server.ready, server.reason) == (False, "expert-1 is loading")


async def test_abort(inference: InferenceServiceStub, control: ControlServiceStub, engine: FakeEngine) -> None:
    engine.delay = 0.01
    call = inference.GenerateStream(
        pb.GenerateStreamRequest(text="Hi", request_id="x", sampling=SamplingParams(ignore_eos=True))
    )
    events = aiter(call)
    await anext(events)
    aborted = await control.Abort(control_pb2.AbortRequest(request_ids=["x", "unknown"]))
    assert aborted.aborted == 1
    assert [event async for event in events][-1].finished.finish_reason == types_pb2.FINISH_REASON_ABORT


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_aborts(
    inference: InferenceServiceStub, engine: FakeEngine, stream: bool
) -> None:
    engine.delay = 0.02
    sampling = SamplingParams(ignore_eos=True)
    if stream:
        call = inference.GenerateStream(pb.GenerateStreamRequest(text="Hi", sampling=sampling))
        await anext(aiter(call))
    else:
        call = inference.Generate(pb.GenerateRequest(text="Hi", sampling=sampling))
        while not engine.running:
            await asyncio.sleep(0.01)
    call.cancel()
    async with asyncio.timeout(1):
        while engine.running:
            await asyncio.sleep(0.01)
    assert engine.closed_early == [engine.requests[0].request_id]


async def test_failure_after_acceptance(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    engine.failure = RequestError(ErrorCode.UNAVAILABLE, "attention-0 died", retryable=True)
    engine.fail_after = 2
    events = [event async for event in inference.GenerateStream(pb.GenerateStreamRequest(text="Hi"))]
    assert "".join(event.tokens.text for event in events) == "Hello"
    assert events[-1].error == inference_pb2.ErrorEvent(
        code=types_pb2.ERROR_CODE_UNAVAILABLE, message="attention-0 died", retryable=True
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.Generate(pb.GenerateRequest(text="Hi"))
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "attention-0 died")


async def test_not_admitted(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    engine.rejection = RequestRejected("the queue is full", code=ErrorCode.RESOURCE_EXHAUSTED)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in inference.GenerateStream(pb.GenerateStreamRequest(text="Hi")):
            pass
    assert (caught.value.code(), caught.value.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
    )


async def test_without_a_tokenizer(bare_channel: grpc.aio.Channel, engine: FakeEngine) -> None:
    inference = InferenceServiceStub(bare_channel)
    answer = await inference.Generate(pb.GenerateRequest(token_ids=TokenIds(ids=[1, 2])))
    assert (answer.choices[0].text, tuple(answer.choices[0].token_ids)) == ("", engine.answer)
    events = [e async for e in inference.GenerateStream(pb.GenerateStreamRequest(token_ids=TokenIds(ids=[1])))]
    assert [i for event in events for i in event.tokens.token_ids] == list(engine.answer)
    message = pb.ChatMessage(role="user", content=[pb.ContentPart(text="Hi")])
    for call, field in [
        (inference.Generate(pb.GenerateRequest(text="Hi")), "prompt"),
        (inference.Chat(pb.ChatRequest(messages=[message])), "messages"),
        (inference.Tokenize(pb.TokenizeRequest(text="Hi")), "text"),
    ]:
        with pytest.raises(grpc.aio.AioRpcError, match="no tokenizer") as caught:
            await call
        assert caught.value.details().startswith(field)
    model = await ControlServiceStub(bare_channel).GetModelInfo(control_pb2.GetModelInfoRequest())
    assert not model.has_tokenizer


def test_every_rpc_is_there_as_serve_calls_it() -> None:
    """Serve finds the method by the RPC's name alone, and passes the context by the name grpc_context."""
    names = []
    for servicer, proto in ((InferenceServicer, inference_pb2), (ControlServicer, control_pb2)):
        (service,) = proto.DESCRIPTOR.services_by_name.values()
        for method in service.methods:
            function = getattr(servicer, method.name)
            assert list(inspect.signature(function).parameters) == ["self", "request", "grpc_context"]
            assert inspect.isasyncgenfunction(function) == method.server_streaming
            names.append(method.name)
    assert len(set(names)) == len(names) == 17
