"""Which number type to compute in on a device."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import torch

DtypeName = Literal["auto", "float32", "bfloat16"]
_log = logging.getLogger(__name__)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; otherwise torch is hundreds of times slower in it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_dtype(device: torch.device | str, requested: DtypeName = "auto") -> torch.dtype:
    """The compute type: "auto" is bfloat16 on GPUs and float32 on CPUs, also on those that multiply bfloat16.

    In float32 the order of a sum moves logits by a few millionths, in bfloat16 by hundredths: there an answer would
    depend on what else is in the batch, and on the CPU that a node has. float32 decodes about as fast here.
    bfloat16 on a CPU without it is obeyed, with a warning. Raises ValueError for an unknown name.
    """
    if requested not in get_args(DtypeName):
        raise ValueError(f"dtype must be one of {', '.join(get_args(DtypeName))}, not {requested!r}")
    on_cpu = torch.device(device).type == "cpu"
    if requested == "bfloat16" and on_cpu and not cpu_has_bfloat16():
        _log.warning("dtype bfloat16 is far slower than float32 on this CPU, which has neither AVX512_BF16 nor AMX")
    if requested == "float32" or (requested == "auto" and on_cpu):
        return torch.float32
    return torch.bfloat16
