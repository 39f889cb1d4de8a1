"""The gRPC services (protos/herder/v1) over GatewayCore.

Methods take the context as `grpc_context`, by which name Ray Serve's proxy passes it; a plain grpc.aio server passes
its own by position. Nothing here imports ray.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import NoReturn, Protocol, TypeVar, runtime_checkable

import grpc

from actors.gateway_core import Delta, GatewayCore, Job
from actors.grpc_messages import actor_info, error_event, finish_reason, layer_experts, load, logprobs, usage
from actors.validation import SamplingOptions, check_model, make_request_id, template_role
from engine.request import RequestRejected
from herder.v1 import control_pb2, inference_pb2, types_pb2

_MAX_DETAILS = 1000  # characters; HTTP/2 trailers are small

GenerateInput = inference_pb2.GenerateRequest | inference_pb2.GenerateStreamRequest
ChatInput = inference_pb2.ChatRequest | inference_pb2.ChatStreamRequest
Answer = TypeVar("Answer", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)
Event = TypeVar("Event", inference_pb2.GenerateStreamResponse, inference_pb2.ChatStreamResponse)


class Context(Protocol):
    """Ray Serve's RayServegRPCContext: a status set on it before an exception is raised becomes the call's."""

    def set_code(self, code: grpc.StatusCode) -> None: ...

    def set_details(self, details: str) -> None: ...


@runtime_checkable
class AbortingContext(Protocol):
    """A grpc.aio server's own context, which ends a call by `abort`."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn: ...


@asynccontextmanager
async def _rejection_as_status(context: Context) -> AsyncIterator[None]:
    """A RequestRejected within ends the call with its code and sentence."""
    try:
        yield
    except RequestRejected as error:
        code, details = grpc.StatusCode[error.code.name], str(error)[:_MAX_DETAILS]
        if isinstance(context, AbortingContext):
            await context.abort(code, details)
        context.set_code(code)
        context.set_details(details)
        raise


class InferenceServicer:
    """herder.v1.InferenceService."""

    core: GatewayCore

    async def Generate(
        self, request: inference_pb2.GenerateRequest, grpc_context: Context
    ) -> inference_pb2.GenerateResponse:
        async with _rejection_as_status(grpc_context):
            job = await _generate_job(self.core, request)
            return await _answer(self.core, job, inference_pb2.GenerateResponse)

    async def GenerateStream(
        self, request: inference_pb2.GenerateStreamRequest, grpc_context: Context
    ) -> AsyncGenerator[inference_pb2.GenerateStreamResponse, None]:
        async with _rejection_as_status(grpc_context):
            job = await _generate_job(self.core, request)
            async with aclosing(_events(self.core, job, inference_pb2.GenerateStreamResponse)) as events:
                async for event in events:
                    yield event

    async def Chat(self, request: inference_pb2.ChatRequest, grpc_context: Context) -> inference_pb2.ChatResponse:
        async with _rejection_as_status(grpc_context):
            job = await _chat_job(self.core, request)
            return await _answer(self.core, job, inference_pb2.ChatResponse)

    async def ChatStream(
        self, request: inference_pb2.ChatStreamRequest, grpc_context: Context
    ) -> AsyncGenerator[inference_pb2.ChatStreamResponse, None]:
        async with _rejection_as_status(grpc_context):
            job = await _chat_job(self.core, request)
            async with aclosing(_events(self.core, job, inference_pb2.ChatStreamResponse)) as events:
                async for event in events:
                    yield event

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, grpc_context: Context
    ) -> inference_pb2.TokenizeResponse:
        async with _rejection_as_status(grpc_context):
            check_model(self.core.model, request.model)
            if request.WhichOneof("input") == "text":
                special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                token_ids = await self.core.encode(request.text, special, field="text")
            elif request.WhichOneof("input") == "chat":
                token_ids = await self.core.encode_chat(_messages(request.chat.messages))
            else:
                raise RequestRejected("input must be text or chat", field="input")
            return inference_pb2.TokenizeResponse(token_ids=token_ids, max_context=self.core.model.max_context)


