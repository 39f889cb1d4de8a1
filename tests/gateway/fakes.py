"""A tokenizer with merges, and an engine that plays scripted answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from actors.status import ActorStatus, ClusterStatus
from cluster.config import VisionConfig
from engine.image_spec import ImageSpec
from engine.request import (
    EngineLoad,
    ErrorCode,
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    RequestRejected,
    TokenLogprob,
)
from engine.tokenizer import Tokenizer

VOCAB_SIZE = 300
MAX_CONTEXT = 64
MODEL = "tiny"
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>")
IMAGE_TOKENS = (
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
CHAT_TEMPLATE = (
    "<|begin_of_text|>{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<|image|>' }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"
)


VISION = VisionConfig(max_images=4, max_image_bytes=2000, max_image_pixels=5000)


def image_spec(tokenizer: Tokenizer) -> ImageSpec:
    """Tiles of 8 by 8 pixels, up to four of them and the whole, each of two tokens."""
    ids = [token_id for name in IMAGE_TOKENS for token_id in tokenizer.encode(name, add_special_tokens=False)]
    return ImageSpec(8, 4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 2, *ids)


def save_tokenizer(path: Path) -> None:
    """Token id b < 256 is a byte in the alphabet's order; then a few merges and the special tokens."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("l", "l"), ("H", "e"), ("He", "ll"), ("Ã", "¶")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS + IMAGE_TOKENS]
    )
    bos = SPECIAL_TOKENS[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="<|eot|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def logprob(token_id: int, top: int) -> TokenLogprob:
    """Made up, but each token's own: the token itself is the most likely one."""
    alternatives = tuple((token_id + i, -(token_id % 7) - 0.5 * i) for i in range(top))
    return TokenLogprob(token_id, -float(token_id % 7), alternatives)


class FakeEngine:
    """An EngineClient. `answers` are by prompt, else `answer`: token ids, `step` of them in each output."""

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer = tuple(answer)
        self.answers: dict[tuple[int, ...], Sequence[int]] = {}
        self.step = 1
        self.delay = 0.0
        self.rejection: RequestRejected | None = None
        self.fail_after: int | None = None  # tokens
        self.failure: RequestError | Exception | None = None
        self.cached_tokens = 0
        self.draining = False
        self.changes: list[tuple[object, ...]] = []
        self.change_failure: Exception | None = None
        self.requests: list[Request] = []
        self.images: list[tuple[bytes, ...]] = []
        self.closed_early: list[str] = []
        self.running: dict[str, asyncio.Event] = {}
        self.cluster = ClusterStatus(
            ready=True,
            epoch=3,
            actors=(
                ActorStatus("attention-0", "attention", 0, pid=7, state="serving", device="cpu"),
                ActorStatus("controller", "controller", 0, pid=8),
            ),
            engines={
                "attention-0": EngineLoad(
                    running=1,
                    kv_pages_used={"full": 2},
                    kv_pages_total={"full": 8},
                    kv_pages_cached={"full": 4},
                    cached_prompt_tokens=11,
                    preemptions=12,
                    parked=13,
                )
            },
            expert_tokens={1: (5, 6)},
            placement={1: ((0,), (0, 1))},
            balancedness=1.25,
            balancedness_before=2.5,
            seconds_since_move=14.0,
            balance_mode="auto",
            failovers=15,
        )

    async def generate(self, request: Request, images: Sequence[bytes] = ()) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        self.images.append(tuple(images))
        if self.rejection is not None:
            raise self.rejection
        if self.draining:
            raise RequestRejected("the server is draining", code=ErrorCode.UNAVAILABLE)
        aborted = self.running[request.request_id] = asyncio.Event()
        finished = False
        try:
            async for output in self._outputs(request, aborted):
                finished = output.finish_reason is not None
                yield output
        finally:
            del self.running[request.request_id]
            if not finished:
                self.closed_early.append(request.request_id)

    async def _outputs(self, request: Request, aborted: asyncio.Event) -> AsyncGenerator[RequestOutput, None]:
        params, rid = request.params, request.request_id
        top = params.prompt_logprobs
        prompt = () if top is None else (None, *(logprob(t, top) for t in request.prompt_token_ids[1:]))
        await asyncio.sleep(self.delay)
        if params.max_tokens == 0:
            yield RequestOutput(rid, prompt_logprobs=prompt, finish_reason=FinishReason.LENGTH)
            return
        answer = self.answers.get(request.prompt_token_ids, self.answer)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)}
        done = 0
        while True:
            if request.deadline is not None and time.time() >= request.deadline:
                late = RequestError(ErrorCode.DEADLINE_EXCEEDED, "the request's deadline has passed")
                yield RequestOutput(rid, finish_reason=FinishReason.ERROR, error=late)
                return
            if self.failure is not None and done >= (self.fail_after or 0):
                if isinstance(self.failure, Exception):
                    raise self.failure
                yield RequestOutput(rid, finish_reason=FinishReason.ERROR, error=self.failure)
                return
            if aborted.is_set():
                yield RequestOutput(rid, finish_reason=FinishReason.ABORT)
                return
            ids = tuple(answer[(done + i) % len(answer)] for i in range(min(self.step, params.max_tokens - done)))
            stop = next((i for i, t in enumerate(ids) if t in stops and done + i + 1 > params.min_tokens), None)
            if stop is not None:
                ids = ids[: stop + 1]
            done += len(ids)
            reason = FinishReason.LENGTH if done == params.max_tokens else None
            yield RequestOutput(
                rid,
                token_ids=ids,
                logprobs=() if params.logprobs is None else tuple(logprob(t, params.logprobs) for t in ids),
                prompt_logprobs=prompt,
                finish_reason=reason if stop is None else FinishReason.STOP,
                stop_token_id=None if stop is None else ids[-1],
                cached_tokens=0 if done > len(ids) else self.cached_tokens,
            )
            if reason is not None or stop is not None:
                return
            prompt = ()
            await asyncio.sleep(self.delay)

    async def abort(self, request_ids: Sequence[str]) -> int:
        found = [self.running[i] for i in request_ids if i in self.running]
        for event in found:
            event.set()
        return len(found)

    async def drain(self) -> int:
        self.draining = True
        self.cluster = replace(self.cluster, ready=False, reason="draining")
        return len(self.running)

    async def scale(self, role: Literal["experts", "attention"], actors: int) -> None:
        self._change("scale", role, actors)

    async def move(self, expert: int, to_slot: int, layer: int | None = None, from_slot: int | None = None) -> None:
        self._change("move", expert, to_slot, layer, from_slot)

    async def drain_slot(self, slot: int) -> None:
        self._change("drain_slot", slot)

    async def rebalance(self) -> bool:
        self._change("rebalance")
        return len(self.changes) == 1

    def _change(self, *change: object) -> None:
        if self.change_failure is not None:
            raise self.change_failure
        self.changes.append(change)

    async def status(self) -> ClusterStatus:
        return self.cluster
