"""The image encoder: tiles of pixels to rows that stand in a prompt like the embeddings of tokens.

Shapes: N tiles, C colours, H and W a tile's sides, P patches of a tile, S = P + 1 rows of a tile in the encoder, E the
encoder's width, A heads, K head width, F = K / 2 pairs, M tokens of a tile, D the text model's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama4.rope import rotate_
from llama4.vision_config import VisionConfig


class Linear:
    """A product with the transpose of a matrix, plus a bias where there is one."""

    def __init__(self, rows: int, columns: int, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weight = torch.empty((rows, columns), dtype=dtype, device=device)
        self.bias = torch.empty(rows, dtype=dtype, device=device) if bias else None

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield f"{prefix}.weight", self.weight
        if self.bias is not None:
            yield f"{prefix}.bias", self.bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LayerNorm:
    """To mean 0 and variance 1 over the last dimension, times a weight, plus a bias."""

    _EPS = 1e-5  # published; the reference implementation does not read config.json's norm_eps either

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._weight = torch.empty(width, dtype=dtype, device=device)
        self._bias = torch.empty(width, dtype=dtype, device=device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield f"{prefix}.weight", self._weight
        yield f"{prefix}.bias", self._bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._EPS)


class TileAttention:
    """Every row of a tile attends to all rows of the same tile."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        width = config.hidden_size
        self._heads = config.num_attention_heads
        self._qkv = Linear(3 * width, width, True, dtype, device)
        self._out = Linear(width, width, True, dtype, device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        for kind, fused in self._qkv.tensors(""):
            for name, part in zip(("q_proj", "k_proj", "v_proj"), fused.chunk(3), strict=True):
                yield f"{prefix}.{name}{kind}", part
        yield from self._out.tensors(f"{prefix}.o_proj")

    def __call__(self, x_NSE: Tensor, rotation_S1F: Tensor) -> Tensor:
        tiles, rows, _ = x_NSE.shape
        qkv_NSAK = self._qkv(x_NSE).view(tiles, rows, 3 * self._heads, -1)
        rotate_(qkv_NSAK[:, :, : 2 * self._heads], rotation_S1F)  # queries and keys
        q_NASK, k_NASK, v_NASK = qkv_NSAK.transpose(1, 2).chunk(3, dim=1)
        y_NASK = F.scaled_dot_product_attention(q_NASK, k_NASK, v_NASK)
        return self._out(y_NASK.transpose(1, 2).flatten(2))


class Layer:
    """Attention, then an MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self._attention_norm = LayerNorm(width, dtype, device)
        self._attention = TileAttention(config, dtype, device)
        self._mlp_norm = LayerNorm(width, dtype, device)
        self._up = Linear(inner, width, True, dtype, device)
        self._down = Linear(width, inner, True, dtype, device)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield from self._attention_norm.tensors(f"{prefix}.input_layernorm")
        yield from self._attention.tensors(f"{prefix}.self_attn")
        yield from self._mlp_norm.tensors(f"{prefix}.post_attention_layernorm")
        yield from self._up.tensors(f"{prefix}.mlp.fc1")
        yield from self._down.tensors(f"{prefix}.mlp.fc2")

    def __call__(self, h_NSE: Tensor, rotation_S1F: Tensor) -> Tensor:
        h_NSE = h_NSE + self._attention(self._attention_norm(h_NSE), rotation_S1F)
        return h_NSE + self._down(F.gelu(self._up(self._mlp_norm(h_NSE))))


class VisionEncoder:
    """The whole way from pixels to the text model. `weights.load_vision` makes one with its weights filled in."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        width, adapter = config.hidden_size, config.adapter_size
        self._config = config
        self._patch = Linear(width, config.num_channels * config.patch_size**2, False, dtype, device)
        self._class_E = torch.empty(width, dtype=dtype, device=device)
        self._positions_SE = torch.empty((config.patches**2 + 1, width), dtype=dtype, device=device)
        self._first_norm = LayerNorm(width, dtype, device)
        self._layers = [Layer(config, dtype, device) for _ in range(config.num_hidden_layers)]
        self._last_norm = LayerNorm(width, dtype, device)
        self._adapter_in = Linear(adapter, width * config.shuffle**2, False, dtype, device)
        self._adapter_out = Linear(adapter, adapter, False, dtype, device)
        self._projector = Linear(config.text_hidden_size, adapter, False, dtype, device)
        self._rotation_S1F = tile_rotation(config, device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's names and where each tensor is kept."""
        yield from self._patch.tensors("vision_model.patch_embedding.linear")
        yield "vision_model.class_embedding", self._class_E
        yield "vision_model.positional_embedding_vlm", self._positions_SE
        yield from self._first_norm.tensors("vision_model.layernorm_pre")
        for n, layer in enumerate(self._layers):
            yield from layer.tensors(f"vision_model.model.layers.{n}")
        yield from self._last_norm.tensors("vision_model.layernorm_post")
        yield from self._adapter_in.tensors("vision_model.vision_adapter.mlp.fc1")
        yield from self._adapter_out.tensors("vision_model.vision_adapter.mlp.fc2")
        yield from self._projector.tensors("multi_modal_projector.linear_1")

    def __call__(self, tiles_NCHW: Tensor) -> Tensor:
        """The embeddings_NMD of normalised tiles, in the encoder's dtype. Tiles do not depend on each other."""
        x_NPE = self._patch(patches(tiles_NCHW.to(self._class_E), self._config.patch_size))
        h_NSE = torch.cat([x_NPE, self._class_E.expand(len(x_NPE), 1, -1)], dim=1)
        h_NSE = self._first_norm(h_NSE + self._positions_SE)
        for layer in self._layers:
            h_NSE = layer(h_NSE, self._rotation_S1F)
        h_NPE = self._last_norm(h_NSE[:, :-1])  # the class row has done its work
        y_NME = F.gelu(self._adapter_in(pixel_shuffle(h_NPE, self._config.shuffle)))
        return self._projector(F.gelu(self._adapter_out(y_NME)))


def patches(tiles_NCHW: Tensor, patch_size: int) -> Tensor:
    """The pixels of each patch, row by row of patches: [N, P, C * patch_size^2]."""
    tiles, colours, height, width = tiles_NCHW.shape
    by_patch = tiles_NCHW.reshape(tiles, colours, height // patch_size, patch_size, width // patch_size, patch_size)
    return by_patch.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def pixel_shuffle(h_NPE: Tensor, shuffle: int) -> Tensor:
    """Puts squares of `shuffle` by `shuffle` patches side by side into one row each: [N, M, E * shuffle^2].

    Shi et al., arXiv:1609.05158, backwards, with the channels of a patch together.
    """
    tiles, count, width = h_NPE.shape
    side = math.isqrt(count) // shuffle
    squares = h_NPE.view(tiles, side, shuffle, side, shuffle, width).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def tile_rotation(config: VisionConfig, device: torch.device | str) -> Tensor:
    """RoPE in two dimensions: the complex factor of each row of a tile and each pair, complex64 [S, 1, F].

    The first half of the pairs turns by the patch's column, the other by its row, counted from 1, times
    theta^(-4i/K), i = 0 .. F/2 - 1 (axial, as in Pixtral, arXiv:2410.07073). The class row, the last, does not turn.
    """
    # Made on the CPU, for the same reason as rope.inverse_frequencies.
    exponents = torch.arange(0, config.head_dim, 4, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    lines = torch.arange(1, config.patches + 1, dtype=torch.float32)[:, None] * frequencies
    by_column = lines.repeat(config.patches, 1)
    by_row = lines.repeat_interleave(config.patches, dim=0)
    angles_SF = F.pad(torch.cat([by_column, by_row], dim=1), (0, 0, 0, 1))
    return torch.polar(torch.ones_like(angles_SF), angles_SF)[:, None].to(device)
