"""Which rows the next step computes. Pure Python: no torch, an injected clock.

Continuous batching with chunked prefill under a token budget: first one row for every sequence that decodes, then the
prompts that are under way, then new ones in order of arrival. When KV pages run out, the sequence that was admitted
last gives its pages back and is computed again later (preemption by recomputation).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.pages import PageAllocator, PageTable
from engine.request import ErrorCode, Request, RequestRejected


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch_tokens: rows in a step; max_running: sequences that hold KV; max_waiting: the queue behind them."""

    max_batch_tokens: int
    max_running: int
    max_waiting: int


@dataclass(eq=False, slots=True)
class Sequence:
    """A request under way. KV exists for `tokens[:computed]`; what lies behind it is still to be computed."""

    request: Request
    seed: int
    tokens: list[int]
    table: PageTable
    computed: int = 0

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`rows` tokens of a sequence, from position `sequence.computed` on.

    `completes`: nothing is pending behind them, so the last row's logits say the next token.
    """

    sequence: Sequence
    rows: int
    completes: bool


class Scheduler:
    """Owns the waiting and running sequences and their pages."""

    def __init__(
        self, limits: Limits, pages: PageAllocator, *, clock: Callable[[], float], new_seed: Callable[[], int]
    ) -> None:
        self.limits = limits
        self.pages = pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._clock = clock
        self._new_seed = new_seed

    def check(self, request: Request, queued: int) -> None:
        """Raises RequestRejected when the request can never run, or when `queued` others already wait."""
        longest = self.pages.longest_sequence()
        needed = len(request.prompt_token_ids) + request.params.max_tokens
        if needed > longest:
            raise RequestRejected(
                f"prompt ({len(request.prompt_token_ids)} tokens) and max_tokens ({request.params.max_tokens}) "
                f"together need KV for {needed} tokens; an attention actor here has room for {longest}",
                field="max_tokens",
            )
        if queued >= self.limits.max_waiting:
            raise RequestRejected(
                f"{queued} requests are waiting already (engine.max_waiting); try again later",
                code=ErrorCode.RESOURCE_EXHAUSTED,
            )

    def add(self, request: Request) -> None:
        seed = self._new_seed() if request.params.seed is None else request.params.seed
        self.waiting.append(Sequence(request, seed, list(request.prompt_token_ids), self.pages.new_table()))

    def remove(self, request_ids: Iterable[str]) -> list[Sequence]:
        """Forgets these requests, wherever they are, and frees their pages."""
        wanted = set(request_ids)
        gone = [seq for seq in (*self.running, *self.waiting) if seq.request.request_id in wanted]
        for sequence in gone:
            self.pages.release(sequence.table)
        self.running = [seq for seq in self.running if seq not in gone]
        self.waiting = deque(seq for seq in self.waiting if seq not in gone)
        return gone

    def overdue(self) -> list[Sequence]:
        now = self._clock()
        return [seq for seq in (*self.running, *self.waiting) if (seq.request.deadline or now) < now]

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's rows. Pages for them are allocated; `advance` must follow once they are computed."""
        budget = self.limits.max_batch_tokens
        scheduled: list[ScheduledSequence] = []
        # Decoding sequences have one pending row and come first: a long prompt must not hold them up.
        for sequence in sorted(self.running, key=lambda seq: seq.pending > 1):
            if budget and sequence in self.running:  # it may have been preempted for one before it
                rows = self._give_rows(sequence, budget, {item.sequence.request.request_id for item in scheduled})
                if rows:
                    scheduled.append(ScheduledSequence(sequence, rows, rows == sequence.pending))
                    budget -= rows
        while budget and self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            rows = min(sequence.pending, budget, self.pages.room(sequence.table, 0))
            # Room for the whole of it, or it would soon be preempted for those that run.
            if rows <= 0 or (self.running and not self.pages.can_hold(sequence.pending + 1)):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            self.pages.extend(sequence.table, rows)
            scheduled.append(ScheduledSequence(sequence, rows, rows == sequence.pending))
            budget -= rows
        return scheduled

    def _give_rows(self, sequence: Sequence, budget: int, scheduled: set[str]) -> int:
        """Allocates pages for the sequence's next rows, preempting later ones if there are none; returns the rows."""
        while True:
            rows = min(sequence.pending, budget, self.pages.room(sequence.table, sequence.computed))
            if rows > 0:
                self.pages.extend(sequence.table, sequence.computed + rows)
                return rows
            victim = next((seq for seq in reversed(self.running) if seq.request.request_id not in scheduled), sequence)
            self._preempt(victim)
            if victim is sequence:
                return 0

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.pages.release(sequence.table)
        self.running.remove(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)

    def advance(self, scheduled: Seq[ScheduledSequence]) -> None:
        """The scheduled rows are computed: their KV exists."""
        for item in scheduled:
            item.sequence.computed += item.rows
            self.pages.release_past(item.sequence.table, item.sequence.computed)

    def finish(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table)
        self.running.remove(sequence)
