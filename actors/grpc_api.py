"""The gRPC services (protos/herder/v1) over GatewayCore.

Methods take the context as `grpc_context`, by which name Ray Serve's proxy passes it; a plain grpc.aio server passes
its own by position. Nothing here imports ray.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from google.protobuf.message import Message

from actors import grpc_messages as messages
from actors.answers import Delta, Job, UsageCount, join
from actors.api_keys import NO_KEYS, ApiKeys
from actors.gateway_core import GatewayCore
from actors.grpc_errors import Context, admitted, deadline
from actors.grpc_requests import conversation, options, tool_use
from actors.image_prompt import Prompt
from actors.merge import merge
from actors.validation import check_model, is_retryable, make_request_id
from engine.request import ErrorCode, RequestError, RequestRejected
from herder.v1 import control_pb2, inference_pb2

log = logging.getLogger("herder")

GenerateInput = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
ChatInput = inference_pb2.ChatRequest | inference_pb2.ChatStreamRequest
Answer = TypeVar("Answer", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)
Event = TypeVar("Event", inference_pb2.GenerateStreamResponse, inference_pb2.ChatStreamResponse)


class Refused(Exception):
    """A call that has its status. Serve logs what is raised, and a RequestRejected may quote what was asked."""


class Servicer:
    """What both services stand on. Without keys, everybody is let in."""

    core: GatewayCore
    keys: ApiKeys = NO_KEYS
    max_message_bytes: int = 16 * 2**20

    @asynccontextmanager
    async def admit(self, request: Message, context: Context, operation: str | None = None) -> AsyncIterator[None]:
        """Lets a call in. One that asks the model names its `operation`, and gets a span if traces are on."""
        tracing = self.core.tracing
        try:
            async with admitted(request, context, self.keys, self.max_message_bytes):
                try:
                    if tracing is None or operation is None:
                        yield
                    else:
                        with tracing.request(operation, self.core.model.name, _headers(context)):
                            yield
                except RequestRejected as error:
                    request_id = getattr(request, "request_id", None)
                    kind = request.DESCRIPTOR.name
                    log.info("request refused request_id=%.128r message=%s code=%s", request_id, kind, error.code)
                    raise
        except RequestRejected as error:
            raise Refused(error.code) from None


class InferenceServicer(Servicer):
    """herder.v1.InferenceService."""

    async def Generate(
        self, request: inference_pb2.GenerateRequest, grpc_context: Context
    ) -> inference_pb2.GenerateResponse:
        async with self.admit(request, grpc_context, "text_completion"):
            jobs = await _generate_jobs(self.core, request, grpc_context)
            return await _answer(self.core, jobs, inference_pb2.GenerateResponse)

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, grpc_context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        async with self.admit(request, grpc_context, "text_completion"):
            jobs = await _generate_jobs(self.core, request, grpc_context)
            async with aclosing(_events(self.core, jobs, inference_pb2.GenerateStreamResponse)) as events:
                async for event in events:
                    yield event

    async def Chat(self, request: inference_pb2.ChatRequest, grpc_context: Context) -> inference_pb2.ChatResponse:
        async with self.admit(request, grpc_context, "chat"):
            jobs = await _chat_jobs(self.core, request, grpc_context)
            return await _answer(self.core, jobs, inference_pb2.ChatResponse)

    async def ChatStream(
        self, request: inference_pb2.ChatStreamRequest, grpc_context: Context
    ) -> AsyncGenerator[inference_pb2.ChatStreamResponse, None]:
        async with self.admit(request, grpc_context, "chat"):
            jobs = await _chat_jobs(self.core, request, grpc_context)
            async with aclosing(_events(self.core, jobs, inference_pb2.ChatStreamResponse)) as events:
                async for event in events:
                    yield event

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, grpc_context: Context
    ) -> inference_pb2.TokenizeResponse:
        async with self.admit(request, grpc_context):
            check_model(self.core.model, request.model)
            if request.WhichOneof("input") == "text":
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                token_ids: Sequence[int] = await self.core.encode(request.text, special, field="text")
            elif request.WhichOneof("input") == "chat":
                chat = request.chat
                token_ids = (await self.core.encode_chat(conversation(chat.messages), tool_use(chat.tools))).token_ids
            else:
                raise RequestRejected("input must be text or chat", field="input")
            return inference_pb2.TokenizeResponse(token_ids=token_ids, max_context=self.core.model.max_context)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, grpc_context: Context
    ) -> inference_pb2.DetokenizeResponse:
        async with self.admit(request, grpc_context):
            check_model(self.core.model, request.model)
            return inference_pb2.DetokenizeResponse(text=self.core.decode(request.token_ids, "token_ids"))


class ControlServicer(Servicer):
    """herder.v1.ControlService."""

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, grpc_context: Context
    ) -> control_pb2.GetServerInfoResponse:
        async with self.admit(request, grpc_context):
            status = await self.core.status()
            return control_pb2.GetServerInfoResponse(
                version=self.core.version,
                ready=status.ready,
                reason=status.reason,
                epoch=status.epoch,
                actors=map(messages.actor_info, status.actors),
                failovers=status.failovers,
            )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, grpc_context: Context
    ) -> control_pb2.GetModelInfoResponse:
        async with self.admit(request, grpc_context):
            model, tokenizer = self.core.model, self.core.tokenizer
            return control_pb2.GetModelInfoResponse(
                name=model.name,
                max_context=model.max_context,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                has_tokenizer=tokenizer is not None,
                has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
                takes_images=self.core.images is not None,
            )

    async def GetLoad(self, request: control_pb2.GetLoadRequest, grpc_context: Context) -> control_pb2.GetLoadResponse:
        async with self.admit(request, grpc_context):
            engines = (await self.core.status()).engines
            loads = [messages.load(name, engines[name]) for name in sorted(engines)]
            return control_pb2.GetLoadResponse(engines=loads)

    async def GetExpertPlacement(
        self, request: control_pb2.GetExpertPlacementRequest, grpc_context: Context
    ) -> control_pb2.GetExpertPlacementResponse:
        async with self.admit(request, grpc_context):
            return messages.expert_placement(await self.core.status())

    async def Abort(self, request: control_pb2.AbortRequest, grpc_context: Context) -> control_pb2.AbortResponse:
        async with self.admit(request, grpc_context):
            return control_pb2.AbortResponse(aborted=await self.core.abort(request.request_ids))

    async def Drain(self, request: control_pb2.DrainRequest, grpc_context: Context) -> control_pb2.DrainResponse:
        async with self.admit(request, grpc_context):
            return control_pb2.DrainResponse(remaining=await self.core.drain())

    async def ScaleExperts(
        self, request: control_pb2.ScaleExpertsRequest, grpc_context: Context
    ) -> control_pb2.ScaleExpertsResponse:
        async with self.change(request, grpc_context):
            await self.core.engine.scale("experts", request.actors)
            return control_pb2.ScaleExpertsResponse()

    async def ScaleAttention(
        self, request: control_pb2.ScaleAttentionRequest, grpc_context: Context
    ) -> control_pb2.ScaleAttentionResponse:
        async with self.change(request, grpc_context):
            await self.core.engine.scale("attention", request.actors)
            return control_pb2.ScaleAttentionResponse()

    async def MoveExpert(
        self, request: control_pb2.MoveExpertRequest, grpc_context: Context
    ) -> control_pb2.MoveExpertResponse:
        async with self.change(request, grpc_context):
            layer = request.layer if request.HasField("layer") else None
            from_slot = request.from_slot if request.HasField("from_slot") else None
            await self.core.engine.move(request.expert, request.to_slot, layer, from_slot)
            return control_pb2.MoveExpertResponse()

    async def DrainSlot(
        self, request: control_pb2.DrainSlotRequest, grpc_context: Context
    ) -> control_pb2.DrainSlotResponse:
        async with self.change(request, grpc_context):
            await self.core.engine.drain_slot(request.slot)
            return control_pb2.DrainSlotResponse()

    async def Rebalance(
        self, request: control_pb2.RebalanceRequest, grpc_context: Context
    ) -> control_pb2.RebalanceResponse:
        async with self.change(request, grpc_context):
            return control_pb2.RebalanceResponse(moved=await self.core.engine.rebalance())

    @asynccontextmanager
    async def change(self, request: Message, context: Context) -> AsyncIterator[None]:
        """Lets a call in that changes the deployment. What keeps the controller from answering makes it UNAVAILABLE."""
        async with self.admit(request, context):
            try:
                yield
            except RequestRejected:
                raise
            except Exception as error:
                log.exception("no change")
                raise RequestRejected("the controller does not answer", code=ErrorCode.UNAVAILABLE) from error


def _headers(context: Context) -> dict[str, str]:
    return {name.lower(): value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


async def _generate_jobs(core: GatewayCore, request: GenerateInput, context: Context) -> list[Job]:
    check_model(core.model, request.model)
    wanted = options(request.sampling, request.options, _deadline(request.options, context))
    match request.WhichOneof("prompt"):
        case "text":
            token_ids: Sequence[int] = await core.encode(request.text)
        case "token_ids":
            token_ids = request.token_ids.ids
        case _:
            raise RequestRejected("prompt must be text or token_ids", field="prompt")
    return await core.accept(make_request_id("cmpl-", request.request_id), [Prompt(token_ids)], wanted)


async def _chat_jobs(core: GatewayCore, request: ChatInput, context: Context) -> list[Job]:
    check_model(core.model, request.model)
    wanted = options(request.sampling, request.options, _deadline(request.options, context))
    tools = tool_use(request.tools)
    prompt = await core.encode_chat(conversation(request.messages), tools, wanted.deadline)
    return await core.accept(make_request_id("chatcmpl-", request.request_id), [prompt], wanted, tools=tools)


def _deadline(asked: inference_pb2.RequestOptions, context: Context) -> float | None:
    return deadline(context, asked.timeout_s if asked.HasField("timeout_s") else None)


def _name(jobs: Sequence[Job]) -> str:
    """The request's id, without the index of an answer."""
    request_id = jobs[0].request.request_id
    return request_id if len(jobs) == 1 else request_id.removesuffix("-0")


