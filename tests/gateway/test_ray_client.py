"""The gateway's way to the engines, over handles that stand in for Ray's: what comes through, and what survives."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace

import pytest
from ray.exceptions import RayActorError

from actors import engine_links, ray_client
from actors.ray_client import RayEngineClient
from engine.request import (
    GATEWAY_SILENT,
    SHUTTING_DOWN,
    ErrorCode,
    FinishReason,
    RequestError,
    RequestOutput,
    RequestRejected,
)
from tests.gateway.client_streams import PARAMS, Stream, begin, connect, last, request, until
from tests.gateway.fake_actors import DRAINING, FULL, OF_A_CLIENT, FakeController, FakeEngine

STOPPED = RequestError(ErrorCode.UNAVAILABLE, "the engine stopped: a member is gone", retryable=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "_FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(engine_links, "_FIRST_RETRY_S", 0.002)


@pytest.fixture
async def a() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def b() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(a: FakeEngine) -> RayEngineClient:
    return await connect(FakeController(a=a))


@pytest.fixture
async def pair(a: FakeEngine, b: FakeEngine) -> RayEngineClient:
    """A client of two engines; the first request goes to `a`."""
    return await connect(FakeController(a=a, b=b))


# ---- while nothing happens


async def test_outputs_reach_their_requests(client, a):
    both = [Stream(client, request(name)) for name in ("one", "two")]
    await until(lambda: len(a.requests) == 2)
    a.send(RequestOutput("two", (5,)), last("one", 6), RequestOutput("unknown", (1,)))
    a.send(last("two", 7))
    for stream in both:
        await stream.end()
    assert [stream.tokens for stream in both] == [[6], [5, 7]]
    await asyncio.sleep(0.01)
    assert a.calls == ["submit one", "submit two"]


async def test_requests_are_shared_out(pair, a, b):
    streams = [await begin(pair, engine, request(str(n))) for n, engine in enumerate([a, b, a, b])]
    a.send(last("0", 1), last("2", 1))
    await streams[0].end()
    await streams[2].end()
    await begin(pair, a, request("4"))


async def test_requests_without_a_seed_get_one(client, a):
    for name in ("one", "two"):
        await begin(client, a, request(name))
    await begin(client, a, replace(request("three"), params=replace(PARAMS, seed=7)))
    assert [one.params.seed for one in a.requests.values()] == [100, 101, 7]


async def test_a_rejection_is_raised_and_not_aborted(client, a):
    a.rejection = FULL
    stream = Stream(client, request("one"))
    with pytest.raises(RequestRejected, match="full"):
        await stream.end()
    await asyncio.sleep(0.01)
    assert a.calls == ["submit one"]


async def test_a_client_that_goes_away_before_admission_is_aborted_after_it(client, a):
    a.admit.clear()
    stream = Stream(client, request("one"))
    await asyncio.sleep(0.01)
    stream.task.cancel()
    await asyncio.wait([stream.task])
    await asyncio.sleep(0.01)
    assert a.calls == []
    a.admit.set()
    await until(lambda: a.calls == ["submit one", "abort one"])


async def test_a_client_that_goes_away_is_aborted_even_if_the_engine_s_answer_is_lost(client, a):
    a.answers_get_lost = True
    a.admit.clear()
    stream = Stream(client, request("one"))
    await asyncio.sleep(0.01)
    stream.task.cancel()
    await asyncio.wait([stream.task])
    a.admit.set()
    await until(lambda: a.calls == ["submit one", "abort one"])


async def test_a_client_that_goes_away_later_is_aborted_at_once(client, a):
    stream = await begin(client, a, request("one"), 5)
    stream.task.cancel()
    await until(lambda: a.calls == ["submit one", "abort one"])


async def test_changes_are_asked_of_the_controller_apart_from_their_client(a):
    controller = FakeController(a=a)
    client = await connect(controller)
    OF_A_CLIENT.set(True)
    await client.scale("experts", 3)
    await client.move(5, 1, layer=0)
    await client.drain_slot(2)
    assert await client.rebalance()
    assert await client.drain() == 3
    assert controller.changes == [
        ("scale", "experts", 3),
        ("move", 5, 1, 0, None),
        ("drain_slot", 2),
        ("rebalance",),
        ("drain",),
    ]


async def test_engines_hear_that_the_gateway_lives(a, monkeypatch):
    monkeypatch.setattr(engine_links, "_KEEP_ALIVE_S", 0.001)
    await connect(FakeController(a=a))
    await until(lambda: len(a.kept_alive) > 3)
    assert set(a.kept_alive) == a.gateways


# ---- an engine is lost


@pytest.mark.parametrize("how", ["dies", "stops", "leaves"])
async def test_an_answer_goes_on_at_another_engine(pair, a, b, how):
    one = request("one", generated_token_ids=(3, 4), cache_salt="x")
    stream = await begin(pair, a, one, 5, 6)
    if how == "dies":
        a.send(RequestOutput("one", (7,)))  # it comes before the death, so it counts
        a.die()
    else:
        a.send(RequestOutput("one", (7,)))
        a.end("one", STOPPED if how == "stops" else SHUTTING_DOWN)
    await until(lambda: b.requests)
    asked = b.requests["one"]
    assert asked == replace(one, params=asked.params, generated_token_ids=(3, 4, 5, 6, 7))
    assert asked.params == replace(PARAMS, seed=100)  # the same as before
    a.send(RequestOutput("one", (99,)), last("one", 99))
    b.send(RequestOutput("one", (8,)))
    b.send(last("one", 9))
    assert (await stream.end()).finish_reason is FinishReason.LENGTH
    assert stream.tokens == [5, 6, 7, 8, 9]


async def test_every_request_of_an_engine_goes_on(pair, a, b):
    streams = {str(n): Stream(pair, request(str(n))) for n in range(20)}
    await until(lambda: len(a.requests) == len(b.requests) == 10)
    a.die()
    await until(lambda: len(b.requests) == 20)
    b.send(*(last(name, int(name)) for name in streams))
    for name, stream in streams.items():
        await stream.end()
        assert stream.tokens == [int(name)]


async def test_an_engine_that_dies_while_it_is_asked(pair, a, b):
    a.admit.clear()
    stream = Stream(pair, request("one"))
    await asyncio.sleep(0.01)
    a.die()
    a.admit.set()
    await until(lambda: b.requests)
    b.send(last("one", 5))
    await stream.end()
    assert stream.tokens == [5]


async def test_two_losses_in_a_row(a, b):
    controller = FakeController(a=a, b=b)
    client = await connect(controller)
    stream = await begin(client, a, request("one"), 5)
    a.die()
    await until(lambda: b.requests)
    b.send(RequestOutput("one", (6,)))
    await until(lambda: stream.tokens == [5, 6])
    again = FakeEngine()
    await controller.put("a", again)
    b.die()
    await until(lambda: again.requests)
    assert again.requests["one"].generated_token_ids == (5, 6)
    again.send(last("one", 7))
    await stream.end()
    assert stream.tokens == [5, 6, 7]


async def test_other_errors_are_the_requests_own(pair, a, b):
    for error in (
        RequestError(ErrorCode.DEADLINE_EXCEEDED, "late"),
        RequestError(ErrorCode.INVALID_ARGUMENT, "the answer's grammar"),
    ):
        stream = await begin(pair, a, request(error.message), 5)
        a.end(error.message, error)
        assert (await stream.end()).error == error
    assert not b.calls


async def test_the_error_is_told_when_the_others_end_as_well(pair, a, b):
    stream = await begin(pair, a, request("one"), 5)
    b.rejection = DRAINING
    a.end("one", STOPPED)
    assert (await stream.end()).error == STOPPED
    assert b.calls == ["submit one"]


async def test_nobody_waits_for_an_engine_while_the_last_one_shuts_down(client, a):
    stream = await begin(client, a, request("one"), 5)
    a.end("one", SHUTTING_DOWN)
    assert (await asyncio.wait_for(stream.end(), 1)).error == SHUTTING_DOWN


async def test_a_full_engine_is_asked_again(pair, a, b):
    stream = await begin(pair, a, request("one"), 5)
    b.rejection = FULL
    a.die()
    await until(lambda: len(b.calls) >= 3)
    b.rejection = None
    await until(lambda: b.requests)
    b.send(last("one", 6))
    await stream.end()
    assert stream.tokens == [5, 6]


@pytest.mark.parametrize(("deadline_s", "busy_s"), [(None, 0.3), (0.5, 30.0)])
async def test_an_engine_that_stays_full(pair, a, b, deadline_s, busy_s, monkeypatch):
    monkeypatch.setattr(ray_client, "_BUSY_TIMEOUT_S", busy_s)
    start = time.time()
    deadline = None if deadline_s is None else start + deadline_s
    stream = await begin(pair, a, request("one", deadline=deadline), 5)
    b.rejection = FULL
    a.die()
    end = await stream.end()  # within 10 seconds
    assert end.error.retryable and end.error.code is ErrorCode.UNAVAILABLE and "a died" in end.error.message
    assert time.time() - start >= (deadline_s or busy_s) - 0.01
    assert 3 < len(b.calls) < 60


async def test_an_engine_that_thought_the_gateway_dead_takes_its_requests_back(client, a):
    stream = await begin(client, a, request("one"), 5)
    a.end("one", GATEWAY_SILENT)
    await until(lambda: a.calls == ["submit one", "submit one"])
    assert a.requests["one"].generated_token_ids == (5,)
    a.send(last("one", 6))
    await stream.end()
    assert stream.tokens == [5, 6]


async def test_an_answer_waits_for_an_engine_to_come(a):
    controller = FakeController(a=a)
    client = await connect(controller)
    stream = await begin(client, a, request("one"), 5)
    a.die()
    await asyncio.sleep(0.05)
    with pytest.raises(RequestRejected, match="no attention actor is alive") as caught:
        await Stream(client, request("new")).end()  # while what has not begun is refused
    assert caught.value.code is ErrorCode.UNAVAILABLE
    back = FakeEngine()
    await controller.put("a", back)
    await until(lambda: back.requests)
    back.send(last("one", 6))
    await stream.end()
    assert stream.tokens == [5, 6]


async def test_an_engine_that_does_not_come(a):
    client = await connect(FakeController(a=a), failover_timeout_s=0.05)
    stream = await begin(client, a, request("one"), 5)
    a.die()
    end = await stream.end()
    assert end.error.retryable and end.error.code is ErrorCode.UNAVAILABLE


async def test_a_request_that_kills_its_engines_is_given_up(a):
    controller = FakeController(a=a)
    client = await connect(controller)
    stream, engine = await begin(client, a, request("poison"), 5), a
    deaths = 0
    while True:
        engine.die()
        deaths += 1
        if deaths == 4:  # the first came after a token
            break
        engine = FakeEngine()
        await controller.put("a", engine, str(deaths))
        await until(lambda engine=engine: engine.requests)
    assert (await stream.end()).error.retryable
    assert stream.tokens == [5]


async def test_an_abort_reaches_a_request_that_is_between_engines(pair, a, b):
    stream = await begin(pair, a, request("one"), 5)
    b.admit.clear()
    a.die()
    await asyncio.sleep(0.02)
    assert await pair.abort(["one", "other"]) == 1
    b.admit.set()
    await until(lambda: b.calls[-1:] == ["abort one"])
    b.send(RequestOutput("one", finish_reason=FinishReason.ABORT))
    assert (await stream.end()).finish_reason is FinishReason.ABORT


async def test_an_abort_ends_a_request_that_no_engine_has(client, a):
    stream = await begin(client, a, request("one"), 5)
    a.die()
    await asyncio.sleep(0.01)
    assert await client.abort(["one"]) == 1
    assert (await stream.end()).finish_reason is FinishReason.ABORT


async def test_a_client_that_goes_away_between_engines_leaves_nothing_behind(pair, a, b):
    stream = await begin(pair, a, request("one"), 5)
    b.admit.clear()
    a.die()
    await asyncio.sleep(0.01)
    stream.task.cancel()
    await asyncio.wait([stream.task])
    b.admit.set()
    await until(lambda: b.calls[-1:] == ["abort one"])


@pytest.mark.parametrize("seed", range(5))
async def test_no_token_is_missing_or_comes_twice(seed):
    """Forty answers, while engines die, end their requests, fill up and come back."""
    rng = random.Random(seed)
    engines = {name: FakeEngine() for name in ("a", "b", "c")}
    controller = FakeController(**engines)
    client = await connect(controller)
    streams = {str(n): Stream(client, request(str(n))) for n in range(40)}
    await until(lambda: sum(len(engine.requests) for engine in engines.values()) == 40)
    for step in range(400):
        for engine in engines.values():
            for name in rng.sample(sorted(engine.requests), (len(engine.requests) + 4) // 5):
                one = engine.requests[name]
                done = len(one.generated_token_ids) + 1
                token = hash((name, done)) % 1000
                engine.requests[name] = replace(one, generated_token_ids=(*one.generated_token_ids, token))
                engine.send(last(name, token) if done == PARAMS.max_tokens else RequestOutput(name, (token,)))
                if done == PARAMS.max_tokens:
                    del engine.requests[name]
            engine.rejection = FULL if rng.random() < 0.3 else None
        if step % 10 == 5 and step < 60:
            name = rng.choice(sorted(engines))
            lost, engines[name] = engines[name], FakeEngine()
            if rng.random() < 0.5:
                lost.rejection = DRAINING
                for request_id in lost.requests:
                    lost.end(request_id, STOPPED)
            else:
                lost.die()
            await controller.put(name, engines[name], str(step))
        await asyncio.sleep(0.001)
        if all(stream.task.done() for stream in streams.values()):
            break
    for name, stream in streams.items():
        assert (await stream.end()).finish_reason is FinishReason.LENGTH
        assert stream.tokens == [hash((name, done)) % 1000 for done in range(1, 10)]


# ---- engines and the controller come and go


async def test_a_new_engine_gets_requests(a, b):
    controller = FakeController(a=a)
    client = await connect(controller)
    await begin(client, a, request("one"))
    await controller.put("b", b)
    await until(lambda: b.gateways)
    await begin(client, b, request("two"))


async def test_an_engine_that_is_not_listed_any_more_finishes_what_it_has(a, b):
    controller = FakeController(a=a, b=b)
    client = await connect(controller)
    stream = await begin(client, a, request("one"), 5)
    await controller.drop("a")
    await begin(client, b, request("two"))
    await begin(client, b, request("three"))
    a.send(last("one", 6))
    await stream.end()
    assert stream.tokens == [5, 6]


async def test_a_new_life_under_the_same_name_is_another_engine(a, b):
    """The old one may hang: its stream tells nothing."""
    controller = FakeController(a=a)
    client = await connect(controller)
    stream = await begin(client, a, request("one"), 5)
    await controller.put("a", b)
    await until(lambda: b.requests)
    a.send(RequestOutput("one", (99,)))
    b.send(last("one", 6))
    await stream.end()
    assert stream.tokens == [5, 6]


async def test_requests_do_not_notice_that_the_controller_is_away(a, b):
    controllers = [FakeController(a=a)]

    def find() -> FakeController:
        if not controllers:
            raise ValueError("there is no actor of this name")
        return controllers[0]

    client = RayEngineClient(find)
    await client.start()
    stream = await begin(client, a, request("one"), 5)
    await controllers.pop().die()
    with pytest.raises(RayActorError):
        await client.drain()
    a.send(RequestOutput("one", (6,)))
    await until(lambda: stream.tokens == [5, 6])
    other = await begin(client, a, request("two"), 7)
    controllers.append(FakeController(a=a, b=b))
    await until(lambda: b.gateways)
    assert await client.drain() == 3
    a.send(last("one", 8), last("two", 9))
    for one in (stream, other):
        await one.end()
    assert (stream.tokens, other.tokens) == ([5, 6, 8], [7, 9])
