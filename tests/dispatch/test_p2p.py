"""The p2p transport gives what the oracle gives, whoever takes part and in whatever order.

Shape legend: T tokens, K top-k, N rows, D hidden width, E logical experts.
"""

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dispatch.expert_map import ExpertMap
from dispatch.local import LocalDispatcher
from dispatch.topology import Topology
from tests.dispatch import p2p_world
from tests.dispatch.members import LAYERS, NUM_EXPERTS, SLOT_IDS, WIDTH, RowwiseExperts, make_map
from tests.dispatch.p2p_world import SECRET, Attention, Servers
from tests.dispatch.pool import Pool

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def servers() -> Iterator[Servers]:
    made = Servers()
    yield made
    made.close()


def batch(tokens: int, top_k: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    return torch.randn(tokens, WIDTH, generator=generator).to(dtype), ids_TK


def expected(x_TD: Tensor, ids_TK: Tensor, layer: int) -> Tensor:
    oracle = LocalDispatcher(RowwiseExperts(), NUM_EXPERTS)
    return oracle.combine(oracle.dispatch(x_TD, ids_TK, layer))


def start(servers: Servers, slots: int, copies: int = 1, **options: object) -> Topology:
    expert_map = make_map(1, SLOT_IDS[:slots], copies)
    addresses = {slot: servers.start(slot, expert_map, **options) for slot in expert_map.slot_ids}  # type: ignore[arg-type]
    return Topology(expert_map, addresses, SECRET)


@pytest.mark.parametrize("unix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attention", "slots", "copies"), [(1, 1, 1), (1, 4, 2), (2, 2, 1), (3, 5, 3)])
def test_results_are_the_oracles(
    servers: Servers, attention: int, slots: int, copies: int, dtype: torch.dtype, unix: bool
) -> None:
    topology = start(servers, slots, copies, dtype=dtype, unix=unix)
    failures: list[str] = []

    def ask(source: int) -> None:
        rank = Attention(source, dtype)
        try:
            rank.adopt(topology)
            for seed in range(12):
                rank.gate.begin(1, leaving=False)
                for layer in LAYERS:
                    top_k = (1, 2, 8)[seed % 3]
                    x_TD, ids_TK = batch(random.Random(seed).randrange(40), top_k, 100 * source + seed, dtype)
                    y_TKD = rank.dispatcher.combine(rank.dispatcher.dispatch(x_TD, ids_TK, layer))
                    assert y_TKD.shape == (*ids_TK.shape, WIDTH) and y_TKD.dtype == dtype
                    if not torch.equal(y_TKD, expected(x_TD, ids_TK, layer)):
                        failures.append(f"source {source}, seed {seed}, layer {layer}")
            assert rank.dispatcher.take_lost(100) == frozenset() and not rank.losses
        except BaseException as error:
            failures.append(f"source {source}: {error!r}")
            raise
        finally:
            rank.close()

    threads = [threading.Thread(target=ask, args=(source,)) for source in range(attention)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 8])), min_size=1, max_size=5),
    copies=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_batches_in_flight_are_combined_in_any_order(
    shapes: list[tuple[int, int]], copies: int, order: random.Random
) -> None:
    servers, rank = Servers(), Attention(0)
    try:
        rank.adopt(start(servers, 3, copies))
        batches = [batch(tokens, top_k, seed) for seed, (tokens, top_k) in enumerate(shapes)]
        tickets = [(rank.dispatcher.dispatch(*each, LAYERS[0]), each) for each in batches]
        order.shuffle(tickets)
        for ticket, (x_TD, ids_TK) in tickets:
            assert torch.equal(rank.dispatcher.combine(ticket), expected(x_TD, ids_TK, LAYERS[0]))
        total = sum(tokens * top_k for tokens, top_k in shapes)
        assert int(rank.dispatcher.stats.rows_E[LAYERS[0]].sum()) == total
        assert sum(sum(stats.rows[LAYERS[0]].values()) for stats in servers.counted().values()) == total
    finally:
        rank.close()
        servers.close()


def test_a_ticket_goes_to_combine_once(servers: Servers) -> None:
    rank = Attention(0)
    rank.adopt(start(servers, 1))
    ticket = rank.dispatcher.dispatch(*batch(3, 1, 0), LAYERS[0])
    rank.dispatcher.combine(ticket)
    with pytest.raises(ValueError, match="combined already"):
        rank.dispatcher.combine(ticket)
    with pytest.raises(ValueError, match="no MoE layer"):
        rank.dispatcher.dispatch(*batch(3, 1, 0), 77)
    rank.close()


