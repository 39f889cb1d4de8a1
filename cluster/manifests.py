"""A deployment for Kubernetes with KubeRay: a kustomize base, and an overlay for each configuration. Pure.

The base is the same for every deployment, and so is `monitoring`, for clusters with Prometheus' operator. An overlay
adds to the base what follows from its configuration: the pods, what Serve runs in them, the weights' volume and their
loader, and how many pods may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from cluster import manifests_base, manifests_watch
from cluster.config import DeploymentConfig
from cluster.config_errors import ConfigError
from cluster.grafana import DASHBOARD_FILE, dashboard
from cluster.manifests_pods import IMAGE, NAME, Manifest
from cluster.manifests_ray import Target, head_spec, in_containers, pods, worker_spec
from cluster.manifests_serve import serve_config

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_WIDTH = 120


def render(config: DeploymentConfig, target: Target, overlay: str, made_by: str) -> dict[PurePosixPath, str]:
    """Every file of the base, of `monitoring` and of the overlay by its path, as YAML.

    Args:
        overlay: the name of the overlay's directory.
        made_by: the command that makes these files; the overlay says it.

    Raises:
        ConfigError: the name is none, or the configuration cannot be put into pods.
    """
    if not _DNS_LABEL.fullmatch(overlay):
        raise ConfigError([f"--overlay must be lower-case letters, digits and dashes, not {overlay}"])
    return _base() | _monitoring() | _overlay(config, target, overlay, made_by)


def _base() -> dict[PurePosixPath, str]:
    resources = {
        "rayservice.yaml": [_ray_service(head_spec())],
        "service.yaml": [manifests_base.service()],
        "redis.yaml": manifests_base.redis(),
        "weights.yaml": [manifests_base.weights_claim()],
        "network.yaml": manifests_base.network_policies(),
    }
    examples = {"secrets.example.yaml": manifests_base.example_secrets()}  # each cluster has its own
    return _folder("base", {"resources": list(resources)}, resources | examples)


def _monitoring() -> dict[PurePosixPath, str]:
    resources = {"monitors.yaml": manifests_watch.pod_monitors(), "alerts.yaml": [manifests_watch.alerts()]}
    # Grafana's sidecar takes dashboards from ConfigMaps with this label.
    options = {"disableNameSuffixHash": True, "labels": {"app": NAME, "grafana_dashboard": "1"}}
    generated = [{"name": "herder-dashboard", "files": [DASHBOARD_FILE], "options": options}]
    kustomization = {"resources": list(resources), "configMapGenerator": generated}
    return _folder("monitoring", kustomization, resources) | {PurePosixPath("monitoring", DASHBOARD_FILE): dashboard()}


def _overlay(config: DeploymentConfig, target: Target, name: str, made_by: str) -> dict[PurePosixPath, str]:
    inside = in_containers(config, target.gpus_per_node)
    resources = {
        "loader.yaml": [manifests_base.loader(inside, target)],
        "disruption.yaml": manifests_base.disruption_budgets(inside, target),
    }
    if target.vision and config.vision.allow_urls:
        resources["image-urls.yaml"] = [manifests_base.image_fetch_policy()]
    serve = serve_config(inside, gateway_nodes=pods(inside, "attention", target.gpus_per_node).count)
    workers = {"serveConfigV2": to_yaml([serve]), "rayClusterConfig": worker_spec(inside, target)}
    patches = {
        "rayservice.yaml": [_ray_service(workers)],
        "weights.yaml": [manifests_base.weights_size(target)],
    }
    image, _, tag = target.image.rpartition(":")
    kustomization = {
        "resources": ["../../base", *resources],
        "patches": [{"path": file} for file in patches],
        "images": [{"name": IMAGE, "newName": image, "newTag": tag}],
    }
    return _folder(f"overlays/{name}", kustomization, resources | patches, made_by)


def _ray_service(spec: Manifest) -> Manifest:
    metadata = {"name": NAME, "labels": {"app": NAME}}
    return {"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": metadata, "spec": spec}


def _folder(
    name: str, kustomization: Manifest, files: Mapping[str, list[Manifest]], made_by: str = "herder render k8s"
) -> dict[PurePosixPath, str]:
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    documents = {"kustomization.yaml": [kind | kustomization], **files}
    header = f"# Made by: {made_by}\n"
    return {PurePosixPath(name, file): header + to_yaml(manifests) for file, manifests in documents.items()}


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(documents: list[Manifest]) -> str:
    """The documents of one file, their keys in the given order."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=True)
