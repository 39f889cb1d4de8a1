"""Every time series that Herder measures: its name, type, labels and meaning. Knows neither Ray nor Prometheus.

Ray exports them from every process, under `ray_` and the name; a gateway's /metrics has those of requests, engines and
cluster under the name alone. Counters get `_total` behind it in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from engine.request import EngineLoad


@dataclass(frozen=True)
class Series:
    """`buckets`: a histogram's upper bounds, ascending, without infinity."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_MODEL, _ENGINE = ("model",), ("engine",)

# ---- a gateway's: the requests that came through it

REQUESTS = Series(
    "herder_requests",
    "counter",
    "requests",
    "Requests that have ended, by finish reason or error.",
    ("model", "reason"),
)
PROMPT_TOKENS = Series("herder_prompt_tokens", "counter", "tokens", "Tokens of prompts.", _MODEL)
CACHED_TOKENS = Series(
    "herder_prompt_tokens_cached", "counter", "tokens", "Those of them that the prefix cache had.", _MODEL
)
GENERATED_TOKENS = Series("herder_generation_tokens", "counter", "tokens", "Tokens generated.", _MODEL)
FIRST_TOKEN = Series(
    "herder_time_to_first_token_seconds", "histogram", "s", "From a request's acceptance to its first token.", _MODEL,
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160),
)  # fmt: skip
PER_TOKEN = Series(
    "herder_time_per_output_token_seconds", "histogram", "s",
    "Between tokens after the first: the mean of each request.", _MODEL,
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5),
)  # fmt: skip
WHOLE_REQUEST = Series(
    "herder_e2e_request_latency_seconds", "histogram", "s", "From a request's acceptance to its end.", _MODEL,
    (0.1, 0.3, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920),
)  # fmt: skip
IMAGE_WAIT = Series(
    "herder_image_wait_seconds", "histogram", "s",
    "Waited by a request with images before its acceptance, so that streams of text are not slowed.", _MODEL,
    (0.001, 0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160),
)  # fmt: skip
GATEWAY = (REQUESTS, PROMPT_TOKENS, CACHED_TOKENS, GENERATED_TOKENS, FIRST_TOKEN, PER_TOKEN, WHOLE_REQUEST, IMAGE_WAIT)

# ---- an attention actor's

ENGINE: tuple[tuple[Series, Callable[[EngineLoad], float]], ...] = (
    (
        Series("herder_requests_running", "gauge", "requests", "Requests that are prefilling or decoding.", _ENGINE),
        lambda load: load.running,
    ),
    (
        Series("herder_requests_parked", "gauge", "requests", "Those of them that wait for a lost expert.", _ENGINE),
        lambda load: load.parked,
    ),
    (
        Series("herder_requests_waiting", "gauge", "requests", "Requests that wait for their first step.", _ENGINE),
        lambda load: load.waiting,
    ),
    (Series("herder_engine_steps", "counter", "steps", "Steps.", _ENGINE), lambda load: load.steps),
    (
        Series("herder_engine_prompt_tokens", "counter", "tokens", "Tokens of prompts that were computed.", _ENGINE),
        lambda load: load.prompt_tokens,
    ),
    (
        Series("herder_engine_cached_tokens", "counter", "tokens", "Tokens of prompts from the prefix cache.", _ENGINE),
        lambda load: load.cached_prompt_tokens,
    ),
    (
        Series("herder_engine_generation_tokens", "counter", "tokens", "Tokens generated.", _ENGINE),
        lambda load: load.generated_tokens,
    ),
    (
        Series(
            "herder_preemptions", "counter", "requests", "Requests that gave their KV pages up for others.", _ENGINE
        ),
        lambda load: load.preemptions,
    ),
)
_POOL = ("engine", "layer_kind")
KV_USAGE = Series("herder_kv_cache_usage", "gauge", "0 to 1", "KV pages held by requests, of all.", _POOL)
KV_PREFIX = Series(
    "herder_kv_cache_prefix", "gauge", "0 to 1", "KV pages held by the prefix cache alone, of all.", _POOL
)

DISPATCH_SECONDS = Series(
    "herder_dispatch_seconds", "counter", "s", "Spent sending rows to experts, all MoE layers together.", _ENGINE
)
COMBINE_SECONDS = Series(
    "herder_combine_seconds",
    "counter",
    "s",
    "Spent waiting for the rows to come back, beyond the shared expert.",
    _ENGINE,
)
BYTES_SENT = Series("herder_dispatch_sent_bytes", "counter", "bytes", "Rows sent to expert actors.", _ENGINE)
BYTES_RECEIVED = Series("herder_dispatch_received_bytes", "counter", "bytes", "Rows that came back.", _ENGINE)
TRANSPORT = (DISPATCH_SECONDS, COMBINE_SECONDS, BYTES_SENT, BYTES_RECEIVED)

# ---- an expert actor's

# Summed over the layers: 128 experts of 24 layers would be 3072 series of each deployment, twice with two replicas.
EXPERT_ROWS = Series(
    "herder_expert_rows", "counter", "rows", "Rows computed for an expert, all layers together.", ("slot", "expert")
)

# ---- the controller's

READY = Series("herder_ready", "gauge", "0 or 1", "Whether a request sent now is answered.")
EPOCH = Series("herder_epoch", "gauge", "epochs", "Counts the changes of actors and of their experts.")
FAILOVERS = Series("herder_failovers", "counter", "actors", "Lost actors that were replaced.")
BALANCEDNESS = Series(
    "herder_expert_balancedness", "gauge", "ratio",
    "Highest load of a slot, as a multiple of the mean; 0 while it is not known.",
)  # fmt: skip
CLUSTER = (READY, EPOCH, FAILOVERS, BALANCEDNESS)

# ---- an image encoder's

IMAGES = Series("herder_vision_images", "counter", "images", "Images encoded.")
IMAGE_HITS = Series(
    "herder_vision_cached_images", "counter", "images", "Images asked for that had been encoded already."
)
TILES = Series("herder_vision_tiles", "counter", "tiles", "Tiles encoded.")
IMAGES_RUNNING = Series("herder_vision_images_running", "gauge", "images", "Images that are encoded or wait for it.")
ENCODE_SECONDS = Series(
    "herder_vision_encode_seconds", "histogram", "s", "Of a batch of tiles in the encoder.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)  # fmt: skip
VISION = (IMAGES, IMAGE_HITS, TILES, IMAGES_RUNNING, ENCODE_SECONDS)

# ---- at /metrics alone, of the whole deployment: what a Gateway API inference extension's endpoint picker reads

QUEUED = Series("herder_num_requests_waiting", "gauge", "requests", "Requests that wait for their first step.")
RUNNING = Series("herder_num_requests_running", "gauge", "requests", "Requests that are prefilling or decoding.")
KV_UTILISATION = Series(
    "herder_kv_cache_usage_perc", "gauge", "0 to 1",
    "KV pages held by requests, of each engine's fullest pool; the engines' mean.",
)  # fmt: skip
BALANCEDNESS_BEFORE = Series(
    "herder_expert_balancedness_before", "gauge", "ratio", "The balancedness just before experts were last moved."
)
SINCE_MOVE = Series("herder_expert_seconds_since_move", "gauge", "s", "Since experts were last moved.")
METRICS_ONLY = (QUEUED, RUNNING, KV_UTILISATION, BALANCEDNESS_BEFORE, SINCE_MOVE)
