"""What a running server tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ray.actor import ActorHandle

from engine.request import EngineLoad


@dataclass(frozen=True, slots=True)
class EngineHandle:
    """An attention actor that takes requests. After a restart the name is the same and `incarnation` another."""

    actor: ActorHandle
    incarnation: str


@dataclass(frozen=True)
class ActorStatus:
    """One actor.

    `rank_or_slot` is an attention actor's rank or an expert actor's slot, and 0 for the controller; `state` is a word
    such as "loading" or "serving"; `loaded_bytes` counts weights, `rss_bytes` is the process's resident memory.
    """

    name: str
    role: Literal["attention", "expert", "controller"]
    rank_or_slot: int
    node_id: str = ""
    node_ip: str = ""
    pid: int = 0
    state: str = ""
    device: str = ""
    loaded_bytes: int = 0
    rss_bytes: int = 0


@dataclass(frozen=True)
class ClusterStatus:
    """The whole server. `ready`: a request sent now is answered; if not, `reason` is a sentence.

    `engines` is by attention actor's name; `expert_tokens` is by layer, tokens per logical expert since the start;
    `placement` is by layer, for each logical expert the slots that hold it.

    `balancedness` is the highest load of a slot as a multiple of the slots' mean, over a moving average (1 is even, 0
    not known yet), `balancedness_before` the same just before experts were last moved, `seconds_since_move` ago (None:
    never). `failovers` counts, since the start, the lost actors that another one has taken the place of.
    """

    ready: bool
    reason: str = ""
    epoch: int = 0
    actors: tuple[ActorStatus, ...] = ()
    engines: Mapping[str, EngineLoad] = field(default_factory=dict)
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    placement: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    balancedness: float = 0.0
    balancedness_before: float = 0.0
    seconds_since_move: float | None = None
    balance_mode: Literal["off", "manual", "auto"] = "off"
    failovers: int = 0
