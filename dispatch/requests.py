"""What attention ranks ask of an expert server, and several such requests computed as one batch.

Shape legend: N rows, D hidden width.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dispatch.routing import GroupedExperts
from dispatch.wire import Header

Results: TypeAlias = "Sequence[memoryview] | Tensor"  # of one request: bytes on the CPU, or rows on a device


class Request(NamedTuple):
    """A ROWS message: counts[i] rows of x_ND, one after the other, are for experts[i]; no expert comes twice."""

    header: Header
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    x_ND: Tensor


def compute_together(experts: GroupedExperts, layer: int, requests: Sequence[Request]) -> list[list[memoryview]]:
    """One grouped pass over the rows of all requests; for each request the pieces of its results, in its rows' order.

    The rows of several requests are copied once, to stand together by expert; the results are not.
    """
    if len(requests) == 1:  # sorted by expert as it came
        only = requests[0]
        return [[as_bytes(_call(experts, layer, only.x_ND, only.experts, only.counts))]]
    width, dtype = requests[0].x_ND.shape[1], requests[0].x_ND.dtype
    row_bytes = width * dtype.itemsize
    runs: dict[int, list[tuple[int, memoryview]]] = {}  # expert -> (place of the request, its rows)
    for place, request in enumerate(requests):
        x, at = as_bytes(request.x_ND), 0
        for expert, count in zip(request.experts, request.counts, strict=True):
            run = place, x[at : (at := at + count * row_bytes)]
            runs.setdefault(expert, []).append(run)
    # Joined as bytes: for the few rows of a step, torch.split and torch.cat take many times as long.
    joined = bytearray().join([x_run for of_expert in runs.values() for _, x_run in of_expert])
    counts = [sum(len(x_run) for _, x_run in of_expert) // row_bytes for of_expert in runs.values()]
    x_ND = torch.frombuffer(joined, dtype=dtype).view(-1, width)
    y = as_bytes(_call(experts, layer, x_ND, tuple(runs), counts))
    pieces: list[dict[int, memoryview]] = [{} for _ in requests]
    at = 0
    for expert, of_expert in runs.items():
        for place, x_run in of_expert:
            pieces[place][expert] = y[at : (at := at + len(x_run))]
    return [[found[expert] for expert in request.experts] for found, request in zip(pieces, requests, strict=True)]


def compute_on_device(experts: GroupedExperts, layer: int, requests: Sequence[Request]) -> list[Tensor]:
    """As `compute_together`, of rows that lie on a device; y_ND for each request."""
    if len(requests) == 1:
        only = requests[0]
        return [_call(experts, layer, only.x_ND, only.experts, only.counts)]
    runs: dict[int, list[tuple[int, Tensor]]] = {}  # expert -> (place of the request, its rows)
    for place, request in enumerate(requests):
        for expert, x_run in zip(request.experts, torch.split(request.x_ND, list(request.counts)), strict=True):
            runs.setdefault(expert, []).append((place, x_run))
    x_runs = [x_run for of_expert in runs.values() for _, x_run in of_expert]
    counts = [sum(len(x_run) for _, x_run in of_expert) for of_expert in runs.values()]
    y_ND = _call(experts, layer, torch.cat(x_runs), tuple(runs), counts)
    y_runs = iter(torch.split(y_ND, [len(x_run) for x_run in x_runs]))
    found: list[dict[int, Tensor]] = [{} for _ in requests]
    for expert, of_expert in runs.items():
        for place, _ in of_expert:
            found[place][expert] = next(y_runs)
    return [torch.cat([of[e] for e in request.experts]) for of, request in zip(found, requests, strict=True)]


def as_bytes(x_ND: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; it must have elements."""
    if x_ND.dtype == torch.bfloat16:  # numpy has no such type
        x_ND = x_ND.view(torch.int16)
    return x_ND.numpy().data.cast("B")


def _call(
    experts: GroupedExperts, layer: int, x_ND: Tensor, expert_ids: Sequence[int], counts: Sequence[int]
) -> Tensor:
    y_ND = experts(layer, x_ND, expert_ids, counts).contiguous()
    assert y_ND.shape == x_ND.shape and y_ND.dtype == x_ND.dtype
    return y_ND
