"""What ranks do in the tests: functions that run inside the pool's processes.

Shape legend: T tokens, K top-k, N rows, D hidden width, E logical experts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.all_to_all import AllToAllDispatcher, ExpertRank
from dispatch.epoch import World
from dispatch.expert_map import ExpertMap
from dispatch.groups import EpochGroup
from dispatch.local import LocalDispatcher
from dispatch.store import StoreClients, connect_store

LAYERS = (1, 3)
NUM_EXPERTS = 8
WIDTH = 16
ATTENTION_IDS = (0, 4, 5)
SLOT_IDS = (0, 2, 3, 7, 9)


def make_world(attention: int, slots: int) -> World:
    return World(ATTENTION_IDS[:attention], SLOT_IDS[:slots])


@functools.cache
def connect(port: int) -> StoreClients:
    """This process's clients, kept from test to test."""
    return connect_store("127.0.0.1", port, timeout_s=30)


def form(rank: int, world: World, epoch: int, port: int, timeout_s: float = 20) -> EpochGroup:
    return EpochGroup.form(epoch, world, rank, connect(port), address="127.0.0.1", timeout_s=timeout_s)


def make_map(epoch: int, slots: Sequence[int], copies: int) -> ExpertMap:
    """Every expert on min(copies, slots) slots; the layers differ."""
    copies = min(copies, len(slots))
    return ExpertMap(
        epoch,
        {
            layer: tuple(
                tuple(slots[(layer + expert + copy) % len(slots)] for copy in range(copies))
                for expert in range(NUM_EXPERTS)
            )
            for layer in LAYERS
        },
    )


class RowwiseExperts:
    """y = x * a + b with numbers of their own per layer and expert: each row's result is the same in any batch."""

    def __call__(self, layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]) -> Tensor:
        expert_N = torch.tensor(list(expert_ids)).repeat_interleave(torch.tensor(list(counts)))[:, None]
        assert len(expert_N) == len(x_ND)
        return x_ND * (expert_N + layer + 0.5).to(x_ND.dtype) + (expert_N * 3 - layer).to(x_ND.dtype)


class LinearExperts:
    """y = x @ w, per layer and expert."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self._w_EDD = {layer: torch.randn(NUM_EXPERTS, WIDTH, WIDTH, generator=generator) / 4 for layer in LAYERS}

    def __call__(self, layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]) -> Tensor:
        parts = x_ND.split(list(counts))
        return torch.cat([part @ self._w_EDD[layer][expert] for part, expert in zip(parts, expert_ids, strict=True)])


@dataclass(frozen=True)
class Case:
    top_k: int
    pattern: str  # random, skewed, one, empty_ranks, nothing
    dtype: torch.dtype = torch.float32
    copies: int = 1
    linear: bool = False
    steps: int = 2


def make_batch(case: Case, rank: int, step: int, layer: int) -> tuple[Tensor, Tensor]:
    """x_TD and expert_ids_TK of one rank."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * step + layer)
    tokens = int(torch.randint(1, 24, (), generator=generator))
    if case.pattern == "nothing" or (case.pattern == "empty_ranks" and (rank + step) % 2 == 0):
        tokens = 0
    x_TD = torch.randn(tokens, WIDTH, generator=generator).to(case.dtype)
    weights_TE = torch.rand(tokens, NUM_EXPERTS, generator=generator)
    if case.pattern == "skewed":
        weights_TE *= torch.tensor([100.0] + [1.0] * (NUM_EXPERTS - 1))
    ids_TK = weights_TE.argsort(dim=1, descending=True)[:, : case.top_k]
    if case.pattern == "one":
        ids_TK = torch.full_like(ids_TK, 5)
    return x_TD, ids_TK


def run_case(group: EpochGroup, case: Case) -> dict[int, list[int]]:
    """One rank's part of a case, compared with the oracle; returns its rows per layer and expert."""
    expert_map = make_map(group.epoch, group.world.slots, case.copies)
    experts = LinearExperts() if case.linear else RowwiseExperts()
    senders = len(group.world.attention)
    with torch.inference_mode():
        if group.rank >= senders:
            slot = group.world.slots[group.rank - senders]
            expert_rank = ExpertRank(group, expert_map, slot, experts, WIDTH, case.dtype)
            for _ in range(case.steps):
                expert_rank.serve_step()
            return {layer: rows_E.tolist() for layer, rows_E in expert_rank.stats.rows_E.items()}
        dispatcher = AllToAllDispatcher(group, expert_map)
        oracle = LocalDispatcher(experts, NUM_EXPERTS)
        for step in range(case.steps):
            for layer in LAYERS:
                x_TD, ids_TK = make_batch(case, group.rank, step, layer)
                y_TKD = dispatcher.combine(dispatcher.dispatch(x_TD, ids_TK, layer))
                expected_TKD = oracle.combine(oracle.dispatch(x_TD, ids_TK, layer))
                assert y_TKD.dtype == case.dtype and y_TKD.shape == (*ids_TK.shape, WIDTH)
                if case.linear:
                    torch.testing.assert_close(y_TKD, expected_TKD, atol=1e-5, rtol=1e-5)
                else:
                    assert torch.equal(y_TKD, expected_TKD), f"{case} step {step} layer {layer}"
        return {layer: rows_E.tolist() for layer, rows_E in dispatcher.stats.rows_E.items()}


def run_cases(rank: int, world: World, epoch: int, port: int, cases: Sequence[Case]) -> list[dict[int, list[int]]]:
    """All cases in one group."""
    group = form(rank, world, epoch, port)
    rows = [run_case(group, case) for case in cases]
    group.close()
    return rows
