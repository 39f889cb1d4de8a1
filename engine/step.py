"""One step: the scheduled rows through the model, then a token for every sequence whose last row was among them.

T rows of the step, N rows of it (those whose logits are wanted; those of images), D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.bitmask import allocate_masks
from engine.grammar import GrammarError, Matcher
from engine.micro_batching import MicroBatching
from engine.patches import PromptPatches
from engine.penalties import Penalties
from engine.request import ErrorCode, FinishReason, Request, RequestError, RequestOutput, TokenLogprob
from engine.sampler import SampleRow, sample, token_logprobs
from engine.sequence import ScheduledSequence, Sequence
from llama4.decoder import Decoder
from llama4.kv_pages import Batch, InputRows, KVPages, Segment
from llama4.micro_batches import MicroBatchDispatcher, halve
from llama4.moe import Dispatcher

_SCORED_ROWS = 128  # of a prompt at a time: a long prompt's logits would take gigabytes


@dataclass(slots=True)
class _Answer:
    """What sampling needs of one request beyond its tokens. It depends on these alone, so preemption does not touch it.

    `prompt_logprobs` are gathered while the prompt is prefilled.
    """

    stop_tokens: tuple[int, ...]
    penalties: Penalties | None
    matcher: Matcher | None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    `parked`: sequences that got nothing, because some of their rows found no living expert; they are as before.
    """

    outputs: list[RequestOutput]
    parked: frozenset[Sequence] = frozenset()


class Stepper:
    """Runs steps over one model, its KV pages and the experts behind a dispatcher.

    `micro_batching`: into how many micro-batches steps are cut; None: one.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVPages,
        dispatcher: Dispatcher,
        max_context: int,
        micro_batching: MicroBatching | None = None,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._dispatcher = dispatcher
        self._max_context = max_context
        self._micro_batching = micro_batching or MicroBatching(1)
        self._answers: dict[str, _Answer] = {}
        self._patches: dict[str, PromptPatches] = {}

    def expect(self, request: Request, matcher: Matcher | None = None, patches: PromptPatches | None = None) -> None:
        """Makes ready for a request's tokens, before its first step. `matcher` knows those that it has already.

        `patches` are those of its images.
        """
        assert (patches is not None) == bool(request.images), "images come with their patches"
        if patches is not None:
            self._patches[request.request_id] = patches
        params = request.params
        stop_tokens = params.stop_token_ids + (() if params.ignore_eos else request.eos_token_ids)
        penalties = Penalties.of(params, request.prompt_token_ids, request.generated_token_ids)
        self._answers[request.request_id] = _Answer(stop_tokens, penalties, matcher)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request that is removed before it has finished."""
        self._answers.pop(request_id, None)
        self._patches.pop(request_id, None)

    @torch.inference_mode()
    def step(self, scheduled: Seq[ScheduledSequence]) -> StepResult:
        """Computes the rows and appends the sampled tokens to their sequences; takes part with no rows as well.

        Raises GroupBroken when the experts cannot be reached: then nothing has changed, and it can be run again.
        """
        batch = self._batch(scheduled)
        hidden_TD, lost = self._micro_batching.run(
            len(batch.token_ids_T), len(batch.segments), lambda number: self._forward(batch, number)
        )
        rows = list(zip(scheduled, batch.segments, strict=True))
        parked = frozenset(
            item.sequence
            for item, segment in rows
            if not lost.isdisjoint(range(segment.start, segment.start + segment.length))
        )
        rows = [(item, segment) for item, segment in rows if item.sequence not in parked]
        self._score_prompts(rows, hidden_TD)
        done = [(item, segment) for item, segment in rows if item.completes]
        if not done:
            return StepResult([], parked)
        last_rows = torch.tensor([segment.start + segment.length - 1 for _, segment in done], device=hidden_TD.device)
        logits_NV = self._decoder.logits(hidden_TD[last_rows])
        return StepResult(self._sample([item.sequence for item, _ in done], logits_NV), parked)

    def _forward(self, batch: Batch, micro_batches: int) -> tuple[Tensor, frozenset[int]]:
        """The rows' hidden states h_TD, and the rows that are lost."""
        if micro_batches == 1:
            hidden_TD = self._decoder(batch, self._kv, self._dispatcher)
            return hidden_TD, self._dispatcher.take_lost(len(batch.token_ids_T))
        halves = halve(batch)
        first, second = sizes = [len(half.token_ids_T) for half in halves]
        ways = [MicroBatchDispatcher(self._dispatcher, size) for size in sizes]
        hidden_TD = self._decoder.micro_batches(list(zip(halves, ways, strict=True)), self._kv)
        return hidden_TD, ways[0].take_lost(first) | {first + row for row in ways[1].take_lost(second)}

    def _batch(self, scheduled: Seq[ScheduledSequence]) -> Batch:
        token_ids: list[int] = []
        segments: list[Segment] = []
        image_rows: list[int] = []
        embeddings_ND: list[Tensor] = []
        for item in scheduled:
            sequence, first = item.sequence, item.sequence.computed
            stop = first + item.rows
            if (patches := self._patches.get(sequence.request.request_id)) is not None:
                positions, pieces = patches.between(first, stop)
                image_rows += [len(token_ids) + position - first for position in positions]
                embeddings_ND += pieces
            segments.append(Segment(len(token_ids), item.rows, first, sequence.table.pages))
            token_ids += sequence.tokens[first:stop]
        images = InputRows(torch.tensor(image_rows), torch.cat(embeddings_ND)) if image_rows else None
        return Batch.of(token_ids, segments, images)

    def _score_prompts(self, rows: Seq[tuple[ScheduledSequence, Segment]], hidden_TD: Tensor) -> None:
        for item, segment in rows:
            request, first = item.sequence.request, item.sequence.computed
            wanted = request.params.prompt_logprobs
            if wanted is None or item.sequence.generated:
                continue
            entries = self._answers[request.request_id].prompt_logprobs
            if not first:
                entries[:] = [None]  # the first token has none; a preempted prompt starts again
            # Row i scores token i + 1, so a prompt's last row scores nothing.
            scored_rows = min(first + item.rows, len(request.prompt_token_ids) - 1) - first
            for done in range(0, scored_rows, _SCORED_ROWS):
                count = min(_SCORED_ROWS, scored_rows - done)
                start, position = segment.start + done, first + done + 1
                logits_NV = self._decoder.logits(hidden_TD[start : start + count])
                scored = request.prompt_token_ids[position : position + count]
                entries += token_logprobs(logits_NV, scored, [wanted] * count)

    def _sample(self, sequences: list[Sequence], logits_NV: Tensor) -> list[RequestOutput]:
        answers = [self._answers[sequence.request.request_id] for sequence in sequences]
        masks, errors = _fill_masks(answers, logits_NV.shape[1])
        rows = [
            SampleRow(
                sequence.request.params,
                sequence.request.params.seed or 0,
                len(sequence.tokens),
                # Before min_tokens no token may come that would end the answer.
                answer.stop_tokens if sequence.generated < sequence.request.params.min_tokens else (),
                answer.penalties,
                masks.get(n),
            )
            for n, (sequence, answer) in enumerate(zip(sequences, answers, strict=True))
        ]
        tokens = sample(logits_NV, rows)
        scored = _score_tokens(sequences, logits_NV, tokens)
        outputs = []
        for n, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
            output = self._output(sequence, answer, tokens[n], scored.get(n, ()), errors.get(n))
            if output.finish_reason is not None:
                self.forget(output.request_id)
            outputs.append(output)
        return outputs

    def _output(
        self,
        sequence: Sequence,
        answer: _Answer,
        token: int,
        logprobs: tuple[TokenLogprob, ...],
        error: RequestError | None,
    ) -> RequestOutput:
        """Appends the token to its sequence; what the request's client gets to know of it."""
        request, first = sequence.request, not sequence.generated
        prompt_logprobs = tuple(answer.prompt_logprobs) if first else ()
        cached_tokens = sequence.cached_tokens if first else 0
        if error is None and request.params.max_tokens > 0:
            sequence.tokens.append(token)
            error = _accept(answer, token)
        if error is not None:
            return RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)
        if request.params.max_tokens == 0:
            return RequestOutput(
                request.request_id,
                prompt_logprobs=prompt_logprobs,
                finish_reason=FinishReason.LENGTH,
                cached_tokens=cached_tokens,
            )
        reason, stop_token = self._finish(sequence, answer, token)
        return RequestOutput(
            request.request_id, (token,), logprobs, prompt_logprobs, reason, stop_token, cached_tokens=cached_tokens
        )

    def _finish(self, sequence: Sequence, answer: _Answer, token: int) -> tuple[FinishReason | None, int | None]:
        """Whether the token ends its answer. Where a grammar lets nothing follow, no end-of-text token is awaited."""
        params, generated = sequence.request.params, sequence.generated
        if token in answer.stop_tokens and generated >= params.min_tokens:
            return FinishReason.STOP, token
        if answer.matcher is not None and answer.matcher.is_done:
            return FinishReason.STOP, None
        if generated >= params.max_tokens or len(sequence.tokens) >= self._max_context:
            return FinishReason.LENGTH, None
        return None, None


