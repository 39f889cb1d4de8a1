"""The pods of a Ray cluster on Kubernetes: what every one of them has, whatever its role. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.ray_environment import RAY_ENVIRONMENT

Manifest = dict[str, Any]  # a Kubernetes object, or a part of one
Component = Literal["head", "attention", "experts", "vision", "loader", "redis"]

NAME = "herder"  # of the RayService, and of whatever there is one of
IMAGE = "herder"  # as the manifests call it; each overlay's kustomization says what that is
USER = 1000  # of the image
MODELS = Path("/models")
API_KEYS_FILE = Path("/etc/herder/keys/api-keys")
TLS_DIR = Path("/etc/herder/tls")
API_KEYS_SECRET, TLS_SECRET, REDIS_SECRET = "herder-api-keys", "herder-tls", "herder-redis"
WEIGHTS_CLAIM = "herder-weights"
REDIS_PORT = 6379
PORTS = {"serve": 8000, "serve-grpc": 9000, "metrics": 8080}  # of attention pods
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, **PORTS}
METRICS_ONLY = {"metrics": PORTS["metrics"]}
NODE_HEALTH_PORT = 52365  # of Ray's agent on every node


def labels(component: Component) -> dict[str, str]:
    """By which policies, monitors and the Service find a component's pods. KubeRay adds labels of its own."""
    return {"app": NAME, "component": component}


def ray_container(name: str, ports: dict[str, int], *, cpu: int, memory_gib: int, gpus: int = 0) -> Manifest:
    """A node of the Ray cluster; KubeRay fills in its command."""
    memory = f"{memory_gib}Gi"
    gpu = {"nvidia.com/gpu": gpus} if gpus else {}
    env = {
        # torch's store looks its peers up in DNS at every connection; without an answer, each would take five seconds.
        "RES_OPTIONS": "timeout:1 attempts:1",
        **RAY_ENVIRONMENT,
    }
    if gpus:
        env |= {
            # A dead peer is an error to deal with, not an end of the process.
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
            "NCCL_SOCKET_IFNAME": "eth0",  # the pod network's
            "NCCL_DEBUG": "WARN",
        }
    return {
        "name": name,
        "image": IMAGE,
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        # No limit on CPU: an actor that waits for its quota keeps all others waiting.
        "resources": {"requests": {"cpu": cpu, "memory": memory, **gpu}, "limits": {"memory": memory, **gpu}},
        "securityContext": container_security(),
    }


def ray_template(component: Component, container: Manifest, shm_gib: int, secrets: Mapping[str, Path]) -> Manifest:
    """The template of a pod with one Ray container, the weights and `shm_gib` of shared memory.

    `secrets`: the Secrets that its processes read, and the directory of each.
    """
    mounts: list[Manifest] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "weights", "mountPath": str(MODELS), "readOnly": True},
    ]
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm_gib}Gi"}},
        {"name": "weights", "persistentVolumeClaim": {"claimName": WEIGHTS_CLAIM}},
    ]
    for name, directory in secrets.items():
        mounts.append({"name": name, "mountPath": str(directory), "readOnly": True})
        volumes.append({"name": name, "secret": {"secretName": name}})
    spec: Manifest = {
        "securityContext": pod_security(),
        "containers": [container | {"volumeMounts": mounts}],
        "volumes": volumes,
    }
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": labels(component)}, "spec": spec}


def wait_for_weights(model: Path) -> Manifest:
    """An init container that ends when the loader has left `model` whole."""
    return {
        "name": "wait-for-weights",
        "image": IMAGE,
        "command": ["sh", "-c", f"until [ -e {shlex.quote(str(complete_mark(model)))} ]; do sleep 5; done"],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "weights", "mountPath": str(MODELS), "readOnly": True}],
    }


def complete_mark(model: Path) -> Path:
    """The file that says that all of `model` is there."""
    return model.with_name(f".{model.name}.complete")


def pod_security(user: int = USER) -> Manifest:
    """A pod's security context: nobody in particular, whose group may read the volumes."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def node_is_up() -> Manifest:
    """A readiness probe instead of KubeRay's, which asks for one of Serve's proxies too: for pods that have none."""
    return {
        "httpGet": {"path": "/api/local_raylet_healthz", "port": NODE_HEALTH_PORT},
        "initialDelaySeconds": 10,
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": 3,
    }


def over_nodes(component: Component, strict: bool) -> Manifest:
    """A topology spread constraint: a component's pods on as many nodes as there are."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule" if strict else "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels(component)},
    }
