"""What a request is on its way through the engine: its parameters, its outputs, its errors.

Plain data that travels between the gateway and the attention actors: nothing here imports torch, ray or grpc.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words."""

    STOP = "stop"  # a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the client went away, or asked for it
    ERROR = "error"  # see RequestOutput.error


class ErrorCode(StrEnum):
    """What went wrong, in gRPC's words (HTTP translates them)."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class RequestError:
    """Why a request failed. `retryable`: the same request may succeed when it is sent again."""

    code: ErrorCode
    message: str
    retryable: bool = False

    def rejection(self, field: str | None = None) -> RequestRejected:
        """The same, for a request that has not been accepted yet."""
        return RequestRejected(self.message, field=field, code=self.code)


# How an engine that was told to end, and that nobody will replace, ends its requests.
SHUTTING_DOWN = RequestError(ErrorCode.UNAVAILABLE, "the engine is shutting down", retryable=True)
# How it ends those of a gateway that seems to be gone. If that was only held up, it may bring them back.
GATEWAY_SILENT = RequestError(ErrorCode.UNAVAILABLE, "the gateway has fallen silent", retryable=True)


class RequestRejected(ValueError):
    """A request that is not accepted: bad input, or no room. `field` names the offending field, if there is one."""

    def __init__(self, message: str, *, field: str | None = None, code: ErrorCode = ErrorCode.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        self.field = field
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword arguments do not pickle by themselves, and this one crosses processes.
        return _rejected, (str(self), self.field, self.code)


def _rejected(message: str, field: str | None, code: ErrorCode) -> RequestRejected:
    return RequestRejected(message, field=field, code=code)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    `repetition_penalty` divides the positive logits, and multiplies the negative ones, of all tokens in the prompt or
    the answer so far; 1 is off. `frequency_penalty` is subtracted from a token's logit for each time it is in the
    answer so far, `presence_penalty` once if it is. `logit_bias`: (token id, what is added to its logit) pairs.
    `seed`: the gateway draws one for a request that has none; an engine by itself takes None for 0.
    `logprobs` and `prompt_logprobs`: None for none, else how many alternatives come with the token's own (0 or more).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    MAX_LOGPROBS = 20
    MAX_LOGIT_BIAS = 1024

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestRejected(f"{name} must be {rule}, not {getattr(self, name)!r}", field=name)

        check(self.max_tokens >= 0, "max_tokens", "0 or more")
        check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"between 0 and max_tokens ({self.max_tokens})")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(self.top_k >= 0, "top_k", "0 (off) or more")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            check(-2.0 <= getattr(self, name) <= 2.0, name, "between -2 and 2")
        self._check_logit_bias()
        check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        check(all(self.stop), "stop", "made of non-empty strings")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= self.MAX_LOGPROBS, name, f"between 0 and {self.MAX_LOGPROBS}")

    def _check_logit_bias(self) -> None:
        def check(ok: bool, problem: str) -> None:
            if not ok:
                raise RequestRejected(f"logit_bias {problem}", field="logit_bias")

        check(len(self.logit_bias) <= self.MAX_LOGIT_BIAS, f"has more than {self.MAX_LOGIT_BIAS} entries")
        check(len({token for token, _ in self.logit_bias}) == len(self.logit_bias), "names a token twice")
        for token, bias in self.logit_bias:
            check(token >= 0, f"names {token}, which is no token id")
            check(-100.0 <= bias <= 100.0, f"of token {token} must be between -100 and 100, not {bias!r}")


GrammarKind: TypeAlias = Literal["json_schema", "json_object", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must look like.

    `source`: a schema as JSON text (json_schema), nothing (json_object), a regular expression that the whole text must
    match (regex), a JSON list of strings (choice), or a Lark grammar (lark).
    """

    kind: GrammarKind
    source: str


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An image in a prompt: `length` of its tokens, from `start` on. Its patch tokens stand for the image's content.

    `digest` names that content, which is not here but goes beside the request (see engine.images.image_digest).
    """

    start: int
    length: int
    digest: bytes

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Request:
    """One accepted prompt. `eos_token_ids` end it unless `params.ignore_eos`; `deadline` is in Unix seconds.

    `priority`: lower ones run first. Requests share cached prefixes only with those of the same `cache_salt`.
    `generated_token_ids`: the beginning of the answer, which another engine has generated and the client has; this one
    goes on behind it, and what it has said of the prompt is not said again. `images`: in the order of their places,
    which do not overlap. `timed`: its last output has a `timeline`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    deadline: float | None = None
    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    generated_token_ids: tuple[int, ...] = ()
    images: tuple[PromptImage, ...] = ()
    timed: bool = False


@dataclass(frozen=True, slots=True)
class ExpertSeconds:
    """Seconds of an engine's steps that went into handing rows out to experts, and into waiting for their outputs."""

    dispatch: float = 0.0
    combine: float = 0.0

    def since(self, before: ExpertSeconds) -> ExpertSeconds:
        return ExpertSeconds(self.dispatch - before.dispatch, self.combine - before.combine)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a request came to what in one engine, in Unix seconds; None for what it did not come to.

    `started`: its first step. `prefill` (until `first_token`) and `decode` (from there on): what the engine's steps
    spent on experts meanwhile, for this request and for those beside it.
    """

    queued: float
    started: float | None
    first_token: float | None
    ended: float
    prefill: ExpertSeconds = ExpertSeconds()
    decode: ExpertSeconds = ExpertSeconds()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the unmodified distribution, and the most likely tokens beside it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step gave one request. The last one has `finish_reason`.

    `prompt_logprobs` comes once, with the output that ends the prefill: an entry per prompt token, the first one None.
    A stop token is part of `token_ids` (the gateway leaves it out of the text). `cached_tokens` comes with the first
    output: how many of the prompt's tokens were not computed, because the prefix cache had them.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: RequestError | None = None
    cached_tokens: int = 0
    timeline: Timeline | None = None


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's load right now. Token rates are means over the last seconds.

    `parked`: those of the `running` ones that wait for experts that are out of reach. `draining`: no new requests.

    `prompt_tokens` were computed, `cached_prompt_tokens` came from the prefix cache instead. `kv_pages_used`: pages
    that sequences hold; `kv_pages_cached`: pages that only the prefix cache holds, which give way when there is need.
    """

    waiting: int = 0
    running: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tokens_per_second: float = 0.0
    kv_pages_used: dict[str, int] = field(default_factory=dict)
    kv_pages_total: dict[str, int] = field(default_factory=dict)
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    kv_pages_cached: dict[str, int] = field(default_factory=dict)
    parked: int = 0
    draining: bool = False
