"""A deployment's RayService for KubeRay: a head, and a group of worker pods for each role. Pure.

Attention pods hold the attention actors, the gateways and with them Serve's proxies, so they are the pods that clients
reach; expert and vision pods hold their actors alone. Custom Ray resources, one for each role, keep all where they
belong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import DeploymentConfig, RoleConfig, TlsConfig
from cluster.config_errors import ConfigError
from cluster.manifests_pods import (
    API_KEYS_FILE,
    API_KEYS_SECRET,
    HEAD_PORTS,
    METRICS_ONLY,
    MODELS,
    PORTS,
    REDIS_PORT,
    REDIS_SECRET,
    TLS_DIR,
    TLS_SECRET,
    Manifest,
    node_is_up,
    over_nodes,
    ray_container,
    ray_template,
    wait_for_weights,
)
from cluster.manifests_serve import GATEWAY

RAY_VERSION = "2.60.0"  # of the image
_HEAD_GIB, _HEAD_SHM_GIB = 8, 2
_KEYS = {API_KEYS_SECRET: API_KEYS_FILE.parent}

Role = Literal["attention", "experts"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a deployment's configuration does not say of the Kubernetes cluster it runs in.

    source: where the weights come from: a Hugging Face repository, or a directory of the image (an absolute path).
    memory_gib: host memory of a pod for each of its actors. weights_gib: size of the volume of the weights.
    vision: the checkpoint has a vision encoder.
    """

    source: str
    image: str
    memory_gib: int
    weights_gib: int
    gpus_per_node: int
    vision: bool

    def __post_init__(self) -> None:
        name, colon, tag = self.image.rpartition(":")
        if not (name and colon and tag) or "/" in tag:
            raise ConfigError([f"--image must have the form NAME:TAG, not {self.image}"])


@dataclass(frozen=True, slots=True)
class Pods:
    """A role's pods: how many, and how many of its actors each takes."""

    count: int
    actors: int


def pods(config: DeploymentConfig, role: Role, gpus_per_node: int) -> Pods:
    """How a role's actors are put into pods.

    STRICT_PACK means one pod, STRICT_SPREAD a pod for each actor. On GPUs, PACK fills nodes and SPREAD divides the
    actors over all nodes that the deployment's GPUs make up; on CPUs, each actor has a pod.

    Raises:
        ConfigError: a pod would need more GPUs than a node has.
    """
    section = role_section(config, role)
    if section.strategy == "STRICT_PACK":
        actors = section.actors
    elif section.strategy == "STRICT_SPREAD" or section.device == "cpu":
        actors = 1
    elif section.strategy == "PACK":
        actors = min(section.actors, gpus_per_node)
    else:
        nodes = math.ceil((config.attention.actors + config.experts.actors) / gpus_per_node)
        actors = math.ceil(section.actors / nodes)
    if section.device == "cuda" and actors > gpus_per_node:
        raise ConfigError(
            [f"{role}.strategy {section.strategy} needs {actors} GPUs in one pod; --gpus-per-node is {gpus_per_node}"]
        )
    return Pods(math.ceil(section.actors / actors), actors)


def in_containers(config: DeploymentConfig, gpus_per_node: int) -> DeploymentConfig:
    """The configuration as it is inside the pods: their paths and ports, and the roles' custom resources.

    API keys come from a Secret, and every attention pod has a gateway, without which it would get no requests.
    """
    model, gateway = config.model, config.gateway
    tls = gateway.grpc.tls
    if tls is not None:
        ca = None if tls.client_ca is None else TLS_DIR / "ca.crt"
        tls = TlsConfig(cert=TLS_DIR / "tls.crt", key=TLS_DIR / "tls.key", client_ca=ca)
    gateway = gateway.model_copy(
        update={
            "replicas": max(gateway.replicas, pods(config, "attention", gpus_per_node).count),
            "host": "0.0.0.0",
            "http_port": PORTS["serve"],
            "grpc_port": PORTS["serve-grpc"],
            "grpc": gateway.grpc.model_copy(update={"tls": tls}),
            "api_keys_file": API_KEYS_FILE,
        }
    )
    model = model.model_copy(update={"path": MODELS / model.path.name, "name": model.served_name})
    roles = {role: _on_its_pods(role, role_section(config, role)) for role in ("attention", "experts")}
    vision = config.vision.model_copy(update={"resources": {**config.vision.resources, "vision": 1.0}})
    return config.model_copy(update={"model": model, "gateway": gateway, "vision": vision, **roles})


def _on_its_pods(role: str, section: RoleConfig) -> RoleConfig:
    return section.model_copy(update={"resources": {**section.resources, role: 1.0}})


