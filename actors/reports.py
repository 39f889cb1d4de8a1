"""What attention and expert actors tell the controller, and what it tells them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from actors.status import ActorStatus
from cluster.holdings import Holdings
from dispatch.epoch import Epoch
from dispatch.topology import SlotAddress, Topology
from engine.request import EngineLoad


@dataclass(frozen=True, slots=True)
class Layout:
    """What a deployment is meant to be: its attention actors' ranks, and what its slots hold, dead or alive."""

    ranks: tuple[int, ...]
    holdings: Holdings


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """An attention actor's state, its engine's load once that runs, and what it has been told of the cluster.

    `view` is the newest topology or epoch that it was given, `layout` what the deployment was meant to be then.
    """

    status: ActorStatus
    incarnation: str
    load: EngineLoad | None
    view: Topology | Epoch | None
    layout: Layout | None


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """An expert actor's state, and the rows it has computed: layer → a number for each logical expert.

    `held`: layer → the experts whose weights it has. `address`: where it serves, with the p2p transport.
    """

    status: ActorStatus
    incarnation: str
    rows: dict[int, tuple[int, ...]]
    held: dict[int, tuple[int, ...]]
    address: SlotAddress | None
