"""What is checked before anything starts: the configuration, the checkpoint's headers, the placement, the ports."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.api_keys import read_keys
from cli.report import CliError
from cluster.config import ConfigError, DeploymentConfig, GatewayConfig, load_config
from cluster.placement import plan_experts
from dispatch.expert_map import ExpertMap
from engine.image_spec import ImageSpec
from llama4.config import TextConfig
from llama4.vision_config import VisionConfig
from llama4.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Plan:
    """A deployment that can start. `images`: how its model takes them; None if it does not."""

    config: DeploymentConfig
    model: TextConfig
    images: ImageSpec | None
    experts: ExpertMap


def preflight(
    config_path: Path,
    model_dir: Path | None = None,
    settings: Sequence[str] = (),
    http_port: int | None = None,
    grpc_port: int | None = None,
) -> Plan:
    """Reads and checks all that a deployment needs. The options win over `settings`, these over the file.

    Raises ConfigError, or CliError for a checkpoint that cannot be served (exit code 2).
    """
    options = {
        "model.path": None if model_dir is None else str(model_dir.expanduser().resolve()),
        "gateway.http_port": http_port,
        "gateway.grpc_port": grpc_port,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_config(config_path, [*settings, *given])
    check_files(config.gateway)
    path = config.model.path
    if not path.is_dir():
        raise CliError(f"model.path: there is no directory {path}", code=2)
    try:
        model = TextConfig.from_dir(path, router_scores=config.model.router_scores)
        images = ImageSpec.from_dir(path)
        Checkpoint(path).validate(model, None if images is None else VisionConfig.from_dir(path))
    except (ValueError, OSError) as error:
        raise CliError(f"model.path: {error}", code=2) from None
    if config.model.max_context is not None and config.model.max_context > model.max_position_embeddings:
        raise CliError(
            f"model.max_context ({config.model.max_context}) must be at most the checkpoint's "
            f"{model.max_position_embeddings}",
            code=2,
        )
    return Plan(config, model, images, plan_experts(config, model.num_local_experts, model.moe_layers))


def check_files(gateway: GatewayConfig) -> None:
    """Raises ConfigError naming the field of a file that is not there or cannot be used."""
    read_keys(gateway)
    tls = gateway.grpc.tls
    if tls is not None:
        files = {"cert": tls.cert, "key": tls.key, "client_ca": tls.client_ca}
        problems = [
            f"gateway.grpc.tls.{field}: there is no file {file}"
            for field, file in files.items()
            if file is not None and not file.is_file()
        ]
        if problems:
            raise ConfigError(problems)


def check_ports(gateway: GatewayConfig) -> None:
    """Raises CliError naming the field and the port if one of the gateway's ports is taken."""
    for field, port in (("http_port", gateway.http_port), ("grpc_port", gateway.grpc_port)):
        family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((gateway.host, port))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                why = "is in use" if taken else f"cannot be bound ({error.strerror or error})"
                raise CliError(
                    f"gateway.{field}: port {port} on {gateway.host} {why}; choose another with "
                    f"--{field.replace('_', '-')}",
                    code=2,
                ) from None
