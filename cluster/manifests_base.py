"""What a deployment on Kubernetes needs beside its RayService: storage, network, disruption, secrets, Redis. Pure."""

from __future__ import annotations

from cluster.config import DeploymentConfig
from cluster.manifests_pods import (
    API_KEYS_FILE,
    API_KEYS_SECRET,
    HEAD_PORTS,
    IMAGE,
    MODELS,
    NAME,
    NODE_HEALTH_PORT,
    PORTS,
    REDIS_PORT,
    REDIS_SECRET,
    WEIGHTS_CLAIM,
    Component,
    Manifest,
    complete_mark,
    container_security,
    labels,
    pod_security,
)
from cluster.manifests_ray import Role, Target, pods

_REDIS_IMAGE = "valkey/valkey:8.1.4"  # speaks Redis' protocol
_REDIS_USER = 999  # of that image
_PRIVATE_NETWORKS = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]


def service() -> Manifest:
    """Where clients connect. KubeRay's own Service would send them to expert pods too, which have no proxy."""
    ports = [
        {"name": "http", "port": PORTS["serve"], "targetPort": "serve", "appProtocol": "http"},
        {"name": "grpc", "port": PORTS["serve-grpc"], "targetPort": "serve-grpc", "appProtocol": "kubernetes.io/h2c"},
    ]
    return _object("v1", "Service", NAME, {"selector": labels("attention"), "ports": ports})


def weights_claim() -> Manifest:
    """The volume of the weights: the loader writes it, all nodes read it. Overlays say how large it is."""
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return _object("v1", "PersistentVolumeClaim", WEIGHTS_CLAIM, spec)


def weights_size(target: Target) -> Manifest:
    """The overlay's patch of the volume."""
    spec = {"resources": {"requests": {"storage": f"{target.weights_gib}Gi"}}}
    return _object("v1", "PersistentVolumeClaim", WEIGHTS_CLAIM, spec)


