"""The scheduler and its pages, over thousands of random schedules: nothing leaks and everything finishes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pages import LayerGroup, PageAllocator
from engine.request import ErrorCode, Request, RequestRejected, SamplingParams
from engine.scheduler import Limits, ScheduledSequence, Scheduler


def make_scheduler(
    *,
    pages: int = 32,
    page_size: int = 4,
    chunk_size: int | None = None,
    batch: int = 16,
    running: int = 4,
    waiting: int = 100,
) -> Scheduler:
    groups = {"full": LayerGroup(pages)}
    if chunk_size is not None:
        groups["chunked"] = LayerGroup(pages, chunk_size)
    seeds = itertools.count()
    return Scheduler(
        Limits(batch, running, waiting),
        PageAllocator(groups, page_size),
        clock=lambda: 0.0,
        new_seed=lambda: next(seeds),
    )


def make_request(name: str, prompt: int, max_tokens: int = 4) -> Request:
    return Request(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))


def run_step(scheduler: Scheduler) -> list[ScheduledSequence]:
    """One step with a model that always says token 1; sequences end at max_tokens."""
    scheduled = scheduler.schedule()
    completing = [item.sequence for item in scheduled if item.completes]
    scheduler.advance(scheduled)
    for sequence in completing:
        sequence.tokens.append(1)
        if sequence.generated >= sequence.request.params.max_tokens:
            scheduler.finish(sequence)
    return scheduled


def check_pages(scheduler: Scheduler) -> None:
    """Every page is free or belongs to one sequence, and every position that is still attended to has its page."""
    allocator = scheduler.pages
    for kind, pool in allocator.pools.items():
        owned = [page for seq in scheduler.running for page in seq.table.pages[kind] if page is not None]
        assert len(owned) == len(set(owned))
        assert len(owned) + pool.free == pool.total
        for sequence in scheduler.running:
            first = allocator.groups[kind].first_needed(sequence.computed)
            table = sequence.table.pages[kind]
            needed = range(first // allocator.page_size, -(-sequence.computed // allocator.page_size))
            assert all(table[index] is not None for index in needed)


@settings(max_examples=300, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12),
    pages=st.integers(18, 40),
    page_size=st.integers(1, 7),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    batch=st.integers(1, 24),
    running=st.integers(1, 6),
    data=st.data(),
)
def test_every_request_finishes_and_no_page_leaks(prompts, pages, page_size, chunk_size, batch, running, data):
    scheduler = make_scheduler(pages=pages, page_size=page_size, chunk_size=chunk_size, batch=batch, running=running)
    accepted = []
    for number, (prompt, max_tokens) in enumerate(prompts):
        request = make_request(str(number), prompt, max_tokens)
        try:
            scheduler.check(request, queued=len(scheduler.waiting))
        except RequestRejected as error:
            assert error.field == "max_tokens"
            assert prompt + max_tokens > scheduler.pages.longest_sequence()
            continue
        scheduler.add(request)
        accepted.append(str(number))
    everything = {seq.request.request_id: seq for seq in scheduler.waiting}
    aborted: set[str] = set()
    for _ in range(5000):
        if not scheduler.running and not scheduler.waiting:
            break
        scheduled = run_step(scheduler)
        assert scheduled, "a step with work must compute something"
        assert sum(item.rows for item in scheduled) <= batch
        assert len(scheduler.running) <= running
        check_pages(scheduler)
        if accepted and data.draw(st.integers(0, 20)) == 0:
            victim = data.draw(st.sampled_from(accepted))
            aborted.update(seq.request.request_id for seq in scheduler.remove([victim]))
            check_pages(scheduler)
    assert not scheduler.running and not scheduler.waiting
    assert all(pool.free == pool.total for pool in scheduler.pages.pools.values())
    for name in set(accepted) - aborted:
        assert everything[name].generated == everything[name].request.params.max_tokens


def test_decoding_goes_on_beside_a_long_prompt():
    scheduler = make_scheduler(pages=100, batch=8)
    scheduler.add(make_request("short", 2, max_tokens=10))
    run_step(scheduler)
    scheduler.add(make_request("long", 40))
    rows = {item.sequence.request.request_id: item.rows for item in run_step(scheduler)}
    assert rows == {"short": 1, "long": 7}


def test_the_last_admitted_gives_way_and_comes_back():
    scheduler = make_scheduler(pages=4, page_size=2, running=2)
    scheduler.add(make_request("first", 3, max_tokens=5))
    scheduler.add(make_request("second", 2, max_tokens=4))
    order = []
    while scheduler.running or scheduler.waiting:
        order += [item.sequence.request.request_id for item in run_step(scheduler) if item.completes]
        check_pages(scheduler)
    assert scheduler.preemptions >= 1
    assert order.index("first") < order.index("second")
    assert order.count("first") == 5 and order.count("second") == 4


def test_chunked_layers_keep_one_chunk_only():
    scheduler = make_scheduler(pages=64, page_size=4, chunk_size=8)
    scheduler.add(make_request("one", 30, max_tokens=60))
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
        used = scheduler.pages.used()
        assert used["chunked"] <= 2 + 4  # a chunk, and the pages of a step of 16 rows
    assert scheduler.pages.used() == {"full": 0, "chunked": 0}


def test_a_full_queue_is_said_as_such():
    scheduler = make_scheduler(waiting=1)
    with pytest.raises(RequestRejected, match=r"engine\.max_waiting") as caught:
        scheduler.check(make_request("late", 1), queued=1)
    assert caught.value.code is ErrorCode.RESOURCE_EXHAUSTED


def test_overdue_requests_are_named():
    scheduler = make_scheduler()
    scheduler.add(Request("late", (1,), SamplingParams(), deadline=-1.0))
    scheduler.add(Request("early", (1,), SamplingParams(), deadline=1.0))
    scheduler.add(Request("any", (1,), SamplingParams()))
    assert [seq.request.request_id for seq in scheduler.overdue()] == ["late"]
