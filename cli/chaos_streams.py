"""The streams of `herder chaos`: requests that give the same tokens each time, asked over and over."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from cli import endpoint
from cli.chaos_tally import Tally
from cli.report import CliError
from herder.v1 import inference_pb2, types_pb2

if TYPE_CHECKING:
    from herder.v1.inference_pb2_grpc import InferenceServiceAsyncStub

_PROMPT_TOKENS = (4, 32)
_ANSWER_TOKENS = 128
_REST_S = 0.2  # after a lost answer: a server that refuses at once must not be asked without pause

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one stream asks. `seed` None: the likeliest tokens, else drawn ones at temperature 1."""

    token_ids: tuple[int, ...]
    seed: int | None
    max_tokens: int

    def request(self) -> inference_pb2.GenerateStreamRequest:
        return inference_pb2.GenerateStreamRequest(
            token_ids=types_pb2.TokenIds(ids=self.token_ids),
            sampling=types_pb2.SamplingParams(
                max_tokens=self.max_tokens,
                temperature=0.0 if self.seed is None else 1.0,
                seed=self.seed,
                ignore_eos=True,
            ),
        )


class AnswerLost(Exception):
    """An answer that has not come to its end; the reason, in a sentence."""


# The tokens of an answer, as they come. Raises AnswerLost.
Ask = Callable[[Prompt], AsyncGenerator[Sequence[int], None]]


def make_prompts(count: int, vocab_size: int, max_context: int, rng: random.Random) -> list[Prompt]:
    """`count` prompts of random tokens, every other one to be sampled with a seed of its own."""
    prompts = []
    for number in range(count):
        length = min(rng.randint(*_PROMPT_TOKENS), max_context // 2)
        token_ids = tuple(rng.randrange(vocab_size) for _ in range(length))
        seed = rng.getrandbits(31) if number % 2 else None
        prompts.append(Prompt(token_ids, seed, min(_ANSWER_TOKENS, max_context - length)))
    return prompts


def asking(stub: InferenceServiceAsyncStub, server: endpoint.Server) -> Ask:
    """Asks over InferenceService.GenerateStream."""

    async def ask(prompt: Prompt) -> AsyncGenerator[Sequence[int], None]:
        call = stub.GenerateStream(prompt.request(), metadata=server.metadata)
        try:
            async for event in call:
                match event.WhichOneof("event"):
                    case "tokens" if event.tokens.token_ids:  # else it is text that was held back
                        yield event.tokens.token_ids
                    case "error":
                        raise AnswerLost(event.error.message)
                    case "finished":
                        return
            raise AnswerLost("the stream was closed before its end")
        except grpc.RpcError as error:
            raise AnswerLost(str(endpoint.grpc_fault(server.where, error))) from None
        finally:
            call.cancel()

    return ask


async def answer(stream: int, prompt: Prompt, ask: Ask, tally: Tally, clock: Clock) -> list[int]:
    """All tokens of one answer; notes how long it waited for each, the first one too. Raises AnswerLost."""
    tokens: list[int] = []
    last = clock()
    try:
        async with aclosing(ask(prompt)) as pieces:
            async for token_ids in pieces:
                now = clock()
                tally.note_gap(stream, last, now)
                last = now
                tokens += token_ids
    except (AnswerLost, asyncio.CancelledError):  # it waited in vain
        tally.note_gap(stream, last, clock())
        raise
    return tokens


async def undisturbed(prompts: Sequence[Prompt], ask: Ask, tally: Tally, clock: Clock) -> list[list[int]]:
    """The answers that all later ones have to equal. Asks twice: what differs of itself cannot be compared.

    The second time is noted in `tally`. Raises CliError.
    """
    found = []
    for counts in (Tally(len(prompts)), tally):
        try:
            answers = (answer(i, prompt, ask, counts, clock) for i, prompt in enumerate(prompts))
            found.append(await asyncio.gather(*answers))
        except AnswerLost as error:
            raise CliError(f"an answer was lost before anything was harmed: {error}") from None
    expected, again = found
    for number, (tokens, other) in enumerate(zip(again, expected, strict=True)):
        tally.note_answer(number, tokens, other)
    if tally.changed:
        raise CliError(f"the same request gives other tokens before anything was harmed: {tally.changed[0]}")
    return expected


async def keep_asking(
    stream: int,
    prompt: Prompt,
    expected: Sequence[int],
    ask: Ask,
    tally: Tally,
    ending: asyncio.Event,
    clock: Clock,
) -> None:
    """Asks the same over and over until `ending` is set, and then comes to the end of the last answer."""
    while not ending.is_set():
        try:
            tally.note_answer(stream, await answer(stream, prompt, ask, tally, clock), expected)
        except AnswerLost as error:
            tally.lost[str(error)] += 1
            await asyncio.sleep(_REST_S)
