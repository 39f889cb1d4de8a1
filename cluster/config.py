"""What a deployment is: one YAML file, checked before anything starts.

`load_config` reads the file, lays `--set key=value` overrides over it and checks the result against the schema below.
Every problem is one sentence that names the dotted field; an unknown key names the nearest known one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from cluster.config_checks import cross_problems
from cluster.config_errors import ConfigError, sentences

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
FilePath = Annotated[Path, Field(strict=False)]
Unquoted = BeforeValidator(lambda value: "off" if value is False else value)  # YAML 1.1 reads a bare off as false


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnySection = TypeVar("AnySection", bound=_Section)


class ModelConfig(_Section):
    """The checkpoint, and how it is served."""

    path: FilePath
    name: Annotated[str, Field(min_length=1)] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_context: Count | None = None  # tokens of prompt and answer; None: the checkpoint's own limit
    router_scores: Literal["sigmoid", "softmax"] = "sigmoid"

    @property
    def served_name(self) -> str:
        """The name that clients ask for: `name`, or the checkpoint directory's."""
        return self.name or self.path.name


class ReservationConfig(_Section):
    """What one actor reserves in Ray, and so where it computes."""

    num_cpus: Amount = 1.0
    num_gpus: Annotated[float, Field(ge=0, le=1)] = 0.0  # 0: on the CPU; 1: on a GPU of its own
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    threads: Count | None = None  # torch threads; None: num_cpus, rounded down, at least 1

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.num_gpus > 0 else "cpu"

    @property
    def compute_threads(self) -> int:
        return self.threads or max(1, int(self.num_cpus))


class RoleConfig(ReservationConfig):
    """How many actors of one role there are, and how Ray spreads them over nodes."""

    actors: Count = 1
    strategy: Strategy = "PACK"


class AttentionConfig(RoleConfig):
    """Attention actors: each one a whole engine with its own KV cache."""


class ExpertsConfig(RoleConfig):
    """Expert actors: one slot each. Seats (`actors` x `per_actor`) beyond `replicas` an expert hold further ones."""

    replicas: Count = 1  # holders, at least, of every expert; with 2 each survives the loss of any one actor
    per_actor: Count | None = None  # routed experts of each MoE layer that one actor holds; None: an even split


class EngineConfig(_Section):
    """The limits of each attention actor's engine."""

    max_batch_tokens: Count = 2048  # rows of one step
    max_running: Count = 64
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    page_size: Count = 16  # tokens
    kv_tokens: Count = 16384  # KV capacity in tokens


class TransportConfig(_Section):
    """How tokens travel between attention and expert actors."""

    kind: Literal["auto", "p2p", "all_to_all"] = "auto"  # auto: p2p between CPUs, all_to_all between GPUs
    deadline_s: Seconds = 5.0  # p2p: an expert actor that owes rows and gives no byte for so long is taken for dead
    # p2p: so many parts of a step are under way at once; auto: 1 or 2, whichever is measured to be faster.
    micro_batches: Literal["auto", 1, 2] = "auto"
    timeout_s: Seconds = 60.0  # all_to_all: for a collective, from its start to its end


class BalanceConfig(_Section):
    """How experts are spread over the expert actors by their load while the deployment runs."""

    mode: Annotated[Literal["off", "manual", "auto"], Unquoted] = "off"  # manual: when asked to; auto: unasked too
    interval_s: Seconds = 30.0  # auto: between two looks at the loads
    window_s: Seconds = 30.0  # time constant of the loads' moving average
    threshold: Annotated[float, Field(gt=1)] = 1.2  # auto: max/mean load per actor above which experts are moved


class VisionConfig(ReservationConfig):
    """The image encoder, a Serve deployment that scales by its own load; and what images a request may bring.

    Read only when the checkpoint has an image encoder. `num_gpus` may be a part of a GPU, which replicas then share.
    """

    min_replicas: Annotated[int, Field(ge=0)] = 1  # 0: the first image after a quiet time waits for a replica to load
    max_replicas: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 4.0  # images that a replica has under way; more: scale up
    upscale_delay_s: Amount = 5.0  # how long the load has to be above the target
    downscale_delay_s: Amount = 300.0  # and how long below
    max_batch_tiles: Count = 16  # encoded in one pass
    # By which part a burst of images may raise the time per token of the text that streams meanwhile: beyond, requests
    # with images begin one after the other. None: they never wait.
    max_stream_slowdown: Annotated[float, Field(gt=0)] | None = 0.1
    cache_bytes: Count = 2**30  # of embeddings in the object store that a replica or a gateway keeps for later requests
    allow_urls: bool = False  # of http and https; data: URLs are always allowed
    # Where these may lead: names, and *.example.org for all below one. Empty: to any public host. Only a host with a
    # port (store.example.org:9000) may be at a private address.
    url_hosts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    url_timeout_s: Seconds = 10.0  # for a whole download
    max_images: Count = 16  # of one request
    max_image_bytes: Count = 10 * 2**20  # of an encoded file
    max_image_pixels: Count = 50_000_000  # of a decoded one


