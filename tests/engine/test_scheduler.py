"""The scheduler: in which order requests run, what they share, and what happens when there is not enough."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from engine.request import ErrorCode, Request, RequestRejected, SamplingParams
from tests.engine.paper_model import Clock, PaperModel, check_pages, make_request, make_scheduler


def random_prompts(rng: random.Random) -> list[tuple[int, ...]]:
    """Prompts that often begin alike."""
    bases = [tuple(rng.randrange(50) for _ in range(rng.randint(1, 40))) for _ in range(3)]
    return [
        base[: rng.randint(1, len(base))] + tuple(rng.randrange(50) for _ in range(rng.randint(0, 8)))
        for base in rng.choices(bases, k=rng.randint(1, 12))
    ]


@dataclass(frozen=True)
class Troubles:
    """How often a step breaks, a sequence of a step is lost, and what is parked is tried again."""

    breaks: float = 0.0
    loses: float = 0.0
    renews: float = 0.0


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("troubles", [Troubles(), Troubles(0.2, 0.1, 0.3)], ids=["calm", "troubled"])
def test_random_schedules(block, troubles):
    """Every request finishes, every row reads what it should, no page leaks: over thousands of schedules."""
    for seed in range(block * 250, (block + 1) * 250):
        run_schedule(random.Random(seed), troubles)


def run_schedule(rng: random.Random, troubles: Troubles) -> None:
    clock = Clock()
    batch, running = rng.randint(1, 24), rng.randint(1, 6)
    scheduler = make_scheduler(
        pages=rng.randint(8, 40),
        page_size=rng.randint(1, 7),
        chunk_size=rng.choice([None, rng.randint(1, 20)]),
        batch=batch,
        running=running,
        clock=clock,
    )
    model = PaperModel(scheduler)
    prompts = random_prompts(rng)
    everything, aborted = {}, set()
    steps = 0
    while prompts or scheduler.running or scheduler.waiting:
        if (prompts and rng.random() < 0.3) or not (scheduler.running or scheduler.waiting):
            name = str(len(prompts))
            logprobs = rng.choice([None, None, None, 0])
            params = SamplingParams(max_tokens=rng.randint(1, 20), prompt_logprobs=logprobs)
            salt = rng.choice(["", "", "other"])
            request = Request(name, prompts.pop(), params, priority=rng.randint(-2, 2), cache_salt=salt)
            try:
                scheduler.check(request, queued=len(scheduler.waiting))
            except RequestRejected as error:
                assert error.field == "max_tokens"
                assert len(request.prompt_token_ids) + params.max_tokens > scheduler.pages.longest_sequence()
                continue
            scheduler.add(request)
            everything[name] = scheduler.waiting[[seq.request for seq in scheduler.waiting].index(request)]
        if everything and rng.random() < 0.03:
            aborted.update(seq.request.request_id for seq in scheduler.remove([rng.choice(list(everything))]))
            check_pages(scheduler)
        if not (scheduler.running or scheduler.waiting):
            continue
        clock.now += rng.random()
        if rng.random() < troubles.renews:
            scheduler.unpark()
        if rng.random() < troubles.breaks:
            broken = model.break_step()
            if rng.random() < 0.3:
                aborted.update(seq.request.request_id for seq in scheduler.remove([rng.choice(list(everything))]))
            left = [item for item in broken if item.sequence.request.request_id not in aborted]
            assert not left or scheduler.schedule() == left, "a step that broke is scheduled as it was"
            if not (scheduler.running or scheduler.waiting):
                continue
        scheduled = model.step(lost=lambda _: rng.random() < troubles.loses)
        assert scheduled or scheduler.parked, "a step with work must compute something"
        assert sum(item.rows for item in scheduled) <= batch
        assert len(scheduler.running) <= running
        for item in scheduled:
            if item.sequence.request.params.prompt_logprobs is not None:
                assert item.sequence.cached_tokens == 0
        steps += 1
        assert steps < 20_000, "requests do not end"
    assert set(scheduler.pages.used().values()) == {0}
    for name in everything.keys() - aborted:
        sequence = everything[name]
        assert sequence.generated == sequence.request.params.max_tokens


@pytest.mark.parametrize("block", range(4))
def test_scheduling_twice_is_scheduling_once(block):
    """Over whole runs: steps that break leave no trace in what comes after them."""
    for seed in range(block * 100, (block + 1) * 100):
        histories = []
        for breaks in (False, True):
            rng = random.Random(seed)
            model = PaperModel(make_scheduler(pages=rng.randint(10, 30), page_size=3, chunk_size=8, batch=9))
            for number, prompt in enumerate(random_prompts(rng)[:5]):
                model.scheduler.add(make_request(str(number), prompt[:20], max_tokens=8, priority=rng.randint(0, 2)))
            history = []
            while model.scheduler.running or model.scheduler.waiting:
                for _ in range(breaks * rng.randint(0, 2)):
                    model.break_step()
                history.append([(item.sequence.request.request_id, item.rows) for item in model.step()])
            histories.append((history, model.scheduler.preemptions))
        assert histories[0] == histories[1]


def test_a_parked_sequence_waits_while_others_run():
    scheduler = make_scheduler(page_size=4, chunk_size=8)
    model = PaperModel(scheduler)
    scheduler.add(make_request("parked", 30, max_tokens=6))
    scheduler.add(make_request("runs", 3, max_tokens=20))
    while len(scheduler.parked) < 1:
        model.step(lost=lambda sequence: sequence.request.request_id == "parked" and sequence.generated == 3)
    names = {item.sequence.request.request_id for _ in range(5) for item in model.step()}
    assert names == {"runs"} and set(scheduler.running) == {"parked", "runs"}
    scheduler.unpark()
    assert {item.sequence.request.request_id for item in model.step()} == {"parked", "runs"}
    assert model.finish_all().count("parked") == 2


@pytest.mark.parametrize("how", ["removed", "preempted"])
def test_what_is_parked_can_go(how):
    scheduler = make_scheduler(pages=6, page_size=4)
    model = PaperModel(scheduler)
    scheduler.add(make_request("stays", 8, max_tokens=14))
    scheduler.add(make_request("goes", 4, max_tokens=6))
    model.step()
    model.step(lost=lambda sequence: sequence.request.request_id == "goes")
    assert len(scheduler.parked) == 1 and scheduler.pages.used() == {"full": 3 + 1}
    if how == "removed":
        scheduler.remove(["goes"])
    for _ in range(12):
        model.step()
    assert not scheduler.parked and scheduler.preemptions == (how == "preempted")
    assert model.finish_all().count("goes") == (5 if how == "preempted" else 0)


def test_a_small_request_runs_when_the_only_active_one_gave_way():
    scheduler = make_scheduler(pages=7, page_size=4, running=2)
    model = PaperModel(scheduler)
    scheduler.add(make_request("parked", 15, max_tokens=10))
    scheduler.add(make_request("gives way", 8, max_tokens=12, priority=1))
    for _ in range(3):
        model.step(lost=lambda sequence: sequence.request.request_id == "parked" and sequence.generated == 1)
    scheduler.add(make_request("urgent", 2, max_tokens=2, priority=-1))
    while not scheduler.preemptions:
        names = [item.sequence.request.request_id for item in model.step()]
    assert names == ["urgent"] and scheduler.waiting[0].request.request_id == "gives way"
    scheduler.unpark()
    model.finish_all()


def test_an_answer_goes_on_behind_what_is_generated_elsewhere():
    prompt, generated = tuple(range(10)), tuple(range(50, 60))
    scheduler = make_scheduler(page_size=4, running=1)
    model = PaperModel(scheduler)
    scheduler.add(make_request("before", (*prompt, *generated), max_tokens=1))
    model.finish_all()
    scheduler.add(make_request("new", 4))
    scheduler.add(make_request("resumed", prompt, max_tokens=13, generated_token_ids=generated))
    sequence = scheduler.waiting[0]
    assert sequence.request.request_id == "resumed" and sequence.generated == 10
    assert model.finish_all()[:3] == ["resumed"] * 3
    assert sequence.cached_tokens == scheduler.cached_prompt_tokens == 10  # of the 16 that the cache had


def test_decoding_goes_on_beside_a_long_prompt():
    scheduler = make_scheduler(pages=100, batch=8)
    model = PaperModel(scheduler)
    scheduler.add(make_request("short", 2, max_tokens=10))
    model.step()
    scheduler.add(make_request("long", 40))
    rows = {item.sequence.request.request_id: item.rows for item in model.step()}
    assert rows == {"short": 1, "long": 7}


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = make_scheduler(pages=1000, batch=16)
    model = PaperModel(scheduler)
    scheduler.add(make_request("long", 1000))
    model.step()
    scheduler.add(make_request("short", 6))
    rows = {item.sequence.request.request_id: item.rows for item in model.step()}
    assert rows == {"long": 10, "short": 6}  # the half that the short one left over goes back to the long one


def test_a_long_prompt_does_not_wait_for_short_ones():
    scheduler = make_scheduler(pages=1000, batch=16, running=8)
    model = PaperModel(scheduler)
    scheduler.add(make_request("long", 400))
    for step in range(50):
        for number in range(4):
            scheduler.add(make_request(f"short-{step}-{number}", 12, max_tokens=1))
        if any(item.completes and item.sequence.request.request_id == "long" for item in model.step()):
            break
    assert step + 1 <= 400 // (16 // 2) + 2


def test_the_last_admitted_gives_way_and_comes_back():
    scheduler = make_scheduler(pages=4, page_size=2, running=2)
    scheduler.add(make_request("first", 3, max_tokens=5))
    scheduler.add(make_request("second", 2, max_tokens=4))
    order = PaperModel(scheduler).finish_all()
    assert scheduler.preemptions >= 1
    assert order.index("first") < order.index("second")
    assert order.count("first") == 5 and order.count("second") == 4


def test_the_lowest_priority_gives_way_first():
    scheduler = make_scheduler(pages=6, page_size=2, running=3)
    model = PaperModel(scheduler)
    scheduler.add(make_request("background", 3, max_tokens=6, priority=5))
    model.step()
    scheduler.add(make_request("urgent", 3, max_tokens=8, priority=-1))
    model.step()
    assert set(scheduler.running) == {"background", "urgent"}
    while not scheduler.preemptions:
        model.step()
    assert "urgent" in scheduler.running and scheduler.waiting[0].request.request_id == "background"
    order = model.finish_all()
    assert order.count("background") > 0 and order[-1] == "background"


def test_a_preempted_sequence_comes_back_through_the_cache():
    scheduler = make_scheduler(pages=12, page_size=2, running=2)
    model = PaperModel(scheduler)
    scheduler.add(make_request("first", 3, max_tokens=12))
    scheduler.add(make_request("second", 8, max_tokens=8))
    model.finish_all()
    assert scheduler.preemptions == 1
    assert model.computed_rows < 3 + 11 + 8 + 7 + 8  # less than one more prefill of the second
    assert scheduler.cached_prompt_tokens == 0  # its own pages are no hit


def waiting_names(*requests: Request, clock: Clock, seconds: float, ageing_s: float) -> list[str]:
    scheduler = make_scheduler(clock=clock, ageing_s=ageing_s)
    for request in requests:
        scheduler.add(request)
        clock.now += seconds
    return [sequence.request.request_id for sequence in scheduler.waiting]


def test_priority_then_arrival():
    asked = [make_request(name, 1, priority=priority) for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -3))]
    assert waiting_names(*asked, clock=Clock(), seconds=0.1, ageing_s=10.0) == ["d", "b", "a", "c"]
    assert waiting_names(*asked, clock=Clock(), seconds=11.0, ageing_s=10.0) == ["d", "a", "b", "c"]


def test_a_stream_of_urgent_requests_does_not_starve_the_others():
    clock = Clock()
    scheduler = make_scheduler(running=1, clock=clock, ageing_s=5.0)
    model = PaperModel(scheduler)
    scheduler.add(make_request("patient", 3, max_tokens=2, priority=3))
    for second in range(100):
        scheduler.add(make_request(f"urgent-{second}", 3, max_tokens=2))
        scheduler.add(make_request(f"more-{second}", 3, max_tokens=2))
        clock.now += 1.0
        model.step()
        if "patient" in scheduler.running:
            break
    # Three levels are 15 seconds, in which 30 others came; each of these takes two steps.
    assert 55 <= second <= 62


def test_nobody_overtakes_a_prompt_that_does_not_fit_yet():
    scheduler = make_scheduler(pages=16, page_size=4)
    model = PaperModel(scheduler)
    scheduler.add(make_request("runs", 30, max_tokens=10))
    model.step()
    scheduler.add(make_request("long", 40))
    scheduler.add(make_request("short", 1))
    model.step()
    assert set(scheduler.running) == {"runs"}
    while "short" not in scheduler.running:
        model.step()
    assert "long" in scheduler.running and "runs" not in scheduler.running
    model.finish_all()


def test_chunked_layers_keep_one_chunk_only():
    scheduler = make_scheduler(pages=64, page_size=4, chunk_size=8)
    model = PaperModel(scheduler)
    scheduler.add(make_request("one", 30, max_tokens=60))
    while scheduler.running or scheduler.waiting:
        model.step()
        assert scheduler.pages.used()["chunked"] <= 2
    assert scheduler.pages.used() == {"full": 0, "chunked": 0}


def test_a_step_over_many_chunks_takes_pages_for_its_last_one_only():
    scheduler = make_scheduler(pages=64, page_size=4, chunk_size=10, batch=200)
    model = PaperModel(scheduler)
    scheduler.add(make_request("one", 93, max_tokens=2))
    model.step()
    assert scheduler.pages.used() == {"full": 24, "chunked": 2}  # 92 lies in the chunk from 90, in pages 22 and 23
    model.finish_all()


def test_a_full_queue_is_said_as_such():
    scheduler = make_scheduler(waiting=1)
    with pytest.raises(RequestRejected, match=r"engine\.max_waiting") as caught:
        scheduler.check(make_request("late", 1), queued=1)
    assert caught.value.code is ErrorCode.RESOURCE_EXHAUSTED


def test_overdue_requests_are_named():
    clock = Clock()
    scheduler = make_scheduler(clock=clock, running=1)
    scheduler.add(make_request("runs", 1, deadline=clock.now + 20))
    PaperModel(scheduler).step()
    scheduler.add(make_request("late", 1, deadline=clock.now + 1))
    scheduler.add(make_request("early", 1, deadline=clock.now + 10))
    scheduler.add(make_request("any", 1))
    assert scheduler.overdue() == []
    clock.now += 2
    assert scheduler.overdue() == ["late"]
    scheduler.remove(["late"])
    assert scheduler.overdue() == []
    clock.now += 30
    assert sorted(scheduler.overdue()) == ["early", "runs"]
