"""A model on paper: KV pages that hold what was written to them, checked against what every row has to read.

What stands for a key and value at a position is all that it depends on: the salt and the tokens up to there. Rows are
written and read as llama4.plan does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from engine.pages import LayerGroup, LayerKind, PageAllocator
from engine.request import Request, SamplingParams
from engine.scheduler import Limits, Scheduler
from engine.sequence import ScheduledSequence, Sequence


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_scheduler(
    *,
    pages: int = 32,
    page_size: int = 4,
    chunk_size: int | None = None,
    batch: int = 16,
    running: int = 4,
    waiting: int = 100,
    ageing_s: float = 10.0,
    clock: Callable[[], float] | None = None,
) -> Scheduler:
    groups: dict[LayerKind, LayerGroup] = {"full": LayerGroup(pages)}
    if chunk_size is not None:
        groups["chunked"] = LayerGroup(pages, chunk_size)
    return Scheduler(
        Limits(batch, running, waiting, ageing_s),
        PageAllocator(groups, page_size),
        clock=clock or Clock(),
    )


def make_request(name: str, prompt: int | tuple[int, ...], max_tokens: int = 4, **fields: object) -> Request:
    """`prompt`: its tokens, or only how many; these are then like no other request's."""
    tokens = prompt if isinstance(prompt, tuple) else tuple(hash((name, i)) % 2**31 for i in range(prompt))
    return Request(name, tokens, SamplingParams(max_tokens=max_tokens), **fields)


class PaperModel:
    """Runs a scheduler's steps. Sequences end at max_tokens; a token depends on the tokens before it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.written: dict[tuple[LayerKind, int, int], int] = {}
        self.computed_rows = 0

    def step(self, lost: Callable[[Sequence], bool] = lambda sequence: False) -> list[ScheduledSequence]:
        """One step, and what was scheduled for it; the sequences that are `lost` give nothing and are parked."""
        scheduled = self.scheduler.schedule()
        self._check_writers(scheduled)
        parked = {item.sequence for item in scheduled if lost(item.sequence)}
        for item in scheduled:
            self._compute(item, spoilt=item.sequence in parked)
        computed = [item for item in scheduled if item.sequence not in parked]
        completing = [item.sequence for item in computed if item.completes]
        for sequence in completing:
            sequence.tokens.append(hash(tuple(sequence.tokens)) % 1000)
        self.scheduler.park(parked)
        self.scheduler.advance(computed)
        for sequence in completing:
            if sequence.generated >= sequence.request.params.max_tokens:
                self.scheduler.finish(sequence)
        check_pages(self.scheduler)
        return scheduled

    def break_step(self) -> list[ScheduledSequence]:
        """A step that is written but does not count; what was scheduled for it."""
        scheduled = self.scheduler.schedule()
        self._check_writers(scheduled)
        for item in scheduled:
            self._compute(item, spoilt=True)
        check_pages(self.scheduler)
        return scheduled

    def finish_all(self, limit: int = 10_000) -> list[str]:
        """Steps until nothing is left; the ids in the order in which their tokens came."""
        order = []
        while self.scheduler.running or self.scheduler.waiting:
            order += [item.sequence.request.request_id for item in self.step() if item.completes]
            limit -= 1
            assert limit, "requests do not end"
        return order

    def _compute(self, item: ScheduledSequence, spoilt: bool) -> None:
        sequence, start = item.sequence, item.sequence.computed
        end = start + item.rows
        self.computed_rows += item.rows * (not spoilt)
        states = _states(sequence, end)
        size = self.scheduler.pages.page_size
        for kind, group in self.scheduler.pages.groups.items():
            table = sequence.table.pages[kind]
            assert len(table) == -(-end // size)
            for position in range(group.first_needed(start), start):
                found = self.written[kind, table[position // size], position % size]
                assert found == states[position], "a row reads what another sequence wrote"
            for position in range(max(start, group.first_needed(end - 1)), end):
                page = table[position // size]
                assert page is not None
                self.written[kind, page, position % size] = 0 if spoilt else states[position]

    def _check_writers(self, scheduled: list[ScheduledSequence]) -> None:
        """A page that is written to has one holder."""
        size = self.scheduler.pages.page_size
        for item in scheduled:
            start, end = item.sequence.computed, item.sequence.computed + item.rows
            for kind, group in self.scheduler.pages.groups.items():
                first = max(start, group.first_needed(end - 1)) // size
                for page in item.sequence.table.pages[kind][first:]:
                    assert page is not None and self.scheduler.pages.pools[kind].holders(page) == 1


def _states(sequence: Sequence, end: int) -> list[int]:
    state, states = hash(sequence.request.cache_salt), []
    for token in sequence.tokens[:end]:
        state = hash((state, token))
        states.append(state)
    return states


def check_pages(scheduler: Scheduler) -> None:
    """Each page has as many holders as sequences have it; the others are free, or the cache's."""
    allocator = scheduler.pages
    assert all(not sequence.table.length and not sequence.computed for sequence in scheduler.waiting)
    assert scheduler.parked <= set(scheduler.running.values())
    for sequence in scheduler.parked:
        assert sequence.table.length == -(-sequence.computed // allocator.page_size)
    for kind, pool in allocator.pools.items():
        owned = Counter(
            page for sequence in scheduler.running.values() for page in sequence.table.pages[kind] if page is not None
        )
        assert all(pool.holders(page) == owned[page] for page in range(pool.total))
        assert pool.total == len(owned) + pool.available
        for sequence in scheduler.running.values():
            table, first = sequence.table.pages[kind], allocator.groups[kind].first_needed(sequence.computed)
            assert all(page is None for page in table[: first // allocator.page_size])
