"""What `herder chaos` does to a deployment, and how it knows that the deployment is whole again."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import grpc
import psutil

from cli import endpoint
from cli.report import CliError
from dispatch.faults import Fault
from herder.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from herder.v1.control_pb2_grpc import ControlServiceAsyncStub

_REMOTE_TIMEOUT_S = 30.0
_DROPPED = 2  # answers
_DELAYED, _DELAY_S = 50, 0.02


class Action(StrEnum):
    KILL_EXPERT = "kill-expert"
    STOP_EXPERT = "stop-expert"
    KILL_ATTENTION = "kill-attention"
    KILL_CONTROLLER = "kill-controller"
    DROP_EXPERT = "drop-expert"
    DELAY_EXPERT = "delay-expert"

    @property
    def role(self) -> pb.ActorRole.ValueType:
        """Whom it is done to."""
        return pb.ActorRole.Value(f"ACTOR_ROLE_{self.value.partition('-')[2].upper()}")

    @property
    def signal(self) -> signal.Signals | None:
        """What is sent to the process; None if it lives on, and its messages are harmed."""
        match self:
            case Action.DROP_EXPERT | Action.DELAY_EXPERT:
                return None
            case Action.STOP_EXPERT:
                return signal.SIGSTOP
        return signal.SIGKILL

    def fault(self, slot: int) -> Fault:
        """What befalls the next answers of a slot's expert actor."""
        assert self.signal is None, f"{self} is done to a process"
        if self is Action.DROP_EXPERT:
            return Fault("drop", "expert", slot, times=_DROPPED)
        return Fault("delay", "expert", slot, seconds=_DELAY_S, times=_DELAYED)


ENDING = tuple(action for action in Action if action.signal is not None)  # those that end a process


def in_random_order(actions: Sequence[Action], rng: random.Random) -> Iterator[Action]:
    """Endless; each action as often as each other one."""
    while True:
        yield from rng.sample(actions, len(actions))


def choose(action: Action, actors: Sequence[pb.ActorInfo], rng: random.Random) -> pb.ActorInfo:
    """The actor to harm. Raises CliError when there is none of its role."""
    candidates = [actor for actor in actors if actor.role == action.role and actor.pid]
    if not candidates:
        raise CliError(f"{action}: the server has no {action.value.partition('-')[2]} actor whose process is known")
    return rng.choice(candidates)


@dataclass(frozen=True, slots=True)
class Look:
    """A deployment at one moment. `copies`: of experts, over all layers and slots."""

    ready: bool
    reason: str
    actors: tuple[pb.ActorInfo, ...]
    copies: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Looks at the deployment behind `server`, while streams run."""

    stub: ControlServiceAsyncStub
    server: endpoint.Server

    async def look(self) -> Look:
        """Raises CliError when there is no answer."""
        stub, limit, metadata = self.stub, endpoint.LOOK_TIMEOUT_S, self.server.metadata
        try:
            info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=limit, metadata=metadata)
            placement = await stub.GetExpertPlacement(pb.GetExpertPlacementRequest(), timeout=limit, metadata=metadata)
        except grpc.RpcError as error:
            raise endpoint.grpc_fault(self.server.where, error) from None
        finally:
            _heed_cancellation()
        copies = sum(len(expert.slots) for layer in placement.layers for expert in layer.experts)
        return Look(info.ready, info.reason, tuple(info.actors), copies)


def _heed_cancellation() -> None:
    """A call of grpc.aio that ends just as its task is cancelled keeps the cancellation to itself: Ctrl-C, here."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def is_whole(before: Look, now: Look, ended: pb.ActorInfo | None) -> bool:
    """Whether the deployment is at the strength of `before` again, with another process in the `ended` one's place."""
    places = {(actor.role, actor.index): actor for actor in now.actors}
    return (
        now.ready
        and now.copies >= before.copies
        and (ended is None or _is_replaced(ended, places.get((ended.role, ended.index))))
        and all(
            (actor.role, actor.index) in places and places[actor.role, actor.index].state == actor.state
            for actor in before.actors
        )
    )


def _is_replaced(ended: pb.ActorInfo, successor: pb.ActorInfo | None) -> bool:
    return successor is not None and (successor.node_id, successor.pid) != (ended.node_id, ended.pid)


class Hand:
    """Sends signals to actors' processes: here, or through Ray to other nodes of the cluster that this one is in.

    Messages are harmed through Ray, by the actor itself.
    """

    def __init__(self) -> None:
        self._here = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
        self._stopped: list[psutil.Process] = []
        self._stopped_away: list[pb.ActorInfo] = []

    async def do(self, action: Action, actor: pb.ActorInfo) -> None:
        """A process that has ended meanwhile is no error. Raises CliError for one that cannot be reached."""
        number = action.signal
        if number is None:
            await asyncio.to_thread(_harm_messages, actor, action)
        elif actor.node_ip in self._here:
            self._send_here(actor, number)
        else:
            await asyncio.to_thread(_send_away, actor, number)
            if number is signal.SIGSTOP:
                self._stopped_away.append(actor)

    def _send_here(self, actor: pb.ActorInfo, number: signal.Signals) -> None:
        try:
            process = psutil.Process(actor.pid)
            process.send_signal(number)
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied:
            raise CliError(f"{actor.name}: process {actor.pid} is not yours to harm") from None
        if number is signal.SIGSTOP:
            self._stopped.append(process)

    def let_go(self) -> None:
        """Lets the stopped processes go on that nobody has ended: a deployment kills those that hang."""
        for process in self._stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        for actor in self._stopped_away:
            with suppress(CliError):  # its node has gone
                _send_away(actor, signal.SIGCONT)


def _send_away(actor: pb.ActorInfo, number: signal.Signals) -> None:
    """By a Ray task on the actor's node."""
    import ray  # takes a second, and is needed for several machines only
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with _through_ray(actor):
        on_its_node = NodeAffinitySchedulingStrategy(actor.node_id, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(_signal_process).options(scheduling_strategy=on_its_node)
        ray.get(task.remote(actor.pid, int(number)), timeout=_REMOTE_TIMEOUT_S)


def _signal_process(pid: int, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).send_signal(number)


def _harm_messages(actor: pb.ActorInfo, action: Action) -> None:
    import ray

    from actors.seats import find_actors

    with _through_ray(actor):
        found = find_actors("expert").get(actor.index, [])  # several, while one replaces another
        script = (action.fault(actor.index),)
        done = ray.get([one.go_wrong.remote(script) for one in found], timeout=_REMOTE_TIMEOUT_S)
    if not all(done):
        raise CliError(f"{action}: only sockets carry messages that can be harmed (transport.kind: p2p)")


@contextmanager
def _through_ray(actor: pb.ActorInfo) -> Iterator[None]:
    """Connects to this machine's Ray. Raises CliError for whatever fails."""
    import ray

    try:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CliError(
            f"{actor.name} runs on {actor.node_ip} and cannot be reached through Ray; "
            f"start herder chaos on a node of the cluster ({first})"
        ) from None