def test_no_rows_send_nothing(servers: Servers) -> None:
    rank = Attention(0)
    rank.adopt(start(servers, 2))
    assert rank.dispatcher.combine(rank.dispatcher.dispatch(*batch(0, 2, 0), LAYERS[0])).shape == (0, 2, WIDTH)
    rank.close()
    assert all(stats.requests == stats.refused == 0 for stats in servers.counted().values())


def test_rows_of_a_replicated_expert_are_shared_out(servers: Servers) -> None:
    expert_map = ExpertMap(1, {1: tuple((0, 1, 2) for _ in range(NUM_EXPERTS))})
    topology = Topology(expert_map, {slot: servers.start(slot, expert_map) for slot in range(3)}, SECRET)
    rank = Attention(0)
    rank.adopt(topology)
    x_TD = torch.randn(30, WIDTH)
    rank.dispatcher.combine(rank.dispatcher.dispatch(x_TD, torch.full((30, 1), 4), 1))
    rank.close()
    assert [stats.rows[1][4] for stats in servers.counted().values()] == [10, 10, 10]


def test_full_buffers_everywhere_do_not_stand_still() -> None:
    """Each rank sends each slot far more than the kernel holds, several batches at once."""
    servers, width = Servers(), 4096
    expert_map = ExpertMap(1, {1: tuple((expert % 3,) for expert in range(NUM_EXPERTS))})
    addresses = {slot: servers.start(slot, expert_map, width=width) for slot in range(3)}
    failures: list[object] = []

    def ask(source: int) -> None:
        rank = Attention(source, width=width)
        try:
            rank.adopt(Topology(expert_map, addresses, SECRET))
            x_TD = torch.randn(600, width)
            ids_TK = torch.arange(600)[:, None] % NUM_EXPERTS
            tickets = [rank.dispatcher.dispatch(x_TD, ids_TK, 1) for _ in range(4)]
            for ticket in tickets:
                if not torch.equal(rank.dispatcher.combine(ticket), expected(x_TD, ids_TK, 1)):
                    failures.append(source)
            if rank.losses:
                failures.append(rank.losses)
        except BaseException as error:
            failures.append(error)
        finally:
            rank.close()

    threads = [threading.Thread(target=ask, args=(source,)) for source in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "they stand still"
    servers.close()
    assert not failures


def test_rows_of_several_sources_are_computed_together(servers: Servers, way: str) -> None:
    class Slow(RowwiseExperts):
        def __call__(self, *arguments: object) -> Tensor:  # type: ignore[override]
            time.sleep(0.05)
            return super().__call__(*arguments)  # type: ignore[arg-type]

    topology = start(servers, 1, experts=Slow())
    ranks = [Attention(source) for source in range(4)]
    for rank in ranks:
        rank.adopt(topology)
    for seed in range(3):
        batches = [batch(5, 2, 10 * seed + rank.dispatcher.source) for rank in ranks]
        tickets = [rank.dispatcher.dispatch(*each, LAYERS[0]) for rank, each in zip(ranks, batches, strict=True)]
        for rank, ticket, (x_TD, ids_TK) in zip(ranks, tickets, batches, strict=True):
            assert torch.equal(rank.dispatcher.combine(ticket), expected(x_TD, ids_TK, LAYERS[0]))
    for rank in ranks:
        rank.close()
    stats = servers.counted()[SLOT_IDS[0]]
    # By lanes they take a little longer, so that the first may be computed alone.
    assert stats.requests == 12 and stats.batches <= {"sockets": 6, "lanes": 9}[way]


def _idle(_: int, way: str, seconds: int) -> list[float]:
    """Seconds of CPU that a rank and its servers take in each of so many seconds without work."""
    p2p_world.use(way)
    servers, rank = Servers(), Attention(0)
    rank.adopt(start(servers, 3))
    waiting = threading.Thread(target=rank.gate.wait, daemon=True)
    rank.gate.wait()  # the installation rang
    waiting.start()
    time.sleep(1)  # what connecting has left to do
    used = []
    for _ in range(seconds):
        before = time.process_time()
        time.sleep(1)
        used.append(time.process_time() - before)
    assert waiting.is_alive()
    rank.gate.ring()
    waiting.join(5)
    assert not waiting.is_alive()
    rank.close()
    servers.close()
    return used


def test_nobody_uses_the_cpu_when_idle(alone: Pool, way: str) -> None:
    # With three lanes gloo, in NCCL's place, takes 0.008 to 0.023 itself; what polls would be in each second as well.
    [used] = alone.run(1, _idle, way, {"sockets": 1, "lanes": 10}[way], timeout_s=60)
    assert min(used) < 0.02
