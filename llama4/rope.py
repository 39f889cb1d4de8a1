"""Rotary position embedding in interleaved pairs, and the query temperature of the layers that have none.

Shapes: T rows, H heads, D head width, F = D / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llama4.config import TextConfig


def inverse_frequencies(config: TextConfig, device: torch.device | str) -> Tensor:
    """RoPE's angular frequencies (radians per position), float32 [F].

    f_i = theta^(-2i/D) (Su et al., arXiv:2104.09864). With llama3 scaling (as in Llama 3.1's reference implementation,
    `apply_scaling` in meta-llama/llama-models) wavelengths above L / low_freq_factor are stretched by `factor`, those
    below L / high_freq_factor stay, and between the two f becomes (1 - s) * f / factor + s * f with
    s = (L / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor); L is the original context length.
    """
    # Made on the CPU: for a range on the device "meta" torch imports its compiler, which takes a second.
    exponents_F = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies_F = 1.0 / (config.rope_theta**exponents_F)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies_F.to(device)
    turns_F = scaling.original_max_position_embeddings / (2 * math.pi / frequencies_F)  # L / wavelength
    smooth_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_F = smooth_F.nan_to_num(nan=1.0).clamp(0.0, 1.0)  # Scout has equal factors: a step, by division by zero
    return ((1 - smooth_F) * frequencies_F / scaling.factor + smooth_F * frequencies_F).to(device)


def rotation(positions_T: Tensor, frequencies_F: Tensor) -> Tensor:
    """The complex factor e^(i * position * frequency) of each row and pair, complex64 [T, 1, F].

    By way of float64: in float32, torch gives a row another last bit when it is in a batch of another size.
    """
    angles_TF = (positions_T[:, None].float() * frequencies_F).double()
    return torch.polar(torch.ones_like(angles_TF), angles_TF).to(torch.complex64)[:, None]


def rotate_(x_THD: Tensor, rotation_T1F: Tensor) -> None:
    """Turns each pair (x[2i], x[2i+1]) of every head by its row's angle, in place, computed in float32."""
    x32_THD = x_THD.float()  # x itself, if it is float32
    pairs = x32_THD.view(*x32_THD.shape[:-1], rotation_T1F.shape[-1], 2)
    torch.view_as_complex(pairs).mul_(rotation_T1F)
    if x32_THD is not x_THD:
        x_THD.copy_(x32_THD)


def query_temperature(config: TextConfig, positions_T: Tensor) -> Tensor:
    """log1p(floor((position + 1) / floor_scale)) * attn_scale + 1 (arXiv:2501.19399), float32 [T]."""
    floors_T = torch.floor((positions_T.double() + 1.0) / config.floor_scale)
    return (torch.log1p(floors_T) * config.attn_scale + 1.0).float()