def loader(config: DeploymentConfig, target: Target) -> Manifest:
    """A Job that fetches the checkpoint into the volume; `config` is the one inside the containers."""
    model = config.model.path
    if target.source.startswith("/"):
        # What is there already stays, since actors may have it mapped.
        fetch = ["cp", "--recursive", "--update", "--no-target-directory", target.source, str(model)]
    else:
        fetch = ["hf", "download", target.source, "--local-dir", str(model)]
    token = {"secretKeyRef": {"name": "herder-huggingface", "key": "token", "optional": True}}
    container = {
        "name": "loader",
        "image": IMAGE,
        "command": ["sh", "-c", '"$@" && touch "$MARK"', "loader", *fetch],
        "env": [
            {"name": "MARK", "value": str(complete_mark(model))},
            {"name": "HF_HOME", "value": "/tmp/huggingface"},
            {"name": "HF_TOKEN", "valueFrom": token},
        ],
        "resources": {"requests": {"cpu": 1, "memory": "2Gi"}, "limits": {"memory": "8Gi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "weights", "mountPath": str(MODELS)}],
    }
    pod = {
        "restartPolicy": "OnFailure",
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": WEIGHTS_CLAIM}}],
    }
    template = {"metadata": {"labels": labels("loader")}, "spec": pod}
    # A Job cannot be changed, so it has to be gone when a changed overlay is applied.
    spec = {"backoffLimit": 5, "ttlSecondsAfterFinished": 600, "template": template}
    return _object("batch/v1", "Job", "herder-loader", spec)


def disruption_budgets(config: DeploymentConfig, target: Target) -> list[Manifest]:
    """How many pods of a role a drained node must leave: what is gone with the others is had elsewhere.

    Experts without a second holder, and the only attention pod, are not to be evicted at all. (`minAvailable` as a
    number is the only form that works for pods of an owner unknown to Kubernetes.)
    """
    roles: tuple[Role, ...] = ("attention", "experts")
    budgets = []
    for role in roles:
        count = pods(config, role, target.gpus_per_node).count
        spare = 1 if count > 1 and (role == "attention" or config.experts.replicas > 1) else 0
        spec = {"minAvailable": count - spare, "selector": {"matchLabels": labels(role)}}
        budgets.append(_object("policy/v1", "PodDisruptionBudget", f"herder-{role}", spec))
    return budgets


def network_policies() -> list[Manifest]:
    """Who may connect to the pods, and where worker pods may connect to."""
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    among = {"podSelector": {"matchLabels": {"app": NAME}}}
    anywhere_in_cluster: Manifest = {"namespaceSelector": {}}
    ingress = [
        {"from": [among]},
        {"from": [operator], "ports": _tcp(HEAD_PORTS["dashboard"], PORTS["serve"], NODE_HEALTH_PORT)},
        {"from": [anywhere_in_cluster], "ports": _tcp(PORTS["metrics"])},
    ]
    clients = {
        "podSelector": {"matchLabels": labels("attention")},
        "policyTypes": ["Ingress"],
        "ingress": [{"ports": _tcp(PORTS["serve"], PORTS["serve-grpc"])}],  # whoever has an API key
    }
    dns = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
    workers = {
        "podSelector": {"matchExpressions": [_component_in("attention", "experts", "vision")]},
        "policyTypes": ["Egress"],
        "egress": [{"to": [among]}, {"to": [anywhere_in_cluster], "ports": dns}],
    }
    redis = {
        "podSelector": {"matchLabels": labels("redis")},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": {"matchLabels": labels("head")}}], "ports": _tcp(REDIS_PORT)}],
    }
    nodes = {
        "podSelector": {"matchExpressions": [_component_in("head", "attention", "experts", "vision")]},
        "policyTypes": ["Ingress"],
        "ingress": ingress,
    }
    specs = {"herder": nodes, "herder-clients": clients, "herder-workers": workers, "herder-redis": redis}
    return [_object("networking.k8s.io/v1", "NetworkPolicy", name, spec) for name, spec in specs.items()]


def image_fetch_policy() -> Manifest:
    """Lets gateways fetch images from the public internet, where the configuration allows URLs."""
    public = {"ipBlock": {"cidr": "0.0.0.0/0", "except": _PRIVATE_NETWORKS}}
    spec = {
        "podSelector": {"matchLabels": labels("attention")},
        "policyTypes": ["Egress"],
        "egress": [{"to": [public], "ports": _tcp(80, 443)}],
    }
    return _object("networking.k8s.io/v1", "NetworkPolicy", "herder-image-urls", spec)


def redis() -> list[Manifest]:
    """Where Ray's head keeps its state, so that it may die: one small server with a disk of its own."""
    password = {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}
    container = {
        "name": "redis",
        "image": _REDIS_IMAGE,
        "command": ["sh", "-c", 'exec valkey-server --dir /data --appendonly yes --requirepass "$REDIS_PASSWORD"'],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "env": [{"name": "REDIS_PASSWORD", "valueFrom": password}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    pod = {"securityContext": pod_security(_REDIS_USER), "containers": [container]}
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}},
    }
    stateful = {
        "serviceName": "herder-redis",
        "replicas": 1,
        "selector": {"matchLabels": labels("redis")},
        "template": {"metadata": {"labels": labels("redis")}, "spec": pod},
        "volumeClaimTemplates": [claim],
    }
    ports = [{"name": "redis", "port": REDIS_PORT, "targetPort": "redis"}]
    return [
        _object("apps/v1", "StatefulSet", "herder-redis", stateful),
        _object("v1", "Service", "herder-redis", {"selector": labels("redis"), "ports": ports}),
    ]


def example_secrets() -> list[Manifest]:
    """What the pods ask for, with values to replace. Not among the resources that are applied."""
    keys = {API_KEYS_FILE.name: "# A key a line.\nreplace-me\n", "scrape-key": "replace-me"}
    return [
        _secret(API_KEYS_SECRET, keys),
        _secret(REDIS_SECRET, {"password": "replace-me"}),
        _secret("herder-huggingface", {"token": "replace-me"}),
    ]


def _secret(name: str, data: dict[str, str]) -> Manifest:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "stringData": data}


def _object(api_version: str, kind: str, name: str, spec: Manifest) -> Manifest:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "labels": {"app": NAME}}, "spec": spec}


def _tcp(*ports: int) -> list[Manifest]:
    return [{"port": port, "protocol": "TCP"} for port in ports]


def _component_in(*components: Component) -> Manifest:
    return {"key": "component", "operator": "In", "values": list(components)}
