"""The mixture of experts: router, dispatcher interface, shared expert, and the routed experts' own computation.

Shapes: T tokens, N rows, D model width, I an MLP's width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from llama4.config import TextConfig
from llama4.linear import gated_linear, linear
from llama4.memory import zeros
from llama4.router import best, scaled_rows

Ticket: TypeAlias = Any  # what a dispatcher needs to combine later; opaque here
Flow: TypeAlias = Generator[None, None, Tensor]  # a computation that pauses when its rows are with the experts


class Dispatcher(Protocol):
    """Brings rows to the experts that they chose, and the experts' answers back. The caller may work in between."""

    def dispatch(self, x_ND: Tensor, expert_ids_NK: Tensor, layer: int) -> Ticket: ...

    def combine(self, ticket: Ticket) -> Tensor:
        """The answers y_NKD, unweighted, in the order of the rows."""
        ...

    def take_lost(self, num_tokens: int) -> frozenset[int]:
        """Tokens, out of the `num_tokens` of the step that has just been run, that have to be computed again.

        They are those of which some row found no living holder of its expert, in the batches that were combined since
        the last call; what they gave is meaningless.
        """
        ...


class MLP:
    """down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._width = width
        self.gate_up = zeros((2 * width, hidden), dtype, device)
        self.down = zeros((hidden, width), dtype, device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield f"{prefix}.gate_proj.weight", self.gate_up[: self._width]
        yield f"{prefix}.up_proj.weight", self.gate_up[self._width :]
        yield f"{prefix}.down_proj.weight", self.down

    def __call__(self, x_TD: Tensor) -> Tensor:
        return gated_linear(x_TD, (self.gate_up,), (self.down,), (len(x_TD),))


class MoE:
    """One layer's router and shared expert; the routed experts are wherever the dispatcher brings the tokens."""

    def __init__(self, config: TextConfig, layer: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._layer = layer
        self._top_k = config.num_experts_per_tok
        self._scores_on_input = config.router_scores == "sigmoid"
        self.router = torch.empty((config.num_local_experts, config.hidden_size), dtype=dtype, device=device)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size, dtype, device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield f"{prefix}.router.weight", self.router
        yield from self.shared_expert.tensors(f"{prefix}.shared_expert")

    def flow(self, x_TD: Tensor, dispatcher: Dispatcher) -> Flow:
        """The layer's output y_TD; pauses once, before it waits for the experts."""
        logits_TE = linear(x_TD, self.router)
        if self._scores_on_input:
            ticket = dispatcher.dispatch(*scaled_rows(logits_TE, x_TD, self._top_k), self._layer)
        else:
            chosen_TK, expert_ids_TK = best(logits_TE, self._top_k)
            ticket = dispatcher.dispatch(x_TD, expert_ids_TK, self._layer)
        y_TD = self.shared_expert(x_TD)
        yield
        routed: Tensor = dispatcher.combine(ticket)
        if self._scores_on_input:
            routed = routed.view(-1, self._top_k, x_TD.shape[-1])
            return y_TD.add_(routed[:, 0] if self._top_k == 1 else routed.sum(dim=1))
        log_total_T1 = torch.logsumexp(logits_TE.double(), dim=-1, keepdim=True)
        probabilities_TK1 = torch.exp(chosen_TK.double() - log_total_T1).to(x_TD.dtype)[:, :, None]
        return y_TD + (routed * probabilities_TK1).sum(dim=1)


class Experts:
    """The weights of some experts of some layers: gate_up [2I, D] and down [D, I].

    The checkpoint has them transposed; this way the weights of one output are contiguous, as `row_products` reads them.
    """

    def __init__(
        self,
        config: TextConfig,
        experts_by_layer: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Raises ValueError when a layer has no experts or an expert does not exist."""
        hidden, width = config.hidden_size, config.intermediate_size
        self._weights: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for layer, experts in experts_by_layer.items():
            if layer not in config.moe_layers:
                raise ValueError(f"layer {layer} has no experts: only the layers {list(config.moe_layers)} have")
            for expert in experts:
                if not 0 <= expert < config.num_local_experts:
                    raise ValueError(f"layer {layer} has no expert {expert}: there are {config.num_local_experts}")
                self._weights[layer, expert] = (
                    zeros((2 * width, hidden), dtype, device),
                    zeros((hidden, width), dtype, device),
                )

    @property
    def nbytes(self) -> int:
        """The size of all weights."""
        return sum(gate_up.nbytes + down.nbytes for gate_up, down in self._weights.values())

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Layer → the experts whose weights are here, ascending."""
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(self._weights):
            layers.setdefault(layer, []).append(expert)
        return {layer: tuple(experts) for layer, experts in layers.items()}

    def part(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """An expert's gate_up [2I, D] and down [D, I]. Raises KeyError when it is not here."""
        return self._weights[layer, expert]

    def take(self, others: Experts) -> None:
        """Adds the experts of `others` to these; another thread may be computing meanwhile."""
        self._weights.update(others._weights)

    def drop(self, layer: int, expert: int) -> None:
        """Forgets an expert that no row will come for any more."""
        del self._weights[layer, expert]

    def tensors(self) -> Iterator[tuple[str, int, Tensor]]:
        """The checkpoint's names, the expert's index in the tensor's first dimension, and where that part is kept."""
        for (layer, expert), (gate_up, down) in self._weights.items():
            prefix = f"model.layers.{layer}.feed_forward.experts"
            yield f"{prefix}.gate_up_proj", expert, gate_up.t()
            yield f"{prefix}.down_proj", expert, down.t()

    def __call__(self, layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Rows sorted by expert: counts[i] consecutive rows are for expert_ids[i]. Returns their outputs y_ND."""
        assert sum(counts) == x_ND.shape[0], "every row must belong to an expert"
        hit = [expert for expert, count in zip(expert_ids, counts, strict=True) if count]
        if not hit:
            return torch.empty_like(x_ND)
        gate_up, down = zip(*(self._weights[layer, expert] for expert in hit), strict=True)
        rows = [count for count in counts if count]
        return gated_linear(x_ND, gate_up, down, rows)
