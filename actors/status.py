"""What a running server tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.request import EngineLoad


@dataclass(frozen=True)
class ActorStatus:
    """One attention or expert actor.

    `rank_or_slot` is an attention actor's rank or an expert actor's slot; `state` is a word such as "loading" or
    "serving"; `loaded_bytes` counts weights, `rss_bytes` is the process's resident memory.
    """

    name: str
    role: Literal["attention", "expert"]
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
    """

    ready: bool
    reason: str = ""
    epoch: int = 0
    actors: tuple[ActorStatus, ...] = ()
    engines: Mapping[str, EngineLoad] = field(default_factory=dict)
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    placement: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
