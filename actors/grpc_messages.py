"""Plain data as messages of protos/herder/v1."""

from __future__ import annotations

from collections.abc import Sequence

from actors.answers import Delta, Job, UsageCount
from actors.status import ActorStatus, ClusterStatus
from actors.tool_use import CallEvent, join_calls
from engine.request import EngineLoad, RequestError, TokenLogprob
from engine.tools import CallStart
from herder.v1 import control_pb2, inference_pb2, types_pb2

_ROLES = {
    "attention": control_pb2.ACTOR_ROLE_ATTENTION,
    "expert": control_pb2.ACTOR_ROLE_EXPERT,
    "controller": control_pb2.ACTOR_ROLE_CONTROLLER,
}
_BALANCE_MODES = {
    "off": control_pb2.BALANCE_MODE_OFF,
    "manual": control_pb2.BALANCE_MODE_MANUAL,
    "auto": control_pb2.BALANCE_MODE_AUTO,
}


def logprobs(token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> list[types_pb2.TokenLogprob]:
    """One message per entry; none when there are no entries."""
    if not entries:
        return []
    return [_logprob(token_id, entry) for token_id, entry in zip(token_ids, entries, strict=True)]


def _logprob(token_id: int, entry: TokenLogprob | None) -> types_pb2.TokenLogprob:
    if entry is None:
        return types_pb2.TokenLogprob(token_id=token_id)
    top = [types_pb2.TopLogprob(token_id=other, logprob=logprob) for other, logprob in entry.top]
    return types_pb2.TokenLogprob(token_id=token_id, logprob=entry.logprob, top=top)


def choice(index: int, answer: Delta) -> inference_pb2.Choice:
    """A whole answer."""
    calls = [
        inference_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
        for call in join_calls(answer.calls)
    ]
    return inference_pb2.Choice(
        index=index,
        text=answer.text,
        token_ids=answer.token_ids,
        logprobs=logprobs(answer.token_ids, answer.logprobs),
        finish_reason=finish_reason(answer.finish_reason),
        tool_calls=calls,
    )


def prompt_event(job: Job, first: Delta) -> inference_pb2.PromptEvent:
    prompt = job.request.prompt_token_ids
    return inference_pb2.PromptEvent(
        prompt_tokens=len(prompt),
        prompt_logprobs=logprobs(prompt, first.prompt_logprobs),
        cached_tokens=first.cached_tokens,
    )


def tokens_event(piece: Delta) -> inference_pb2.TokensEvent:
    return inference_pb2.TokensEvent(
        text=piece.text,
        token_ids=piece.token_ids,
        logprobs=logprobs(piece.token_ids, piece.logprobs),
        tool_calls=map(_call_delta, piece.calls),
    )


def _call_delta(event: CallEvent) -> inference_pb2.ToolCallDelta:
    if isinstance(event, CallStart):
        return inference_pb2.ToolCallDelta(index=event.index, id=event.id, name=event.name)
    return inference_pb2.ToolCallDelta(index=event.index, arguments=event.text)


def finished_event(piece: Delta, count: UsageCount) -> inference_pb2.FinishedEvent:
    return inference_pb2.FinishedEvent(finish_reason=finish_reason(piece.finish_reason), usage=usage(count))


def usage(count: UsageCount) -> types_pb2.Usage:
    return types_pb2.Usage(
        prompt_tokens=count.prompt_tokens,
        completion_tokens=count.completion_tokens,
        total_tokens=count.prompt_tokens + count.completion_tokens,
        cached_tokens=count.cached_tokens,
    )


def finish_reason(reason: str | None) -> types_pb2.FinishReason.ValueType:
    return types_pb2.FinishReason.Value(f"FINISH_REASON_{'UNSPECIFIED' if reason is None else reason.upper()}")


def error_event(error: RequestError) -> inference_pb2.ErrorEvent:
    code = types_pb2.ErrorCode.Value(f"ERROR_CODE_{error.code.name}")
    return inference_pb2.ErrorEvent(code=code, message=error.message, retryable=error.retryable)


def actor_info(actor: ActorStatus) -> control_pb2.ActorInfo:
    return control_pb2.ActorInfo(
        name=actor.name,
        role=_ROLES[actor.role],
        index=actor.rank_or_slot,
        node_id=actor.node_id,
        node_ip=actor.node_ip,
        pid=actor.pid,
        state=actor.state,
        device=actor.device,
        loaded_bytes=actor.loaded_bytes,
        rss_bytes=actor.rss_bytes,
    )


def load(actor: str, engine: EngineLoad) -> control_pb2.EngineLoad:
    pages = [
        control_pb2.KvPages(
            layer_kind=kind,
            used=engine.kv_pages_used.get(kind, 0),
            total=total,
            cached=engine.kv_pages_cached.get(kind, 0),
        )
        for kind, total in sorted(engine.kv_pages_total.items())
    ]
    return control_pb2.EngineLoad(
        actor=actor,
        waiting=engine.waiting,
        running=engine.running,
        steps=engine.steps,
        prompt_tokens=engine.prompt_tokens,
        generated_tokens=engine.generated_tokens,
        tokens_per_second=engine.tokens_per_second,
        kv_pages=pages,
        cached_prompt_tokens=engine.cached_prompt_tokens,
        preemptions=engine.preemptions,
        parked=engine.parked,
    )


def expert_placement(status: ClusterStatus) -> control_pb2.GetExpertPlacementResponse:
    return control_pb2.GetExpertPlacementResponse(
        epoch=status.epoch,
        layers=[
            _layer_experts(layer, slots, status.expert_tokens.get(layer, ()))
            for layer, slots in sorted(status.placement.items())
        ],
        balancedness=status.balancedness,
        balancedness_before=status.balancedness_before,
        seconds_since_move=status.seconds_since_move,
        balance_mode=_BALANCE_MODES[status.balance_mode],
    )


def _layer_experts(layer: int, slots: Sequence[Sequence[int]], tokens: Sequence[int]) -> control_pb2.LayerExperts:
    """One layer; `slots` and `tokens` (which may be empty) are by expert."""
    experts = [
        control_pb2.ExpertPlacement(expert=expert, slots=held, tokens=tokens[expert] if tokens else 0)
        for expert, held in enumerate(slots)
    ]
    return control_pb2.LayerExperts(layer=layer, experts=experts)
