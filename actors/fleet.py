"""The deployment's actors as a whole: brings them up, tells them who holds what, goes from one layout to the next.

Publishing is the only way by which members learn of a new layout, and each has a higher epoch. Attention actors go over
to it between two steps. A slot serves what it held before until all of them have, and drops it only then, so nothing
pauses and no row arrives where its expert has gone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.reasons import first_line
from actors.rendezvous import Rendezvous
from actors.reports import Layout
from actors.seats import Seat, empty, give_up, release_all, sit
from actors.status import EngineHandle
from cluster.config import DeploymentConfig
from cluster.holdings import Holdings, cost, survives
from cluster.launch import NAMESPACE
from dispatch.epoch import Epoch, World
from dispatch.topology import Topology

log = logging.getLogger("herder")

_RENDEZVOUS = "rendezvous"
_ADOPT_TIMEOUT_S = 10.0


class Unservable(RuntimeError):
    """Some expert has no holder among the living members, and the transport cannot go on without."""


class Fleet:
    """Seats by number, the layout that is published, and the locks that keep changes apart.

    Attributes:
        holdings, epoch: what was published last. `epoch` counts attempts as well.
        changing: held by whoever goes to another layout; one at a time.
        failovers: members that were lost.
        draining: engines take no new requests; what was accepted goes on.
    """

    def __init__(self, config: DeploymentConfig, holdings: Holdings) -> None:
        self.config = config
        self.attention: dict[int, Seat] = {}
        self.experts: dict[int, Seat] = {}
        self.holdings = holdings
        self.epoch = -1
        self.secret = secrets.token_bytes(32)
        self.changing = asyncio.Lock()
        self.failovers = 0
        self.draining = False
        self._publishing = asyncio.Lock()
        self._news = asyncio.Event()
        self._p2p = config.transport_kind == "p2p"

    # ---- who is there

    def seats(self) -> list[Seat]:
        return [*self.attention.values(), *self.experts.values()]

    def serving(self, role: dict[int, Seat]) -> dict[int, Seat]:
        """Those of `attention` or `experts` whose actors take part, by number."""
        return {number: seat for number, seat in sorted(role.items()) if seat.serving}

    def unreachable(self) -> bool:
        """Whether some expert has no living holder."""
        return not survives(self.holdings, set(self.holdings.slots) - set(self.serving(self.experts)))

    def engines(self) -> dict[str, EngineHandle]:
        """The attention actors that take requests, by name."""
        return {
            seat.name: EngineHandle(seat.handle, seat.incarnation) for seat in self.serving(self.attention).values()
        }

    async def engines_unlike(self, known: Collection[tuple[str, str]], timeout_s: float) -> dict[str, EngineHandle]:
        """The engines as soon as their names and incarnations differ from `known`, else when the time is over."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            engines = self.engines()
            left = deadline - asyncio.get_running_loop().time()
            if {(name, engine.incarnation) for name, engine in engines.items()} != set(known) or left <= 0:
                return engines
            try:
                await asyncio.wait_for(self._news.wait(), left)
            except TimeoutError:
                continue

    def tell(self) -> None:
        """Some seat has begun or ceased to serve."""
        self._news.set()
        self._news = asyncio.Event()

    # ---- actors

    async def bring_up(self, seat: Seat, held: Any = None, starting: asyncio.Lock | None = None) -> None:
        """A new actor in this seat, its weights loaded, ready to be published. Raises what keeps it from that.

        `starting`: held while its process starts.
        """
        empty(seat)
        async with starting or nullcontext():
            sit(seat, self.config)
            await seat.handle.progress.remote()  # answers when it has started
        if seat.role == "attention":
            await seat.handle.load.remote()
            await seat.handle.start.remote()
            if self.draining:
                await seat.handle.drain.remote()
        else:
            await seat.handle.load.remote(held)
            await seat.handle.serve.remote(self.secret)
        seat.note(await seat.handle.report.remote())
        await self._allow(seat)

    async def bring_up_beside(self, seats: Mapping[Seat, Any]) -> None:
        """As `bring_up`, of these seats with what they shall hold, while others serve: processes start one by one.

        A process that starts takes a core for a second before it can give way. When one fails, nothing is begun any
        more once this has raised.
        """
        starting = asyncio.Lock()
        tasks = [asyncio.create_task(self.bring_up(seat, held, starting)) for seat, held in seats.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _allow(self, seat: Seat) -> None:
        """p2p: everything that the slot has may be asked of it, as long as epochs change."""
        if self._p2p and seat.role == "expert":
            await seat.handle.allow.remote(seat.held, max(self.epoch, 0))

    async def join(self, seats: Sequence[Seat]) -> None:
        """Makes actors that were brought up members, under the present holdings."""
        async with self._publishing:
            for seat in seats:
                if seat.role == "expert":  # what it has to hold may have changed while it loaded
                    await self._complete(seat, self.holdings)
                seat.serving = True
            await self._publish(self.holdings)
        self.tell()

    async def _complete(self, seat: Seat, holdings: Holdings) -> None:
        await seat.handle.load.remote(dict(holdings.slots.get(seat.number, {})))
        seat.note(await seat.handle.report.remote())
        await self._allow(seat)

    # ---- layouts

    async def republish(self) -> None:
        """The same layout under a new epoch: whoever could not reach a member tries again."""
        async with self._publishing:
            await self._publish(self.holdings)

    async def _publish(self, holdings: Holdings) -> None:
        self.epoch += 1
        self.holdings = holdings
        if self._p2p:
            await self._publish_topology(holdings)
        else:
            await self._publish_epoch(holdings)
        log.info("published epoch=%d slots=%s", self.epoch, sorted(self.serving(self.experts)))

    async def _publish_topology(self, holdings: Holdings) -> None:
        addresses = {
            slot: seat.address
            for slot, seat in self.serving(self.experts).items()
            if seat.address is not None and slot in holdings.slots  # else its end, on purpose, would count as a loss
        }
        topology = Topology(holdings.to_map(self.epoch), addresses, self.secret)
        layout = self._layout(holdings)
        seats = self.serving(self.attention).values()
        told = await asyncio.gather(
            *(asyncio.wait_for(seat.handle.adopt.remote(topology, layout), _ADOPT_TIMEOUT_S) for seat in seats),
            return_exceptions=True,
        )
        for seat, outcome in zip(seats, told, strict=True):
            # It is dying or stuck. Should it go on under an older layout, slots refuse what they do not hold any more.
            if isinstance(outcome, BaseException):
                log.warning("not told actor=%s epoch=%d reason=%s", seat.name, self.epoch, first_line(outcome))

    async def _publish_epoch(self, holdings: Holdings) -> None:
        """Raises GroupBroken when the group does not come about, Unservable when it could not serve."""
        slots = {slot: held for slot, held in holdings.slots.items() if slot in self.serving(self.experts) and held}
        attention = self.serving(self.attention)
        if not attention or not survives(holdings, set(holdings.slots) - set(slots)):
            raise Unservable("a group needs an attention actor and a holder of every expert")
        host, port = await self._meeting_place()
        world = World(tuple(attention), tuple(slots))
        epoch = Epoch(Holdings(slots).to_map(self.epoch), world, host, port)
        layout = self._layout(holdings)
        await asyncio.gather(
            *(seat.handle.adopt.remote(epoch, layout) for seat in attention.values()),
            *(self.experts[slot].handle.adopt.remote(epoch) for slot in slots),
        )

    def _layout(self, holdings: Holdings) -> Layout:
        return Layout(tuple(sorted(self.attention)), holdings)

    async def _meeting_place(self) -> tuple[str, int]:
        options: Any = Rendezvous.options(
            name=_RENDEZVOUS, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, max_restarts=-1
        )
        host, port = await options.remote().address.remote()
        return host, port

    async def transition(self, target: Holdings, new: Sequence[Seat] = (), gone: Sequence[Seat] = ()) -> None:
        """Goes over to `target` while requests run. `new` seats come to be, `gone` ones end. Hold `changing`.

        Everything is loaded first, in the background. Raises what keeps it from that, after everything that was begun
        has been undone.
        """
        before = self.holdings
        try:
            await self._load(target, new)
            async with self._publishing:
                self.experts |= {seat.number: seat for seat in new if seat.role == "expert"}
                for seat in new:
                    seat.serving = True
                await self._publish(target)
        except BaseException:
            await self._undo(before, new)
            raise
        for seat in gone:
            self.experts.pop(seat.number, None)
            give_up(seat)
        await self._tidy()
        self.tell()

    async def _load(self, target: Holdings, new: Sequence[Seat]) -> None:
        changes = cost(self.holdings, target)
        holders = self.serving(self.experts)
        peers: dict[tuple[int, int], ActorHandle] = {}
        for layer, expert, _ in changes.loads:
            living = [slot for slot in self.holdings.holders[layer][expert] if slot in holders]
            if living:
                peers[layer, expert] = holders[living[0]].handle
        arriving = {seat.number for seat in new}
        growing = {slot for _, _, slot in changes.loads} - arriving
        if absent := growing - holders.keys():
            raise Unservable(f"slot {min(absent)} is being repaired")
        await self.bring_up_beside({seat: target.slots[seat.number] for seat in new})
        for slot in sorted(growing):
            seat = holders[slot]
            await seat.handle.fetch.remote(dict(target.slots[slot]), peers)
            seat.note(await seat.handle.report.remote())
            await self._allow(seat)

    async def _undo(self, before: Holdings, new: Sequence[Seat]) -> None:
        log.warning("undoing a change of layout epoch=%d", self.epoch)
        for seat in new:
            self.experts.pop(seat.number, None)
            give_up(seat)
        if self.holdings is not before:
            try:
                async with self._publishing:
                    await self._publish(before)
            except Exception as error:
                log.warning("layout not restored yet reason=%s", first_line(error))
        await self._tidy()

    async def _tidy(self) -> None:
        """Slots forget what the layout does not give them. Nobody sends for it any more."""
        for slot, seat in self.serving(self.experts).items():
            held = dict(self.holdings.slots.get(slot, {}))
            try:
                if self._p2p:
                    await seat.handle.allow.remote(held, self.epoch)
                await seat.handle.drop.remote(held)
                seat.held = held
            except RayError as error:  # it is dying, and what it held with it
                log.info("not tidied actor=%s reason=%s", seat.name, first_line(error))

    # ---- the end

    async def end(self) -> None:
        """Ends every actor and gives the room back."""
        for seat in self.seats():
            empty(seat)
        release_all(self.seats())
        if not self._p2p:
            try:
                ray.kill(ray.get_actor(_RENDEZVOUS, namespace=NAMESPACE))
            except ValueError:
                log.debug("there is no rendezvous")
