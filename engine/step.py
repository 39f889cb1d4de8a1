"""One step: the scheduled rows through the model, then a token for every sequence whose last row was among them.

T rows of the step, N rows whose logits are wanted, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.request import FinishReason, RequestOutput, TokenLogprob
from engine.sampler import SampleRow, sample, token_logprobs
from engine.scheduler import ScheduledSequence, Sequence
from llama4.decoder import Decoder
from llama4.kv_pages import Batch, KVPages, Segment
from llama4.moe import Dispatcher


class Stepper:
    """Runs steps over one model, its KV pages and the experts behind a dispatcher.

    Prompt log-probabilities are gathered here while a prompt is prefilled.
    """

    def __init__(self, decoder: Decoder, kv: KVPages, dispatcher: Dispatcher, max_context: int) -> None:
        self._decoder = decoder
        self._kv = kv
        self._dispatcher = dispatcher
        self._max_context = max_context
        self._prompt_logprobs: dict[str, list[TokenLogprob | None]] = {}

    @torch.inference_mode()
    def step(self, scheduled: Seq[ScheduledSequence]) -> list[RequestOutput]:
        """Computes the rows and appends the sampled tokens to their sequences; takes part with no rows as well."""
        batch = _batch(scheduled)
        hidden_TD = self._decoder(batch, self._kv, self._dispatcher)
        self._score_prompts(scheduled, batch, hidden_TD)
        done = [(item, segment) for item, segment in zip(scheduled, batch.segments, strict=True) if item.completes]
        if not done:
            return []
        last_rows = torch.tensor([segment.start + segment.length - 1 for _, segment in done], device=hidden_TD.device)
        logits_NV = self._decoder.logits(hidden_TD[last_rows])
        return self._sample([item.sequence for item, _ in done], logits_NV)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request that ends before its prefill does, or is computed anew."""
        self._prompt_logprobs.pop(request_id, None)

    def _score_prompts(self, scheduled: Seq[ScheduledSequence], batch: Batch, hidden_TD: Tensor) -> None:
        for item, segment in zip(scheduled, batch.segments, strict=True):
            request, first = item.sequence.request, item.sequence.computed
            wanted = request.params.prompt_logprobs
            # Row i scores token i + 1, so a prompt's last row scores nothing.
            rows = min(first + item.rows, len(request.prompt_token_ids) - 1) - first
            if wanted is None or item.sequence.generated:
                continue
            entries = self._prompt_logprobs.setdefault(request.request_id, [None])
            del entries[first + 1 :]  # a preempted prompt starts again
            if rows > 0:
                logits_NV = self._decoder.logits(hidden_TD[segment.start : segment.start + rows])
                scored = request.prompt_token_ids[first + 1 : first + 1 + rows]
                entries += token_logprobs(logits_NV, scored, [wanted] * rows)

    def _sample(self, sequences: list[Sequence], logits_NV: Tensor) -> list[RequestOutput]:
        rows = [SampleRow(seq.request.params, seq.seed, len(seq.tokens), _forbidden(seq)) for seq in sequences]
        tokens = sample(logits_NV, rows)
        scored = self._score_tokens(sequences, logits_NV, tokens)
        outputs = []
        for sequence, token in zip(sequences, tokens, strict=True):
            request = sequence.request
            prompt_logprobs = tuple(self._prompt_logprobs.pop(request.request_id, ()))
            if request.params.max_tokens == 0:
                outputs.append(
                    RequestOutput(
                        request.request_id, prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.LENGTH
                    )
                )
                continue
            sequence.tokens.append(token)
            reason, stop_token = self._finish(sequence, token)
            outputs.append(
                RequestOutput(
                    request.request_id,
                    (token,),
                    scored.get(request.request_id, ()),
                    prompt_logprobs,
                    reason,
                    stop_token,
                )
            )
        return outputs

    @staticmethod
    def _score_tokens(
        sequences: list[Sequence], logits_NV: Tensor, tokens: list[int]
    ) -> dict[str, tuple[TokenLogprob, ...]]:
        wanting = [
            (n, seq.request.request_id, seq.request.params.logprobs)
            for n, seq in enumerate(sequences)
            if seq.request.params.logprobs is not None
        ]
        if not wanting:
            return {}
        index = torch.tensor([n for n, _, _ in wanting], device=logits_NV.device)
        logprobs = token_logprobs(
            logits_NV[index], [tokens[n] for n, _, _ in wanting], [wanted for _, _, wanted in wanting]
        )
        return {request_id: (entry,) for (_, request_id, _), entry in zip(wanting, logprobs, strict=True)}

    def _finish(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        request, generated = sequence.request, sequence.generated
        if generated >= request.params.min_tokens and token in _stop_tokens(sequence):
            return FinishReason.STOP, token
        if generated >= request.params.max_tokens or len(sequence.tokens) >= self._max_context:
            return FinishReason.LENGTH, None
        return None, None


def _batch(scheduled: Seq[ScheduledSequence]) -> Batch:
    token_ids: list[int] = []
    segments: list[Segment] = []
    for item in scheduled:
        sequence, first = item.sequence, item.sequence.computed
        segments.append(Segment(len(token_ids), item.rows, first, sequence.table.pages))
        token_ids += sequence.tokens[first : first + item.rows]
    return Batch.of(token_ids, segments)


def _stop_tokens(sequence: Sequence) -> tuple[int, ...]:
    request = sequence.request
    return request.params.stop_token_ids + (() if request.params.ignore_eos else request.eos_token_ids)


def _forbidden(sequence: Sequence) -> tuple[int, ...]:
    """Before min_tokens no token may come that would end the answer."""
    return _stop_tokens(sequence) if sequence.generated < sequence.request.params.min_tokens else ()
