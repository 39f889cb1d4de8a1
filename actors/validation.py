"""From what a client sent to a Request, the same way and in the same words for both interfaces.

Everything here raises RequestRejected with a sentence that names the field.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.model_info import ModelInfo
from engine.request import ErrorCode, Grammar, PromptImage, Request, RequestError, RequestRejected, SamplingParams

MAX_STOP_STRINGS = 16
MAX_CHOICES = 16
# Roles of a conversation, and how chat templates call them.
_ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class ContextExceeded(RequestRejected):
    """The prompt, or prompt and answer together, are longer than the context."""

    def __reduce__(self) -> tuple[object, ...]:
        return _context_exceeded, (str(self), self.field)


def _context_exceeded(message: str, field: str | None) -> ContextExceeded:
    return ContextExceeded(message, field=field)


@dataclass(frozen=True, slots=True)
class Options:
    """What a client asks for beside its prompt: None takes the default of the model or the interface.

    Sampling fields are named as in SamplingParams, the others as in Request. `n` is how many answers to give;
    `skip_special_tokens` concerns the text only.
    """

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None  # Unix seconds

    @property
    def choices(self) -> int:
        """How many answers. Raises RequestRejected."""
        found = 1 if self.n is None else self.n
        if not 1 <= found <= MAX_CHOICES:
            raise RequestRejected(f"n must be between 1 and {MAX_CHOICES}, not {found}", field="n")
        return found


def is_retryable(error: RequestRejected | RequestError) -> bool:
    """Whether the same request may succeed when it is sent again."""
    if isinstance(error, RequestError):
        return error.retryable
    return error.code in (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE)


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
            f"messages: role must be system, developer, user, assistant or tool, not {role[:64]!r}", field="messages"
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


def deadline_after(timeout_s: float | None, now: float, field: str = "timeout_s") -> float | None:
    """The time, in Unix seconds, by which a request has to be finished; `now` likewise."""
    if timeout_s is None:
        return None
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise RequestRejected(f"{field} must be a number of seconds above 0, not {timeout_s}", field=field)
    return now + timeout_s


def json_value(text: str, field: str) -> object:
    """What a JSON text holds."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestRejected(f"{field} is not valid JSON: {error}", field=field) from None
    check_text(found, field, field)
    return found


def check_text(value: object, what: str, field: str | None = None) -> None:
    """All strings within can be written as UTF-8.

    JSON's escapes can write half of a surrogate pair, which neither tokenizers nor answers can hold.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestRejected(f"{what} has half of a surrogate pair, which is no character", field=field) from None


def json_text(value: object) -> str:
    """The JSON text of a value that came as JSON: what follows does not depend on how the client spaced it."""
    return json.dumps(value, separators=(",", ":"))


def make_request(
    model: ModelInfo,
    request_id: str,
    prompt_token_ids: Sequence[int],
    options: Options,
    default_max_tokens: int | None,
    choice: int = 0,
    images: tuple[PromptImage, ...] = (),
) -> Request:
    """The request for the engine. `default_max_tokens` None is the rest of the context.

    `choice` counts the answers to one prompt: each has a seed of its own. `images` are places in the prompt.
    """
    if not prompt_token_ids:
        raise RequestRejected("prompt must not be empty", field="prompt")
    check_token_ids(model, prompt_token_ids, "prompt")
    check_token_ids(model, options.stop_token_ids, "stop_token_ids")
    for token_id in options.logit_bias:
        if not 0 <= token_id < model.vocab_size:
            raise RequestRejected(
                f"logit_bias has token id {token_id}, outside the vocabulary (0 to {model.vocab_size - 1})",
                field="logit_bias",
            )
    if len(options.stop) > MAX_STOP_STRINGS:
        raise RequestRejected(f"stop must be at most {MAX_STOP_STRINGS} strings, not {len(options.stop)}", field="stop")
    params = SamplingParams(
        max_tokens=_max_tokens(model, len(prompt_token_ids), options.max_tokens, default_max_tokens),
        min_tokens=options.min_tokens or 0,
        temperature=model.temperature if options.temperature is None else options.temperature,
        top_p=model.top_p if options.top_p is None else options.top_p,
        top_k=_top_k(model, options.top_k),
        min_p=options.min_p or 0.0,
        repetition_penalty=1.0 if options.repetition_penalty is None else options.repetition_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        logit_bias=tuple(options.logit_bias.items()),
        seed=_seed(options.seed, choice),
        ignore_eos=options.ignore_eos,
        stop=tuple(options.stop),
        stop_token_ids=tuple(options.stop_token_ids),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
    )
    return Request(
        request_id,
        tuple(prompt_token_ids),
        params,
        eos_token_ids=model.eos_token_ids,
        deadline=options.deadline,
        priority=options.priority,
        cache_salt=options.cache_salt,
        grammar=options.grammar,
        images=images,
    )


def _top_k(model: ModelInfo, asked: int | None) -> int:
    if asked == -1:  # as vLLM's users write "off"
        return 0
    return min(model.top_k if asked is None else asked, model.vocab_size)


def _seed(seed: int | None, choice: int) -> int | None:
    if seed is None or choice == 0:
        return seed
    return (seed + choice + 2**63) % 2**64 - 2**63  # within 64 bits, whatever was given


def check_token_ids(model: ModelInfo, token_ids: Sequence[int], field: str) -> None:
    """All within the vocabulary."""
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