class ControlServicer:
    """herder.v1.ControlService."""

    core: GatewayCore

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, grpc_context: Context
    ) -> control_pb2.GetServerInfoResponse:
        async with _rejection_as_status(grpc_context):
            status = await self.core.status()
            return control_pb2.GetServerInfoResponse(
                version=self.core.version,
                ready=status.ready,
                reason=status.reason,
                epoch=status.epoch,
                actors=map(actor_info, status.actors),
            )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, grpc_context: Context
    ) -> control_pb2.GetModelInfoResponse:
        model, tokenizer = self.core.model, self.core.tokenizer
        return control_pb2.GetModelInfoResponse(
            name=model.name,
            max_context=model.max_context,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_tokenizer=tokenizer is not None,
            has_chat_template=tokenizer is not None and tokenizer.has_chat_template,
        )

    async def GetLoad(self, request: control_pb2.GetLoadRequest, grpc_context: Context) -> control_pb2.GetLoadResponse:
        async with _rejection_as_status(grpc_context):
            engines = (await self.core.status()).engines
            return control_pb2.GetLoadResponse(engines=[load(name, engines[name]) for name in sorted(engines)])

    async def GetExpertPlacement(
        self, request: control_pb2.GetExpertPlacementRequest, grpc_context: Context
    ) -> control_pb2.GetExpertPlacementResponse:
        async with _rejection_as_status(grpc_context):
            status = await self.core.status()
            layers = [
                layer_experts(layer, slots, status.expert_tokens.get(layer, ()))
                for layer, slots in sorted(status.placement.items())
            ]
            return control_pb2.GetExpertPlacementResponse(epoch=status.epoch, layers=layers)

    async def Abort(self, request: control_pb2.AbortRequest, grpc_context: Context) -> control_pb2.AbortResponse:
        async with _rejection_as_status(grpc_context):
            return control_pb2.AbortResponse(aborted=await self.core.abort(request.request_ids))


async def _generate_job(core: GatewayCore, request: GenerateInput) -> Job:
    check_model(core.model, request.model)
    match request.WhichOneof("prompt"):
        case "text":
            token_ids: Sequence[int] = await core.encode(request.text)
        case "token_ids":
            token_ids = request.token_ids.ids
        case _:
            raise RequestRejected("prompt must be text or token_ids", field="prompt")
    return core.accept(make_request_id("cmpl-", request.request_id), token_ids, _options(request.sampling))


async def _chat_job(core: GatewayCore, request: ChatInput) -> Job:
    check_model(core.model, request.model)
    token_ids = await core.encode_chat(_messages(request.messages))
    return core.accept(make_request_id("chatcmpl-", request.request_id), token_ids, _options(request.sampling))


def _messages(messages: Iterable[inference_pb2.ChatMessage]) -> list[Mapping[str, str]]:
    found: list[Mapping[str, str]] = []
    for message in messages:
        if any(part.WhichOneof("part") is None for part in message.content):
            raise RequestRejected("messages: a content part must have a text", field="messages")
        content = "".join(part.text for part in message.content)
        found.append({"role": template_role(message.role), "content": content})
    return found


def _options(sampling: types_pb2.SamplingParams) -> SamplingOptions:
    has = sampling.HasField
    return SamplingOptions(
        max_tokens=sampling.max_tokens if has("max_tokens") else None,
        min_tokens=sampling.min_tokens if has("min_tokens") else None,
        temperature=sampling.temperature if has("temperature") else None,
        top_p=sampling.top_p if has("top_p") else None,
        top_k=sampling.top_k if has("top_k") else None,
        min_p=sampling.min_p if has("min_p") else None,
        seed=sampling.seed if has("seed") else None,
        ignore_eos=sampling.ignore_eos,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs if has("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if has("prompt_logprobs") else None,
        skip_special_tokens=sampling.skip_special_tokens if has("skip_special_tokens") else True,
    )


async def _answer(core: GatewayCore, job: Job, response: type[Answer]) -> Answer:
    """The whole answer. A failure is raised, to become the call's status."""
    delta = await core.complete(job)
    if delta.error is not None:
        raise RequestRejected(delta.error.message, code=delta.error.code)
    return response(
        request_id=job.request.request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=logprobs(delta.token_ids, delta.logprobs),
        prompt_logprobs=logprobs(job.request.prompt_token_ids, delta.prompt_logprobs),
        finish_reason=finish_reason(delta.finish_reason),
        usage=usage(job, len(delta.token_ids)),
    )


async def _events(core: GatewayCore, job: Job, response: type[Event]) -> AsyncGenerator[Event, None]:
    request_id = job.request.request_id
    generated = 0
    first = True
    async with aclosing(core.generate(job)) as deltas:
        async for delta in deltas:
            generated += len(delta.token_ids)
            if first:
                yield response(request_id=request_id, prompt=_prompt_event(job, delta))
                first = False
            if delta.text or delta.token_ids:
                tokens = inference_pb2.TokensEvent(
                    text=delta.text, token_ids=delta.token_ids, logprobs=logprobs(delta.token_ids, delta.logprobs)
                )
                yield response(request_id=request_id, tokens=tokens)
            if delta.error is not None:
                yield response(request_id=request_id, error=error_event(delta.error))
            elif delta.finish_reason is not None:
                finished = inference_pb2.FinishedEvent(
                    finish_reason=finish_reason(delta.finish_reason), usage=usage(job, generated)
                )
                yield response(request_id=request_id, finished=finished)


def _prompt_event(job: Job, delta: Delta) -> inference_pb2.PromptEvent:
    prompt = job.request.prompt_token_ids
    return inference_pb2.PromptEvent(prompt_tokens=len(prompt), prompt_logprobs=logprobs(prompt, delta.prompt_logprobs))
