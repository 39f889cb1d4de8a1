"""The prefix cache: what it takes over, what it keeps apart, and that nobody sees it in the tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.prefix_cache import PagePool, extend_hashes
from engine.request import Request, SamplingParams
from tests.engine.paper_model import PaperModel, make_request, make_scheduler
from tests.single import SingleProcess

VOCABULARY = 96


def hashes(tokens: list[int], page_size: int = 2, salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, tokens, page_size, salt)
    return found


def test_hashes_are_chained_and_the_same_on_every_machine():
    assert [key.hex() for key in hashes([1, 2, 3, 2**31, 5])] == [
        "995c06853284bbb846771fbc0096230b",
        "2d9442e15aeed4014ec531e5e446b6ad",
    ]
    assert hashes([1, 2, 3, 4])[0] == hashes([1, 2, 9, 9])[0] != hashes([1, 2], salt="x")[0]
    assert hashes([9, 2, 3, 4])[1] != hashes([1, 2, 3, 4])[1]
    grown = hashes([1, 2, 3])
    extend_hashes(grown, [1, 2, 3, 4, 5], 2, "")
    assert grown == hashes([1, 2, 3, 4])


def test_a_pool_evicts_what_was_unused_for_longest():
    pool = PagePool(3)
    a, b, c = pool.take(3)
    for page, key in ((a, b"a"), (b, b"b")):
        pool.register(page, key)
    pool.register(c, b"a")  # the first page of a key stays
    assert pool.find(b"a") == a
    pool.drop([c, b, a])
    assert (pool.available, pool.cached) == (3, 2)
    found = pool.find(b"b")
    assert found == b
    pool.hold(b)
    pool.hold(b)
    pool.drop([b])
    assert pool.cached == 1 and pool.holders(b) == 1
    pool.drop([b])
    assert pool.take(2) == [c, a]  # free first; then `a`, as `b` was used later
    assert pool.find(b"a") is None and pool.find(b"b") == b


def cached_tokens(prompt: tuple[int, ...], before: tuple[int, ...], **kwargs: int | None) -> int:
    """How much of a prompt is found after another one."""
    scheduler = make_scheduler(pages=100, **kwargs)
    model = PaperModel(scheduler)
    scheduler.add(make_request("before", before, max_tokens=1))
    model.finish_all()
    scheduler.add(make_request("after", prompt, max_tokens=1))
    sequence = scheduler.waiting[0]
    model.finish_all()
    assert scheduler.cached_prompt_tokens == sequence.cached_tokens
    return sequence.cached_tokens


def test_full_pages_are_found_but_for_the_last_token():
    tokens = tuple(range(40))
    assert cached_tokens(tokens, tokens) == 36
    assert cached_tokens((*tokens, 1), tokens) == 40
    assert cached_tokens(tokens[:21], tokens) == 20
    assert cached_tokens((7, *tokens), tokens) == 0


def test_prefixes_end_inside_chunks_and_at_their_borders():
    tokens = tuple(range(60))
    # Page by page: the pages of past chunks stay known, so a prefix may end in any of them.
    assert cached_tokens(tokens[:21], tokens, page_size=4, chunk_size=10, batch=4) == 20
    assert cached_tokens(tokens[:18], tokens, page_size=4, chunk_size=10, batch=4) == 16
    # One step over all chunks writes the last one only (from 50): before that, a prefix ends at a border.
    assert cached_tokens(tokens, tokens, page_size=4, chunk_size=10, batch=100) == 56
    assert cached_tokens(tokens[:50], tokens, page_size=4, chunk_size=10, batch=100) == 40
    assert cached_tokens(tokens[:39], tokens, page_size=4, chunk_size=10, batch=100) == 20


def test_answers_are_found_as_well():
    scheduler = make_scheduler(pages=100, page_size=4)
    model = PaperModel(scheduler)
    scheduler.add(make_request("first", 10, max_tokens=20))
    sequence = scheduler.waiting[0]
    model.finish_all()
    scheduler.add(make_request("second", (*sequence.tokens, 1, 2, 3), max_tokens=1))
    second = scheduler.waiting[0]
    model.finish_all()
    assert second.cached_tokens == 28  # the last of the 30 tokens was never computed


def test_requests_that_run_at_once_share_pages():
    scheduler = make_scheduler(pages=100, page_size=4, batch=64)
    model = PaperModel(scheduler)
    tokens = tuple(range(40))
    scheduler.add(make_request("first", tokens, max_tokens=10))
    model.step()
    scheduler.add(make_request("second", tokens, max_tokens=10))
    model.step()
    assert scheduler.pages.used() == {"full": 11 + 1}  # the second computes its last token again, in a page of its own
    model.finish_all()


def test_salts_keep_apart():
    scheduler = make_scheduler(pages=100)
    model = PaperModel(scheduler)
    for name, salt in (("a", "x"), ("b", "y"), ("c", ""), ("d", "x")):
        scheduler.add(make_request(name, tuple(range(40)), cache_salt=salt))
        sequence = scheduler.waiting[0]
        model.finish_all()
        assert sequence.cached_tokens == (36 if name == "d" else 0)


def test_prompt_logprobs_are_computed_but_remembered():
    scheduler = make_scheduler(pages=100)
    model = PaperModel(scheduler)
    for name, wanted, expected in (("a", 0, 0), ("b", 0, 0), ("c", None, 36)):
        params = SamplingParams(max_tokens=1, prompt_logprobs=wanted)
        scheduler.add(Request(name, tuple(range(40)), params))
        sequence = scheduler.waiting[0]
        model.finish_all()
        assert sequence.cached_tokens == expected


def test_the_cache_gives_way():
    scheduler = make_scheduler(pages=20, page_size=4, chunk_size=10)
    model = PaperModel(scheduler)
    for number in range(30):
        scheduler.add(make_request(str(number), 60, max_tokens=10))
        model.finish_all()
    assert scheduler.preemptions == 0
    assert scheduler.pages.used() == {"full": 0, "chunked": 0}
    assert scheduler.pages.cached()["full"] >= 16


# ---- with the real network


@pytest.fixture(params=[(5, 16), (8, 7), (16, 64), (3, 64)], ids=lambda p: f"page_{p[0]}_batch_{p[1]}")
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[SingleProcess]:
    page_size, batch = request.param
    running = SingleProcess(checkpoint, page_size=page_size, pages=200, max_batch_tokens=batch)
    yield running
    running.close()


def test_cached_prefixes_do_not_show_in_the_tokens(engine):
    """Conversations that grow and branch; each prompt also runs under a salt of its own, which finds nothing."""
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=0)
    history: list[tuple[int, ...]] = [tuple(rng.randrange(VOCABULARY) for _ in range(30))]
    found = 0
    for number in range(14):
        base = rng.choice(history)
        prompt = base[: rng.randint(len(base) // 2, len(base))] + tuple(
            rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))
        )
        cached = Request(f"cached-{number}", prompt, params)
        fresh = replace(cached, request_id=f"fresh-{number}", cache_salt=str(number))
        for one in (fresh, cached) if number % 2 else (cached, fresh):
            engine.run([one])
        first = engine.outputs[cached.request_id][0]
        assert engine.outputs[fresh.request_id][0].cached_tokens == 0
        found += first.cached_tokens
        answers = []
        for one in (cached, fresh):
            outputs = engine.outputs[one.request_id]
            assert all(output.cached_tokens == 0 for output in outputs[1:])
            answers.append([token for output in outputs for token in output.token_ids])
            scores = [entry.logprob for output in outputs for entry in output.logprobs]
            answers.append([round(score, 3) for score in scores])
        assert answers[0] == answers[2]
        assert answers[1] == pytest.approx(answers[3], abs=2e-3)
        history.append((*prompt, *answers[0]))
    load = engine.engine.load()
    assert load.cached_prompt_tokens == found > 200
    assert set(load.kv_pages_used.values()) == {0} and all(load.kv_pages_cached.values())


def test_eviction_and_preemption_do_not_show_in_the_tokens(checkpoint):
    rng = random.Random(2)
    stem = tuple(rng.randrange(VOCABULARY) for _ in range(40))
    prompts = [(*stem[: rng.randint(5, 40)], number) for number in range(24)]
    asked = [
        Request(f"{n}", prompt, SamplingParams(temperature=0.7, seed=n, max_tokens=20))
        for n, prompt in enumerate(prompts)
    ]
    answers = []
    for pages in (400, 24):
        single = SingleProcess(checkpoint, page_size=5, pages=pages, max_batch_tokens=40, max_running=8)
        try:
            answers.append(single.tokens(asked))
            load = single.engine.load()
            assert load.cached_prompt_tokens > 0 and (load.preemptions > 0) == (pages == 24)
        finally:
            single.close()
    assert answers[0] == answers[1]