async def _answer(core: GatewayCore, jobs: Sequence[Job], response: type[Answer]) -> Answer:
    """The whole answers. A failure is raised, to become the call's status."""
    pieces: list[list[Delta]] = [[] for _ in jobs]
    count = UsageCount(jobs)
    async with aclosing(merge([core.generate(job) for job in jobs])) as merged:
        async for index, piece in merged:
            if piece.error is not None:
                raise RequestRejected(piece.error.message, code=piece.error.code)
            count.add(index, piece)
            pieces[index].append(piece)
    answers = [join(found) for found in pieces]
    return response(
        request_id=_name(jobs),
        choices=[messages.choice(index, answer) for index, answer in enumerate(answers)],
        prompt_logprobs=messages.logprobs(jobs[0].request.prompt_token_ids, answers[0].prompt_logprobs),
        usage=messages.usage(count),
    )


async def _events(core: GatewayCore, jobs: Sequence[Job], response: type[Event]) -> AsyncGenerator[Event, None]:
    request_id, count, first = _name(jobs), UsageCount(jobs), True
    async with aclosing(merge([core.generate(job) for job in jobs])) as merged:
        try:
            async for index, piece in merged:
                count.add(index, piece)
                if first:
                    yield response(request_id=request_id, prompt=messages.prompt_event(jobs[index], piece))
                    first = False
                if piece.text or piece.token_ids or piece.calls:
                    yield response(request_id=request_id, index=index, tokens=messages.tokens_event(piece))
                if piece.error is not None:
                    yield response(request_id=request_id, error=messages.error_event(piece.error))
                    return
                if piece.finish_reason is not None:
                    finished = messages.finished_event(piece, count)
                    yield response(request_id=request_id, index=index, finished=finished)
        except RequestRejected as error:
            if first:
                raise
            late = RequestError(error.code, str(error), retryable=is_retryable(error))
            yield response(request_id=request_id, error=messages.error_event(late))
