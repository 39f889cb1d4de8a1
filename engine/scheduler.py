"""Which rows the next step computes. Pure Python: no torch, an injected clock.

Continuous batching with chunked prefill under a token budget: one row for every sequence that decodes; the rest of the
budget for the prompts that are under way, then for new ones.

- **Waiting** requests are admitted by priority, first come first served within one. So that none starves, waiting makes
  up for priority: `ageing_s` seconds are worth one level. If the first one does not fit into the KV pages, those behind
  it wait as well: nobody overtakes a long prompt.
- **Prompts share the budget.** One that cannot be finished in this step takes at most half of what is left while others
  want rows too, so a long prompt does not hold short ones up. The first in turn always gets its half.
- **Prefixes** that the cache knows are taken over at admission instead of being computed.
- **Preemption.** When pages run out, the sequence of the lowest priority, among these the last admitted, gives its
  pages back and waits in its old place. It is computed again later, as far as the cache has forgotten it by then.
  Waiting requests never preempt running ones.
- **Parking.** Sequences whose experts are out of reach keep their place and the pages of what is computed, but get no
  rows until they are tried again.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from engine.pages import PageAllocator
from engine.prefix_cache import extend_hashes
from engine.request import ErrorCode, Request, RequestRejected
from engine.sequence import ScheduledSequence, Sequence

_LEAST_SHARE = 8  # a prompt's share of the budget does not get smaller than the budget over this


@dataclass(frozen=True, slots=True)
class Limits:
    """max_batch_tokens: rows in a step; max_running: sequences that hold KV; max_waiting: the queue behind them;
    ageing_s: seconds of waiting that make up for one level of priority."""

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    ageing_s: float = 10.0


class Scheduler:
    """Owns the waiting and running sequences and their pages."""

    def __init__(self, limits: Limits, pages: PageAllocator, *, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.pages = pages
        self.waiting: list[Sequence] = []  # by turn
        self.running: dict[str, Sequence] = {}  # by request id
        self.parked: set[Sequence] = set()  # of the running ones
        self.next_deadline = math.inf  # none passes before
        self.preemptions = 0
        self.cached_prompt_tokens = 0
        self._clock = clock
        self._arrivals = 0
        self._admissions = 0
        self._sequences: dict[str, Sequence] = {}
        self._deadlines: dict[str, float] = {}
        self._planned: list[ScheduledSequence] = []  # the step that is scheduled and not computed

    def check(self, request: Request, queued: int) -> None:
        """Raises RequestRejected when the request can never run, or when `queued` others already wait."""
        begun = len(request.generated_token_ids)
        assert not begun or begun < request.params.max_tokens, "an answer that is complete is not gone on with"
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
        """Lets a request wait for its turn. One that began at another engine comes before those that have not begun."""
        self._arrivals += 1
        arrived = 0.0 if request.generated_token_ids else self._clock()
        turn = arrived + request.priority * self.limits.ageing_s, self._arrivals
        tokens = [*request.prompt_token_ids, *request.generated_token_ids]
        sequence = Sequence(request, tokens, self.pages.new_table(), turn)
        self._sequences[request.request_id] = sequence
        self._wait(sequence)
        if request.deadline is not None:
            self._deadlines[request.request_id] = request.deadline
            self.next_deadline = min(self.next_deadline, request.deadline)

    def remove(self, request_ids: Iterable[str]) -> list[Sequence]:
        """Forgets these requests, wherever they are, and frees their pages."""
        known = [self._sequences[name] for name in dict.fromkeys(request_ids) if name in self._sequences]
        for sequence in known:
            self._forget(sequence)
        waiting = {sequence for sequence in known if self.running.pop(sequence.request.request_id, None) is None}
        if waiting:
            self.waiting = [sequence for sequence in self.waiting if sequence not in waiting]
        return known

    def overdue(self) -> list[str]:
        """The ids of the requests, waiting or running, whose deadline has passed."""
        now = self._clock()
        if now <= self.next_deadline:
            return []
        self.next_deadline = min((at for at in self._deadlines.values() if at >= now), default=math.inf)
        return [name for name, at in self._deadlines.items() if at < now]

    # ---- a step

    def schedule(self) -> list[ScheduledSequence]:
        """The next step's rows. Pages for them are allocated; `advance` must follow once they are computed.

        Without it they could not be computed: the same rows come again, but for those of removed sequences.
        """
        self._planned = [item for item in self._planned if self._is_known(item.sequence)]
        if not self._planned:
            self._planned = self._plan()
        return self._planned

    def advance(self, scheduled: Seq[ScheduledSequence]) -> None:
        """These of the scheduled rows are computed: their KV exists. The others of them, if any, are parked."""
        self._planned = []
        page_size = self.pages.page_size
        for item in scheduled:
            sequence, start = item.sequence, item.sequence.computed
            end = sequence.computed = start + item.rows
            if end // page_size > start // page_size:
                self._extend_hashes(sequence)
                self.pages.register(sequence.table, sequence.hashes, start, end)
            self.pages.release_past(sequence.table, end)

    def park(self, sequences: Iterable[Sequence]) -> None:
        """These of the scheduled sequences could not be computed: they get no rows until `unpark`."""
        for sequence in sequences:
            self.pages.rewind(sequence.table, sequence.computed)
            self.parked.add(sequence)

    def unpark(self) -> None:
        """All parked sequences are scheduled again."""
        self.parked.clear()

    def finish(self, sequence: Sequence) -> None:
        """Forgets a running sequence that is complete; what the cache knows of it stays."""
        del self.running[sequence.request.request_id]
        self._forget(sequence)

    # ---- its parts

    def _plan(self) -> list[ScheduledSequence]:
        rows: dict[Sequence, int] = {}
        preemptions = self.preemptions
        budget = self._schedule_running(rows)
        if preemptions == self.preemptions or not rows:
            budget = self._admit(rows, budget)
        self._top_up(rows, budget)
        return [ScheduledSequence(sequence, count, count == sequence.pending) for sequence, count in rows.items()]

    def _schedule_running(self, rows: dict[Sequence, int]) -> int:
        """Rows for those that run, in order of rank; returns what is left of the budget."""
        ranked = sorted(self.running.values(), key=lambda sequence: sequence.rank)
        active = len(ranked) - len(self.parked)
        prompts = sum(sequence.pending > 1 for sequence in ranked if sequence not in self.parked)
        budget = self.limits.max_batch_tokens
        for_prompts = max(0, budget - (active - prompts))  # one row is kept for each of the others
        place = 0
        while place < len(ranked) and budget:  # victims leave at the end of `ranked`
            sequence = ranked[place]
            place += 1
            if sequence in self.parked:
                continue
            is_prompt = sequence.pending > 1
            prompts -= is_prompt
            wanted = self._share(sequence, for_prompts, others=prompts > 0) if is_prompt else 1
            given = self._allocate(sequence, wanted, ranked) if wanted else 0
            if given:
                rows[sequence] = given
                budget -= given
                for_prompts -= given * is_prompt
        return budget

    def _share(self, sequence: Sequence, left: int, others: bool) -> int:
        """How many of the `left` rows a prompt may take; `others` want some, too."""
        if sequence.pending <= left or not (others or self.waiting):
            return min(sequence.pending, left)
        return min(left, max(left // 2, self.limits.max_batch_tokens // _LEAST_SHARE, 1))

    def _allocate(self, sequence: Sequence, wanted: int, ranked: list[Sequence]) -> int:
        """Pages for a sequence's next rows, preempting the last of `ranked` while there are none; returns the rows."""
        while not (given := self.pages.room(sequence.table, sequence.computed, wanted)):
            victim = ranked.pop()
            self._preempt(victim)
            if victim is sequence:
                return 0
        self.pages.extend(sequence.table, sequence.computed, sequence.computed + given)
        return given

    def _admit(self, rows: dict[Sequence, int], budget: int) -> int:
        """Rows for those that wait, in turn, as long as they fit; returns what is left of the budget."""
        if not self.waiting:
            return budget
        owed: Counter[str] = Counter()  # pages that the prompts under way are still going to ask for
        for sequence in self.running.values():
            if sequence.pending > 1:
                owed.update(self.pages.owed(sequence.table, len(sequence.tokens) + 1))
        while budget and self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            self._adopt_prefix(sequence)
            owed.update(self.pages.owed(sequence.table, len(sequence.tokens) + 1))
            # Room for the whole of it, or it would soon be preempted for those that run.
            if self.running and any(owed[kind] > pool.available for kind, pool in self.pages.pools.items()):
                self._drop_pages(sequence)
                break
            del self.waiting[0]
            self._enter(sequence)
            before = self.pages.used()
            wanted = self._share(sequence, budget, others=False)
            given = self.pages.room(sequence.table, sequence.computed, wanted)
            assert given, "what fits, or is alone, has room for a row"
            self.pages.extend(sequence.table, sequence.computed, sequence.computed + given)
            owed.subtract({kind: used - before[kind] for kind, used in self.pages.used().items()})
            rows[sequence] = given
            budget -= given
        return budget

    def _enter(self, sequence: Sequence) -> None:
        self._admissions += 1
        if not sequence.admitted:
            sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt_token_ids))
            self.cached_prompt_tokens += sequence.cached_tokens
        sequence.admitted = self._admissions
        self.running[sequence.request.request_id] = sequence

    def _top_up(self, rows: dict[Sequence, int], budget: int) -> None:
        """What sharing has left over, and nobody else wanted, goes to the prompts after all."""
        for sequence, given in rows.items():
            if budget and given < sequence.pending:
                wanted = min(sequence.pending, given + budget)
                rows[sequence] = self.pages.room(sequence.table, sequence.computed, wanted)
                self.pages.extend(sequence.table, sequence.computed, sequence.computed + rows[sequence])
                budget -= rows[sequence] - given

    def _adopt_prefix(self, sequence: Sequence) -> None:
        """Takes over what the cache has of the sequence, but for the last token: its logits are wanted."""
        if sequence.request.params.prompt_logprobs is not None and not sequence.generated:
            return  # all rows' logits are wanted
        page_size = self.pages.page_size
        self._extend_hashes(sequence)
        hashes = sequence.hashes[: (len(sequence.tokens) - 1) // page_size]
        count = self.pages.longest_prefix(hashes)
        self.pages.adopt(sequence.table, hashes[:count])
        sequence.computed = count * page_size

    def _extend_hashes(self, sequence: Sequence) -> None:
        request = sequence.request
        extend_hashes(sequence.hashes, sequence.tokens, self.pages.page_size, request.cache_salt, request.images)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        del self.running[sequence.request.request_id]
        self.parked.discard(sequence)
        self._drop_pages(sequence)
        self._wait(sequence)

    def _drop_pages(self, sequence: Sequence) -> None:
        self.pages.release(sequence.table)
        sequence.computed = 0

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda waiting: waiting.turn)

    def _is_known(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request.request_id) is sequence

    def _forget(self, sequence: Sequence) -> None:
        self.parked.discard(sequence)
        self.pages.release(sequence.table)
        del self._sequences[sequence.request.request_id]
        self._deadlines.pop(sequence.request.request_id, None)
