from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama4.config import TextConfig
from llama4.micro_batches import in_turn
from llama4.moe import Experts, MoE
from llama4.router import scaled_rows
from tests.llama4.reference import SMALL
from tests.llama4.runner import HereDispatcher


def make(top_k: int, scores: str) -> tuple[MoE, Experts, torch.Tensor]:
    torch.manual_seed(0)
    config = TextConfig.from_dict({**SMALL, "num_experts_per_tok": top_k}, scores)  # type: ignore[arg-type]
    experts = Experts(config, {2: range(4)}, torch.float32, "cpu")
    moe = MoE(config, 2, torch.float32, "cpu")
    for _, tensor in moe.tensors("x"):
        tensor.normal_(std=0.3)
    for _, _, tensor in experts.tensors():
        tensor.normal_(std=0.3)
    return moe, experts, torch.randn(9, config.hidden_size)


def expert(experts: Experts, n: int, x_D: torch.Tensor) -> torch.Tensor:
    weights = {(name.rsplit(".", 1)[1], index): tensor for name, index, tensor in experts.tensors()}
    gate, up = (x_D @ weights["gate_up_proj", n]).chunk(2)
    return (F.silu(gate) * up) @ weights["down_proj", n]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_softmax_weights_the_output(top_k: int) -> None:
    moe, experts, x_TD = make(top_k, "softmax")
    for x_D, got_D in zip(x_TD, in_turn([moe.flow(x_TD, HereDispatcher(experts))])[0], strict=True):
        p_E = torch.softmax(moe.router @ x_D, dim=0)
        chosen = sorted(range(4), key=lambda e: -p_E[e])[:top_k]
        want_D = moe.shared_expert(x_D[None])[0] + sum(p_E[e] * expert(experts, e, x_D) for e in chosen)
        torch.testing.assert_close(got_D, want_D)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sigmoid_scales_the_input(top_k: int) -> None:
    moe, experts, x_TD = make(top_k, "sigmoid")
    for x_D, got_D in zip(x_TD, in_turn([moe.flow(x_TD, HereDispatcher(experts))])[0], strict=True):
        logits_E = moe.router @ x_D
        chosen = sorted(range(4), key=lambda e: -logits_E[e])[:top_k]
        want_D = moe.shared_expert(x_D[None])[0] + sum(expert(experts, e, x_D * logits_E[e].sigmoid()) for e in chosen)
        torch.testing.assert_close(got_D, want_D)


def test_the_shared_expert_runs_between_dispatch_and_combine() -> None:
    moe, experts, x_TD = make(1, "sigmoid")
    order: list[str] = []

    class Spy(HereDispatcher):
        def dispatch(self, x_ND: torch.Tensor, expert_ids_NK: torch.Tensor, layer: int) -> torch.Tensor:
            order.append("dispatch")
            return super().dispatch(x_ND, expert_ids_NK, layer)

        def combine(self, ticket: torch.Tensor) -> torch.Tensor:
            order.append("combine")
            return super().combine(ticket)

    shared = moe.shared_expert
    moe.shared_expert = lambda x_TD: order.append("shared") or shared(x_TD)  # type: ignore[assignment, func-returns-value]
    in_turn([moe.flow(x_TD, Spy(experts))])
    assert order == ["dispatch", "shared", "combine"]


def test_experts_without_rows() -> None:
    _, experts, x_TD = make(1, "sigmoid")
    assert experts(2, x_TD[:0], [], []).shape == (0, 32)
    got = experts(2, x_TD[:3], [0, 1, 3], [2, 0, 1])
    torch.testing.assert_close(got[2], expert(experts, 3, x_TD[2]))


@pytest.mark.parametrize(("wanted", "message"), [({9: [0]}, "layer 9 has no experts"), ({2: [4]}, "no expert 4")])
def test_experts_that_do_not_exist(wanted: dict[int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(TextConfig.from_dict(SMALL), wanted, torch.float32, "cpu")


@pytest.mark.parametrize(("rows", "experts", "width"), [(1, 16, 1024), (9, 5, 33), (100, 128, 700)])
def test_a_row_chooses_one_expert_and_is_scaled(rows: int, experts: int, width: int) -> None:
    """Also with space between the logits' rows, with equal logits, and with more rows than one thread computes."""
    torch.manual_seed(rows)
    logits_TE = torch.randn(rows, experts + 3)[:, :experts]
    logits_TE[-1] = 0.25
    x_TD = torch.randn(rows, width)
    got_TD, expert_ids_T1 = scaled_rows(logits_TE, x_TD, 1)
    chosen_T1, want_T1 = logits_TE.max(dim=-1, keepdim=True)
    assert torch.equal(expert_ids_T1[:-1], want_T1[:-1]) and expert_ids_T1[-1] == 0
    torch.testing.assert_close(got_TD, x_TD * chosen_T1.sigmoid())
    for row in range(rows):
        assert torch.equal(got_TD[row], scaled_rows(logits_TE[row : row + 1], x_TD[row : row + 1], 1)[0][0])
