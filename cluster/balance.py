"""Even load over the expert actors: how uneven it is, and what to move. Pure; the clock is injected.

The policy is the global one of EPLB: experts with the highest load per copy get the spare seats, then copies are
packed, heaviest first, into the slot with the least load. Two things are added: the next layers make up for what one
layer leaves uneven, and a copy stays where it is while that slot is not above the mean.

Shape legend: E logical experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.holdings import Holdings
from cluster.packing import Nodes, Packing, Room, copy_counts
from cluster.placement import Loads

# How far above the mean a slot may come, as a share of a layer's mean, before a copy has to leave it: more would keep
# more copies in place and leave the load less even.
STAY = 0.02

# Holdings that are not better by this share are not worth the loading of weights; noise alone makes that much.
GAIN = 0.05


@dataclass(frozen=True)
class Balance:
    """Highest load of a slot over the mean of all slots: in each layer, and of all layers together. 1.0 is even."""

    layers: Mapping[int, float]
    total: float


def balancedness(loads: Loads, holdings: Holdings) -> Balance:
    """How even the load is. Each holder of an expert has an even share of its load; without any load all is even.

    >>> balancedness({1: (60, 20, 10, 10)}, Holdings({0: {1: (0, 1)}, 1: {1: (2, 3)}})).total
    1.6
    >>> balancedness({1: (60, 20, 10, 10)}, Holdings({0: {1: (0, 1)}, 1: {1: (0, 2, 3)}})).total
    1.0
    """
    total = dict.fromkeys(holdings.slots, 0.0)
    layers = {}
    for layer in holdings.layers:
        load = slot_loads(loads, holdings, layer)
        layers[layer] = _max_over_mean(load)
        total = {slot: total[slot] + load[slot] for slot in total}
    return Balance(layers, _max_over_mean(total))


def slot_loads(loads: Loads, holdings: Holdings, layer: int) -> dict[int, float]:
    """What comes to each slot in `layer`, in the unit of `loads`."""
    load = dict.fromkeys(holdings.slots, 0.0)
    for one, holders in zip(loads[layer], holdings.holders[layer], strict=True):
        for slot in holders:
            load[slot] += one / len(holders)
    return load


def rebalance(
    loads: Loads,
    slots: Sequence[int],
    seats: int | None,
    replicas: int,
    nodes: Nodes | None,
    current: Holdings,
) -> Holdings:
    """Holdings under which `loads` are spread more evenly over `slots`, or `current` if none are clearly better.

    Two of four experts have most of the tokens; with a spare seat on each slot, both slots take half of either:

    >>> current = Holdings({0: {1: (0, 1, 2)}, 1: {1: (0, 2, 3)}})
    >>> rebalance({1: (40, 40, 10, 10)}, (0, 1), 3, 1, None, current).holders
    mappingproxy({1: ((0, 1), (0, 1), (0,), (1,))})

    Args:
        loads: layer -> load of each expert, in any unit.
        slots, seats, replicas, nodes: as in `placement.resize`.
        current: what the slots hold now; copies stay where they are if that is about as good.

    Raises:
        ConfigError: as `placement.assign_experts`.
    """
    room = Room.of(current.num_experts, slots, seats, replicas, nodes)
    load = dict.fromkeys(slots, 0.0)
    layers = {layer: _pack(loads[layer], homes_E, room, load) for layer, homes_E in current.holders.items()}
    packed = Holdings({slot: {layer: tuple(held[slot]) for layer, held in layers.items()} for slot in slots})
    worth = balancedness(loads, packed).total < (1 - GAIN) * balancedness(loads, current).total
    return packed if worth or not _allowed(current, slots, seats, replicas) else current


def _allowed(current: Holdings, slots: Sequence[int], seats: int | None, replicas: int) -> bool:
    held = [len(experts) for layers in current.slots.values() for experts in layers.values()]
    holders = [len(holders) for holders_E in current.holders.values() for holders in holders_E]
    return set(current.slots) == set(slots) and min(holders) >= replicas and (seats is None or max(held) <= seats)


def _pack(
    loads_E: Sequence[float], homes_E: Sequence[Sequence[int]], room: Room, load: dict[int, float]
) -> Mapping[int, set[int]]:
    """One layer of `rebalance`: slot -> experts. `homes_E` has the slots that hold each expert now; adds to `load`."""
    counts_E = copy_counts(loads_E, [room.replicas] * len(loads_E), room)
    held = {slot: sum(slot in homes for homes in homes_E) for slot in load}
    packing = Packing(room, counts_E, loads_E, room.seats(held, load), load)
    highest = (sum(load.values()) + (1 + STAY) * sum(loads_E)) / len(load)
    for expert in packing.heaviest_first():
        for _ in range(counts_E[expert]):
            home = [slot for slot in packing.free(expert) if slot in homes_E[expert]]
            if home and load[slot := packing.least_loaded(home)] + packing.weight_E[expert] <= highest:
                packing.put(expert, slot)
            else:
                packing.place(expert)
    packing.spread_over_nodes()
    return packing.held


def _max_over_mean(load: Mapping[int, float]) -> float:
    total = sum(load.values())
    return max(load.values()) * len(load) / total if total > 0 else 1.0


class LoadAverage:
    """Tokens per second of each layer's experts: a moving average over counters that only grow.

    A count weighs exp(-age / window_s). A source's first counters only say where it stands; counters lower than before
    mean that the source began anew, and count in full.

    Args:
        layers: the MoE layers.
        num_experts: of each layer.
        window_s: time constant, in seconds; may be set anew.
        clock: seconds, monotonic.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, window_s: float, clock: Callable[[], float]) -> None:
        self._sums: dict[int, list[float]] = {layer: [0.0] * num_experts for layer in layers}
        self.window_s = window_s
        self._clock = clock
        self._updated = clock()
        self._last: dict[str, Mapping[int, Sequence[int]]] = {}

    def update(self, counters: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
        """Takes in source -> layer -> tokens of each expert since that source began. Sources left out are forgotten."""
        now = self._clock()
        decay = math.exp((self._updated - now) / self.window_s)
        for layer, sums_E in self._sums.items():
            self._sums[layer] = [decay * one for one in sums_E]
        self._updated = now
        for source in counters.keys() & self._last.keys():
            counts, before = counters[source], self._last[source]
            known = counts.keys() & before.keys()
            anew = any(
                count < last for layer in known for count, last in zip(counts[layer], before[layer], strict=True)
            )
            for layer, counts_E in counts.items():
                last_E = before[layer] if layer in known and not anew else [0] * len(counts_E)
                news = zip(self._sums[layer], counts_E, last_E, strict=True)
                self._sums[layer] = [one + count - last for one, count, last in news]
        self._last = dict(counters)

    def loads(self) -> dict[int, tuple[float, ...]]:
        """Layer -> tokens per second of each logical expert, now."""
        decay = math.exp((self._updated - self._clock()) / self.window_s)
        return {layer: tuple(decay * one / self.window_s for one in sums_E) for layer, sums_E in self._sums.items()}