class TlsConfig(_Section):
    """Certificates of the standalone gRPC server: PEM files, on every node that has a gateway."""

    cert: FilePath  # the server's, followed by the intermediate ones
    key: FilePath
    client_ca: FilePath | None = None  # clients must then show a certificate signed by it


class TracingConfig(_Section):
    """OpenTelemetry traces of requests, sent by OTLP over HTTP. Off without an endpoint."""

    endpoint: str | None = None  # a collector's, such as http://collector:4318: /v1/traces is put behind it
    sample: Annotated[float, Field(ge=0, le=1)] = 1.0  # the part of the requests, where no caller has decided


class GrpcConfig(_Section):
    """How gRPC is served: by Ray Serve's proxy, or by a server of each gateway replica's own (TLS, grpc.health.v1)."""

    mode: Literal["serve", "standalone"] = "serve"
    tls: TlsConfig | None = None  # None: plain text


class GatewayConfig(_Section):
    """Where clients connect, and what they may send."""

    replicas: Count = 1
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    http_port: Port = 8000
    grpc_port: Port = 9000
    grpc: GrpcConfig = GrpcConfig()
    max_ongoing_requests: Count = 1000  # per replica
    max_body_bytes: Count = 16 * 2**20  # of an HTTP request's body or a gRPC message
    api_keys: Annotated[
        tuple[SecretStr, ...], Field(strict=False)
    ] = ()  # none, here and in the file: no key is asked for
    api_keys_file: FilePath | None = None  # a key a line; empty lines and those that begin with # are passed over
    drain_timeout_s: Annotated[float, Field(ge=0)] = 30.0  # for what runs to end, when the deployment is told to


class DeploymentConfig(_Section):
    """One deployment: the whole YAML file."""

    model: ModelConfig
    attention: AttentionConfig = AttentionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    engine: EngineConfig = EngineConfig()
    transport: TransportConfig = TransportConfig()
    balance: BalanceConfig = BalanceConfig()
    vision: VisionConfig = VisionConfig()
    gateway: GatewayConfig = GatewayConfig()
    tracing: TracingConfig = TracingConfig()
    placement_timeout_s: Seconds = 300.0  # for Ray to find room; an autoscaler needs minutes
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False  # what clients ask, at level INFO; nothing of it is logged otherwise

    @model_validator(mode="after")
    def _check(self) -> DeploymentConfig:
        problems = list(cross_problems(self))
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def transport_kind(self) -> Literal["p2p", "all_to_all"]:
        """How rows travel: straight to the experts' holders, or by collectives."""
        if self.transport.kind == "auto":
            return "all_to_all" if self.attention.device == "cuda" else "p2p"
        return self.transport.kind

    @property
    def data_backend(self) -> Literal["gloo", "nccl"]:
        """What carries rows that do not travel by sockets: NCCL between GPUs, gloo between CPUs."""
        return "nccl" if self.attention.device == "cuda" else "gloo"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DeploymentConfig:
    """The deployment that the YAML file at `path` describes, under `overrides` such as `engine.page_size=32`.

    An override's value is read as YAML, its key is dotted; later ones win. A relative path means a file or directory
    beside the configuration if there is one of that name, else one under the working directory; it comes back absolute.
    Raises ConfigError with every fault found.
    """
    path = Path(path)
    data = _read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    try:
        config = DeploymentConfig.model_validate(data)
    except ValidationError as error:
        problems = [problem for fault in error.errors() for problem in sentences(fault, DeploymentConfig)]
        raise ConfigError([f"{path}: {problem}" for problem in problems]) from None
    return _with_absolute_paths(config, path.parent)


def resolve_path(path: Path, folder: Path) -> Path:
    """`path` made absolute: against `folder` or the working directory, whichever has it first, else `folder`."""
    path = path.expanduser()
    beside = folder / path
    return (path if path.exists() and not beside.exists() else beside).resolve()


def _with_absolute_paths(section: AnySection, folder: Path) -> AnySection:
    changes: dict[str, object] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changes[name] = resolve_path(value, folder)
        elif isinstance(value, _Section):
            changes[name] = _with_absolute_paths(value, folder)
    return section.model_copy(update=changes)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror})"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"{path}: must hold a mapping of sections ({', '.join(DeploymentConfig.model_fields)})"])
    # `experts:` with nothing under it is a section of defaults.
    return {key: {} if value is None else value for key, value in data.items()}


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise ConfigError([f"--set {override}: must have the form key=value, such as engine.page_size=32"])
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError([f"--set {override}: the value is not YAML"]) from None
    section = data
    for part in keys[:-1]:
        inner = section.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError([f"--set {override}: {part} is a value, not a section"])
        section = inner
    section[keys[-1]] = value