def role_section(config: DeploymentConfig, role: Role) -> RoleConfig:
    return config.attention if role == "attention" else config.experts


def head_spec() -> Manifest:
    """The RayService's part that does not depend on the deployment: the head, and how the cluster is kept."""
    container = ray_container("ray-head", HEAD_PORTS, cpu=2, memory_gib=_HEAD_GIB)
    return {
        "upgradeStrategy": {"type": "None"},  # a second cluster would need all the GPUs once more
        "excludeHeadPodFromServeSvc": True,
        "rayClusterConfig": {
            "rayVersion": RAY_VERSION,
            "authOptions": {"mode": "token"},  # Ray asks for one by default; KubeRay makes it and hands it out
            "gcsFaultToleranceOptions": {
                "redisAddress": f"herder-redis:{REDIS_PORT}",
                "redisPassword": {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}},
            },
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # for no actor that reserves anything
                "template": ray_template("head", container, _HEAD_SHM_GIB, _KEYS),
            },
        },
    }


def worker_spec(config: DeploymentConfig, target: Target) -> Manifest:
    """The `rayClusterConfig` that comes on top of the head's; `config` is the one inside the containers."""
    groups = [_role_group("attention", config, target), _role_group("experts", config, target)]
    if target.vision:
        groups.append(_vision_group(config, target))
    waiting = {"initContainers": [wait_for_weights(config.model.path)]}
    for group in groups:
        group["template"]["spec"] |= waiting
    return {
        "enableInTreeAutoscaling": _autoscales(config, target),
        "headGroupSpec": {"template": {"spec": waiting}},  # Serve builds the application there
        "workerGroupSpecs": groups,
    }


def _autoscales(config: DeploymentConfig, target: Target) -> bool:
    """Vision pods come and go with the replicas; without them, all pods are there all the time."""
    return target.vision and config.vision.min_replicas < config.vision.max_replicas


def _role_group(role: Role, config: DeploymentConfig, target: Target) -> Manifest:
    section = role_section(config, role)
    placed = pods(config, role, target.gpus_per_node)
    num_cpus = math.ceil(placed.actors * section.num_cpus)
    memory_gib = placed.actors * target.memory_gib
    resources = {name: math.ceil(placed.actors * amount) for name, amount in section.resources.items()}
    cpu, ports = num_cpus, METRICS_ONLY
    secrets: Mapping[str, Path] = {}
    if role == "attention":  # and the gateways
        resources[GATEWAY] = 1
        ports = PORTS
        cpu += math.ceil(config.gateway.replicas / placed.count)  # they count no CPU in Ray, but use some
        secrets = _KEYS if config.gateway.grpc.tls is None else {**_KEYS, TLS_SECRET: TLS_DIR}
    gpus = placed.actors * int(section.num_gpus)
    container = ray_container("ray-worker", ports, cpu=max(1, cpu), memory_gib=memory_gib, gpus=gpus)
    if role == "experts":
        container["readinessProbe"] = node_is_up()
    template = ray_template(role, container, max(1, memory_gib // 4), secrets)
    if placed.count > 1:
        template["spec"]["topologySpreadConstraints"] = [over_nodes(role, section.strategy == "STRICT_SPREAD")]
    most = 2 * placed.count if _autoscales(config, target) else placed.count  # room for `herder scale`
    return _group(role, (placed.count, most), {"num-cpus": str(num_cpus)}, resources, template)


def _vision_group(config: DeploymentConfig, target: Target) -> Manifest:
    vision = config.vision
    num_cpus = math.ceil(vision.num_cpus)
    store_gib = math.ceil(1.5 * vision.cache_bytes / 2**30)  # Ray's object store, which the cache is in
    gpus = math.ceil(vision.num_gpus)
    memory_gib = target.memory_gib + store_gib
    container = ray_container("ray-worker", METRICS_ONLY, cpu=max(1, num_cpus), memory_gib=memory_gib, gpus=gpus)
    container["readinessProbe"] = node_is_up()
    start = {"num-cpus": str(num_cpus), "object-store-memory": str(store_gib * 2**30)}
    template = ray_template("vision", container, store_gib + 1, {})
    resources = {name: math.ceil(amount) for name, amount in vision.resources.items()}  # room for one replica
    return _group("vision", (vision.min_replicas, vision.max_replicas), start, resources, template)


def _group(
    name: str, replicas: tuple[int, int], start: dict[str, str], resources: dict[str, int], template: Manifest
) -> Manifest:
    """`replicas`: at first and at least, and at most."""
    least, most = replicas
    # KubeRay writes it into a shell command as it is, hence the quotes around.
    resources_param = json.dumps(json.dumps(resources))
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": start | {"resources": resources_param},
        "template": template,
    }
