"""The outbox: one message per step and gateway, nothing to the wrong one."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

from actors.outbox import Outbox
from engine.request import FinishReason, RequestOutput


def output(request_id: str, token: int, last: bool = False) -> RequestOutput:
    return RequestOutput(request_id, (token,), finish_reason=FinishReason.LENGTH if last else None)


async def test_a_step_is_one_message_for_each_gateway():
    outbox = Outbox()
    for request_id, gateway in (("a", "g1"), ("b", "g2"), ("c", "g1")):
        outbox.expect(request_id, gateway)
    step = [output("a", 1), output("b", 2, last=True), output("c", 3)]
    engine = threading.Thread(target=outbox.deliver, args=(step,))
    engine.start()
    engine.join()
    async with aclosing(outbox.stream("g1")) as first, aclosing(outbox.stream("g2")) as second:
        assert await anext(first) == [step[0], step[2]]
        assert await anext(second) == [step[1]]
    assert sorted(outbox.requests_of("g1")) == ["a", "c"] and outbox.requests_of("g2") == []


async def test_a_slow_gateway_gets_what_has_come_meanwhile_in_order():
    outbox = Outbox()
    outbox.expect("a", "g")
    async with aclosing(outbox.stream("g")) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        outbox.deliver([output("a", 0)])
        assert [item.token_ids for item in await waiting] == [(0,)]
        for token in range(1, 5):
            outbox.deliver([output("a", token)])
        await asyncio.sleep(0)
        assert [item.token_ids[0] for item in await anext(stream)] == [1, 2, 3, 4]


async def test_a_request_is_expected_until_its_last_output_is_sorted():
    outbox = Outbox()
    outbox.expect("a", "g")
    outbox.deliver([output("a", 1, last=True)])
    assert outbox.expects("a") and not outbox.expects("b")
    await asyncio.sleep(0.01)
    assert not outbox.expects("a")
