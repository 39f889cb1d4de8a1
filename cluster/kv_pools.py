"""How large an attention actor's KV pools are. Pure."""

from __future__ import annotations

from cluster.config import EngineConfig


def pool_pages(engine: EngineConfig, chunk: int) -> tuple[int, int]:
    """Pages of each full-attention layer and of each chunked one (0 if `chunk` is): the KV pools of an attention actor.

    The former hold `kv_tokens`; the latter the chunks of all running sequences, but never more than that.
    """
    full = engine.kv_tokens // engine.page_size
    if not chunk:
        return full, 0
    per_sequence = -(-chunk // engine.page_size) + 1  # a chunk may straddle page borders
    per_step = -(-engine.max_batch_tokens // engine.page_size)
    return full, min(full, engine.max_running * per_sequence + per_step)
