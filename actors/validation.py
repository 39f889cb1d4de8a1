"""From what a client sent to a Request, the same way and in the same words for both interfaces.

Everything here raises RequestRejected with a sentence that names the field.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.model_info import ModelInfo
from engine.request import ErrorCode, Request, RequestRejected, SamplingParams

MAX_STOP_STRINGS = 16
# Roles of a conversation, and how chat templates call them.
_ROLES: Mapping[str, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class ContextExceeded(RequestRejected):
    """The prompt, or prompt and answer together, are longer than the context."""

    def __reduce__(self) -> tuple[object, ...]:
        return _context_exceeded, (str(self), self.field)


def _context_exceeded(message: str, field: str | None) -> ContextExceeded:
    return ContextExceeded(message, field=field)


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Sampling as a client asks for it: None takes the default of the model or the interface.

    Fields are named as in SamplingParams; `skip_special_tokens` concerns the text only.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


def check_model(model: ModelInfo, name: str | None) -> None:
    """`name` is the served model's, or not given."""
    if name and name != model.name:
        raise RequestRejected(
            f"model {name[:128]!r} does not exist; this server has {model.name!r}",
            field="model",
            code=ErrorCode.NOT_FOUND,
        )


def template_role(role: str) -> str:
    """A message's role, as chat templates call it."""
    if role not in _ROLES:
        raise RequestRejected(
            f"messages: role must be system, developer, user or assistant, not {role[:64]!r}", field="messages"
        )
    return _ROLES[role]


def make_request_id(prefix: str, given: str | None) -> str:
    """The client's own request id, or a new one that begins with `prefix`."""
    if not given:
        return f"{prefix}{uuid.uuid4().hex}"
    if not _REQUEST_ID.fullmatch(given):
        raise RequestRejected(
            "request_id must be at most 128 letters, digits and _ . : - characters", field="request_id"
        )
    return given


def make_request(
    model: ModelInfo,
    request_id: str,
    prompt_token_ids: Sequence[int],
    options: SamplingOptions,
    default_max_tokens: int | None,
) -> Request:
    """The request for the engine. `default_max_tokens` None is the rest of the context."""
    if not prompt_token_ids:
        raise RequestRejected("prompt must not be empty", field="prompt")
    _check_token_ids(model, prompt_token_ids, "prompt")
    _check_token_ids(model, options.stop_token_ids, "stop_token_ids")
    if len(options.stop) > MAX_STOP_STRINGS:
        raise RequestRejected(f"stop must be at most {MAX_STOP_STRINGS} strings, not {len(options.stop)}", field="stop")
    params = SamplingParams(
        max_tokens=_max_tokens(model, len(prompt_token_ids), options.max_tokens, default_max_tokens),
        min_tokens=options.min_tokens or 0,
        temperature=model.temperature if options.temperature is None else options.temperature,
        top_p=model.top_p if options.top_p is None else options.top_p,
        top_k=model.top_k if options.top_k is None else 0 if options.top_k == -1 else options.top_k,
        min_p=options.min_p or 0.0,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_ids),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )
    return Request(request_id, tuple(prompt_token_ids), params, eos_token_ids=model.eos_token_ids)


def _check_token_ids(model: ModelInfo, token_ids: Sequence[int], field: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= model.vocab_size):
        index, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < model.vocab_size)
        raise RequestRejected(
            f"{field} has token id {bad} at position {index}, outside the vocabulary (0 to {model.vocab_size - 1})",
            field=field,
        )


def _max_tokens(model: ModelInfo, prompt_tokens: int, asked: int | None, default: int | None) -> int:
    room = model.max_context - prompt_tokens
    if room < 0 or (room == 0 and asked != 0):
        raise ContextExceeded(
            f"prompt has {prompt_tokens} tokens, which leaves no room for an answer in the model's context of "
            f"{model.max_context} tokens",
            field="prompt",
        )
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextExceeded(
            f"max_tokens is {asked} and the prompt has {prompt_tokens} tokens: together {asked + prompt_tokens}, more "
            f"than the model's context of {model.max_context} tokens",
            field="max_tokens",
        )
    return asked
