"""What must hold between the fields of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config import DeploymentConfig

_HTTP_URL = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?")
_HOST = re.compile(r"(\*\.)?([^\s/@*:\[\]?#]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")


def cross_problems(config: DeploymentConfig) -> Iterator[str]:
    """A sentence for each fault that no field has by itself."""
    for name, reservation in (("attention", config.attention), ("experts", config.experts), ("vision", config.vision)):
        if reservation.num_cpus == 0 and reservation.num_gpus == 0 and not reservation.resources:
            yield f"{name}.num_cpus must be above 0 when {name} reserves no GPU and no resources"
        reserved = {"CPU": "num_cpus", "GPU": "num_gpus"}
        for resource in reservation.resources.keys() & reserved.keys():
            yield f"{name}.resources must not hold {resource}: use {name}.{reserved[resource]}"
    for name, role in (("attention", config.attention), ("experts", config.experts)):
        if role.num_gpus not in (0, 1):
            yield f"{name}.num_gpus must be 0 or 1, not {role.num_gpus:g}: NCCL needs a GPU of its own for each actor"
    if config.attention.device != config.experts.device:
        yield "attention.num_gpus and experts.num_gpus must be equal: tokens travel between devices of one kind"
    if config.transport.micro_batches == 2 and config.transport_kind == "all_to_all":
        yield (
            "transport.micro_batches 2 needs transport.kind p2p: with all_to_all every member enters each layer's "
            "collectives once a step"
        )
    if config.experts.replicas > config.experts.actors:
        yield (
            f"experts.replicas ({config.experts.replicas}) must be at most experts.actors ({config.experts.actors}): "
            "the holders of an expert are different actors"
        )
    engine = config.engine
    if engine.max_running > engine.max_batch_tokens:
        yield (
            f"engine.max_running ({engine.max_running}) must be at most engine.max_batch_tokens "
            f"({engine.max_batch_tokens}): every running request takes a row of each step"
        )
    if engine.kv_tokens % engine.page_size:
        yield f"engine.kv_tokens ({engine.kv_tokens}) must be a multiple of engine.page_size ({engine.page_size})"
    if config.model.max_context is not None and config.model.max_context > engine.kv_tokens:
        yield (
            f"model.max_context ({config.model.max_context}) must be at most engine.kv_tokens ({engine.kv_tokens}): "
            "a longer request could never run"
        )
    if config.vision.max_replicas < config.vision.min_replicas:
        yield (
            f"vision.max_replicas ({config.vision.max_replicas}) must be at least vision.min_replicas "
            f"({config.vision.min_replicas})"
        )
    for host in config.vision.url_hosts:
        if not _HOST.fullmatch(host):
            yield (
                f"vision.url_hosts must hold hosts, such as example.org, *.example.org or store.example.org:9000, "
                f"not {host!r}"
            )
    if config.vision.url_hosts and not config.vision.allow_urls:
        yield "vision.url_hosts needs vision.allow_urls to be true: without it, no URL is fetched"
    if config.gateway.http_port == config.gateway.grpc_port:
        yield f"gateway.grpc_port must differ from gateway.http_port ({config.gateway.http_port})"
    if config.gateway.grpc.tls is not None and config.gateway.grpc.mode == "serve":
        yield "gateway.grpc.tls needs gateway.grpc.mode to be standalone: Ray Serve's proxy has no TLS"
    if config.tracing.endpoint is not None and not _HTTP_URL.fullmatch(config.tracing.endpoint):
        yield f"tracing.endpoint must be a URL such as http://collector:4318, not {config.tracing.endpoint!r}"
    if not all(key.get_secret_value().strip() for key in config.gateway.api_keys):
        yield "gateway.api_keys must not hold an empty key"