def _fill_masks(answers: Seq[_Answer], vocabulary: int) -> tuple[dict[int, Tensor], dict[int, RequestError]]:
    """The masks of the rows that follow a grammar, and the errors of those whose grammar gave up."""
    constrained = [(n, answer.matcher) for n, answer in enumerate(answers) if answer.matcher is not None]
    masks: dict[int, Tensor] = {}
    errors: dict[int, RequestError] = {}
    for (n, matcher), mask_W in zip(constrained, allocate_masks(len(constrained), vocabulary), strict=True):
        try:
            matcher.fill_mask(mask_W)
            masks[n] = mask_W
        except GrammarError as error:
            errors[n] = _grammar_failed(error)
    return masks, errors


def _accept(answer: _Answer, token: int) -> RequestError | None:
    """Tells the answer's penalties and grammar of the token; returns why the grammar gave up, if it did."""
    if answer.penalties is not None:
        answer.penalties.add(token)
    if answer.matcher is not None:
        try:
            answer.matcher.accept(token)
        except GrammarError as error:
            return _grammar_failed(error)
    return None


def _grammar_failed(error: GrammarError) -> RequestError:
    return RequestError(ErrorCode.INVALID_ARGUMENT, f"the answer's grammar could not be followed: {error}")


def _score_tokens(sequences: Seq[Sequence], logits_NV: Tensor, tokens: Seq[int]) -> dict[int, tuple[TokenLogprob, ...]]:
    """The log-probabilities of the rows that want them."""
    wanting = [
        (n, sequence.request.params.logprobs)
        for n, sequence in enumerate(sequences)
        if sequence.request.params.logprobs is not None
    ]
    if not wanting:
        return {}
    index = torch.tensor([n for n, _ in wanting], device=logits_NV.device)
    scored = token_logprobs(logits_NV[index], [tokens[n] for n, _ in wanting], [wanted for _, wanted in wanting])
    return {n: (entry,) for (n, _), entry in zip(wanting, scored, strict=True)}
