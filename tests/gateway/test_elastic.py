"""The calls that change a running server, and what it tells of balance, parking and failovers."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable

import grpc
import httpx
import pytest

from actors.api_keys import ApiKeys
from actors.gateway_core import GatewayCore
from actors.status import ClusterStatus
from cli.chaos_streams import AnswerLost, answer, asking, make_prompts, undisturbed
from cli.chaos_tally import Tally
from cli.endpoint import Server
from engine.request import ErrorCode, RequestError, RequestRejected
from herder.v1 import control_pb2 as pb
from herder.v1.control_pb2_grpc import ControlServiceStub
from herder.v1.inference_pb2_grpc import InferenceServiceStub
from tests.gateway.conftest import serve_grpc
from tests.gateway.fakes import MAX_CONTEXT, VOCAB_SIZE, FakeEngine


def every_change(control: ControlServiceStub, **more: object) -> list[Awaitable[object]]:
    return [
        control.ScaleExperts(pb.ScaleExpertsRequest(actors=4), **more),
        control.ScaleAttention(pb.ScaleAttentionRequest(actors=1), **more),
        control.MoveExpert(pb.MoveExpertRequest(expert=0, to_slot=3), **more),
        control.MoveExpert(pb.MoveExpertRequest(expert=5, to_slot=0, layer=0, from_slot=0), **more),
        control.DrainSlot(pb.DrainSlotRequest(slot=2), **more),
    ]


async def test_what_is_asked_reaches_the_controller(control: ControlServiceStub, engine: FakeEngine) -> None:
    for call in every_change(control):  # they are all under way by now
        await call
    assert set(engine.changes) == {
        ("scale", "experts", 4),
        ("scale", "attention", 1),
        ("move", 0, 3, None, None),
        ("move", 5, 0, 0, 0),
        ("drain_slot", 2),
    }


async def test_rebalance_tells_whether_it_moved(control: ControlServiceStub, engine: FakeEngine) -> None:
    answers = [await control.Rebalance(pb.RebalanceRequest()) for _ in range(2)]
    assert [answer.moved for answer in answers] == [True, False]
    assert engine.changes == [("rebalance",)] * 2


@pytest.mark.parametrize(
    ("failure", "code", "sentence"),
    [
        (
            RequestRejected("to_slot 9 is no slot", field="to_slot"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "to_slot 9 is no slot",
        ),
        (
            RequestRejected("expert-2 did not load: all is as it was", code=ErrorCode.UNAVAILABLE),
            grpc.StatusCode.UNAVAILABLE,
            "expert-2 did not load: all is as it was",
        ),
        (ConnectionError("gone"), grpc.StatusCode.UNAVAILABLE, "the controller does not answer"),
    ],
)
async def test_refusals(
    control: ControlServiceStub, engine: FakeEngine, failure: Exception, code: grpc.StatusCode, sentence: str
) -> None:
    engine.change_failure = failure
    for call in (*every_change(control), control.Rebalance(pb.RebalanceRequest())):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert (caught.value.code(), caught.value.details()) == (code, sentence)


async def test_changes_need_a_key(core: GatewayCore, engine: FakeEngine) -> None:
    async for channel in serve_grpc(core, ApiKeys.of(["sk-one"])):
        control = ControlServiceStub(channel)
        for call in (*every_change(control), control.Rebalance(pb.RebalanceRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert engine.changes == []
        for call in every_change(control, metadata=(("authorization", "Bearer sk-one"),)):
            await call
        assert len(engine.changes) == 5


async def test_state_over_grpc(control: ControlServiceStub, engine: FakeEngine) -> None:
    server = await control.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.failovers, server.actors[1].role, server.actors[1].pid) == (15, pb.ACTOR_ROLE_CONTROLLER, 8)
    assert (await control.GetLoad(pb.GetLoadRequest())).engines[0].parked == 13
    placement = await control.GetExpertPlacement(pb.GetExpertPlacementRequest())
    assert (placement.balancedness, placement.balancedness_before) == (1.25, 2.5)
    assert (placement.seconds_since_move, placement.balance_mode) == (14.0, pb.BALANCE_MODE_AUTO)
    engine.cluster = ClusterStatus(ready=True)
    placement = await control.GetExpertPlacement(pb.GetExpertPlacementRequest())
    assert not placement.HasField("seconds_since_move") and placement.balance_mode == pb.BALANCE_MODE_OFF


async def test_state_over_http(asgi: httpx.AsyncClient) -> None:
    load = (await asgi.get("/load")).json()
    assert load["engines"]["attention-0"]["parked"] == 13
    assert (load["epoch"], load["failovers"]) == (3, 15)
    assert load["balance"] == {
        "mode": "auto",
        "balancedness": 1.25,
        "balancedness_before": 2.5,
        "seconds_since_move": 14.0,
    }


async def test_what_chaos_asks_is_answered_token_by_token(inference: InferenceServiceStub, engine: FakeEngine) -> None:
    prompts = make_prompts(4, VOCAB_SIZE, MAX_CONTEXT, random.Random(0))
    ask, tally = asking(inference, Server("gateway")), Tally(4)
    answers = await undisturbed(prompts, ask, tally, time.monotonic)
    assert [len(tokens) for tokens in answers] == [prompt.max_tokens for prompt in prompts]
    assert {params.seed for params in (request.params for request in engine.requests)} == {p.seed for p in prompts}
    engine.failure, engine.fail_after = RequestError(ErrorCode.UNAVAILABLE, "attention-0 died", retryable=True), 2
    with pytest.raises(AnswerLost, match="attention-0 died"):
        await answer(0, prompts[0], ask, tally, time.monotonic)
    engine.rejection = RequestRejected("no attention actor is alive", code=ErrorCode.UNAVAILABLE)
    with pytest.raises(AnswerLost, match="no attention actor is alive"):
        await answer(0, prompts[0], ask, tally, time.monotonic)
