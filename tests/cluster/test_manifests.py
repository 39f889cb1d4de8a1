"""The Kubernetes manifests: they fit each other, the configuration they come from, and KubeRay's schema."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actors.metrics import GatewayMetrics
from actors.status import ClusterStatus
from cluster.config import AttentionConfig, DeploymentConfig, ExpertsConfig, ModelConfig, load_config
from cluster.config_errors import ConfigError
from cluster.live import LiveSettings
from cluster.manifests import render
from cluster.manifests_ray import RAY_VERSION, Target, in_containers, pods
from cluster.manifests_serve import serve_config
from engine.request import EngineLoad

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("HERDER_CRDS", ROOT.parent / "shared" / "crds"))
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
Manifest = dict[str, Any]


def target(**changes: Any) -> Target:
    values = {"source": "meta-llama/x", "image": "herder:1", "memory_gib": 32, "weights_gib": 300, "gpus_per_node": 8}
    return Target(**{**values, "vision": True, **changes})


def read(folder: Path) -> list[Manifest]:
    """The resources of a kustomize directory, those of its base included, after its patches."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found: list[Manifest] = []
    for entry in kustomization["resources"]:
        path = folder / entry
        found += read(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for patch in kustomization.get("patches", []):
        for change in yaml.safe_load_all((folder / patch["path"]).read_text()):
            [index] = [i for i, one in enumerate(found) if name_of(one) == name_of(change)]
            found[index] = merged(found[index], change)
    return found


def merged(base: Any, change: Any) -> Any:
    """RFC 7386, which is what kustomize does to a custom resource."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return {key: merged(base.get(key), change[key]) if key in change else base[key] for key in {**base, **change}}


def name_of(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    found = [manifest for manifest in manifests if manifest["kind"] == kind]
    assert found, f"no {kind}"
    return found


def ray_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates of the Ray cluster by component."""
    [service] = of_kind(manifests, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def all_templates(manifests: list[Manifest]) -> list[Manifest]:
    others = [one["spec"]["template"] for one in manifests if one["kind"] in ("StatefulSet", "Job")]
    return [*ray_templates(manifests).values(), *others]


def selects(selector: dict[str, str], template: Manifest) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


def ports_of(template: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", [])}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Path:
    return ROOT / "k8s" / "overlays" / str(request.param)


@pytest.fixture
def manifests(overlay: Path) -> list[Manifest]:
    return read(overlay)


# ---- the schema


@pytest.fixture(scope="module")
def ray_service_schema() -> jsonschema.protocols.Validator:
    file = CRDS / "ray.io_rayservices.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's CRD is not at {file}: set HERDER_CRDS to the folder that has it")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    [v1] = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return jsonschema.Draft202012Validator(closed(v1))


def closed(schema: Any) -> Any:
    """The schema without unknown fields, which Kubernetes would drop without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    open_by_intent = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_by_intent:
        result["additionalProperties"] = False
    return result


def test_ray_services_fit_the_crd(
    ray_service_schema: jsonschema.protocols.Validator, manifests: list[Manifest]
) -> None:
    [service] = of_kind(manifests, "RayService")
    whole = service | {"metadata": {}}  # the API server's own
    errors = [f"{error.json_path}: {error.message}" for error in ray_service_schema.iter_errors(whole)]
    # `metadata` of pod templates is an open object in the CRD, but has no `properties` there.
    assert errors == []


def test_the_schema_refuses_unknown_fields_and_wrong_types(
    ray_service_schema: jsonschema.protocols.Validator,
) -> None:
    service = read(ROOT / "k8s" / "overlays" / OVERLAYS[0])
    [good] = of_kind(service, "RayService")
    group = good["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    for change in ({"replica": 1}, {"replicas": "1"}, {"rayStartParams": {"num-cpus": 1}}):
        bad = merged(good, {"spec": {"rayClusterConfig": {"workerGroupSpecs": [group | change]}}})
        assert list(ray_service_schema.iter_errors(bad)), change


def test_the_other_kinds_fit_kubernetes(manifests: list[Manifest]) -> None:
    """All but what KubeRay and Prometheus' operator define."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    others = [manifest for manifest in manifests if manifest["kind"] != "RayService"]
    for manifest in others:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    assert len(others) >= 10


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_the_same(overlay: Path, manifests: list[Manifest]) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    assert built.returncode == 0, built.stderr
    [image] = yaml.safe_load((overlay / "kustomization.yaml").read_text())["images"]
    with_image = json.dumps(manifests).replace('"image": "herder"', f'"image": "{image["newName"]}:{image["newTag"]}"')
    expected = {name_of(one): one for one in json.loads(with_image)}
    assert {name_of(one): one for one in yaml.safe_load_all(built.stdout)} == expected


# ---- they fit each other


def test_only_attention_pods_get_requests_and_they_have_the_ports(manifests: list[Manifest]) -> None:
    templates = all_templates(manifests)
    for service in of_kind(manifests, "Service"):
        spec = service["spec"]
        chosen = [template for template in templates if selects(spec["selector"], template)]
        assert len(chosen) == 1, service["metadata"]["name"]
        assert {port["targetPort"] for port in spec["ports"]} <= ports_of(chosen[0]).keys()
    [service] = [one for one in of_kind(manifests, "Service") if one["metadata"]["name"] == "herder"]
    assert selects(service["spec"]["selector"], ray_templates(manifests)["attention"])


def test_ports_are_those_that_serve_listens_on(manifests: list[Manifest]) -> None:
    [ray_service] = of_kind(manifests, "RayService")
    serve = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    for component in ("head", "attention"):
        ports = ports_of(ray_templates(manifests)[component])
        assert ports["serve"] == serve["http_options"]["port"]
        assert ports["serve-grpc"] == serve["grpc_options"]["port"]
    assert serve["http_options"]["host"] == "0.0.0.0"


def test_pods_without_gateways_are_ready_when_their_node_is(manifests: list[Manifest]) -> None:
    """KubeRay's own probe asks for Serve's proxy, which runs on attention pods alone; these keep it."""
    for component, template in ray_templates(manifests).items():
        container = template["spec"]["containers"][0]
        assert ("readinessProbe" in container) == (component in ("experts", "vision")), component


def test_monitors_budgets_and_policies_select_pods(manifests: list[Manifest]) -> None:
    templates = all_templates(manifests)
    for monitor in of_kind(read(ROOT / "k8s" / "monitoring"), "PodMonitor"):
        chosen = [one for one in templates if selects(monitor["spec"]["selector"]["matchLabels"], one)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert any(endpoint["port"] in ports_of(one) for one in chosen)
    groups = {group["groupName"]: group for group in cluster_of(manifests)["workerGroupSpecs"]}
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        labels = budget["spec"]["selector"]["matchLabels"]
        [chosen_template] = [one for one in templates if selects(labels, one)]
        count = groups[chosen_template["metadata"]["labels"]["component"]]["replicas"]
        assert 1 <= budget["spec"]["minAvailable"] <= count
    for policy in of_kind(manifests, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        wanted = [selector["matchLabels"]] if "matchLabels" in selector else []
        for expression in selector.get("matchExpressions", []):
            wanted += [{expression["key"]: value} for value in expression["values"]]
        assert wanted
        assert all(any(selects(labels, one) for one in templates) for labels in wanted)


def test_volumes_exist_and_secrets_have_examples(manifests: list[Manifest]) -> None:
    examples = yaml.safe_load_all((ROOT / "k8s" / "base" / "secrets.example.yaml").read_text())
    secrets = {one["metadata"]["name"]: set(one["stringData"]) for one in examples}
    claims = {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    for template in all_templates(manifests):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} - {"data"}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    for reference in key_references([*manifests, *read(ROOT / "k8s" / "monitoring")]):
        assert reference["key"] in secrets[reference["name"]]


def key_references(node: Any) -> Iterator[dict[str, str]]:
    """What names a key of a Secret, wherever it stands."""
    if isinstance(node, dict):
        yield from (node[name] for name in ("secretKeyRef", "credentials") if name in node)
        for value in node.values():
            yield from key_references(value)
    elif isinstance(node, list):
        for value in node:
            yield from key_references(value)


def test_only_who_needs_them_has_the_api_keys(manifests: list[Manifest]) -> None:
    """Serve builds the application on the head, and gateways are on attention pods."""
    [service] = of_kind(manifests, "RayService")
    [app] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    folder = str(Path(app["args"]["gateway"]["api_keys_file"]).parent)
    for component, template in ray_templates(manifests).items():
        mounts = {mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert (folder in mounts) == (component in ("head", "attention"))


def test_pods_wait_for_the_weights_that_the_loader_brings(manifests: list[Manifest], tmp_path: Path) -> None:
    """The shell commands, run here on a volume of our own, with the fetching replaced."""
    [job] = of_kind(manifests, "Job")
    [loader] = job["spec"]["template"]["spec"]["containers"]
    [mark] = [entry["value"] for entry in loader["env"] if entry["name"] == "MARK"]
    local = {"MARK": mark.replace("/models", str(tmp_path))}
    shell = loader["command"][: loader["command"].index("loader") + 1]
    waiting = [template["spec"]["initContainers"] for template in ray_templates(manifests).values()]
    assert all(one == waiting[0] for one in waiting)
    wait = [word.replace("/models", str(tmp_path)) for word in waiting[0][0]["command"]]

    assert subprocess.run([*shell, "false"], env=os.environ | local, timeout=10, check=False).returncode != 0
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(wait, timeout=0.3, check=False)
    assert subprocess.run([*shell, "true"], env=os.environ | local, timeout=10, check=False).returncode == 0
    assert subprocess.run(wait, timeout=10, check=False).returncode == 0


def test_no_pod_runs_as_root_or_gains_rights(manifests: list[Manifest]) -> None:
    for template in all_templates(manifests):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        assert template["spec"]["securityContext"]["runAsUser"] > 0
        for container in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
            security = container["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_shared_memory_is_memory_within_the_limit(manifests: list[Manifest]) -> None:
    for template in ray_templates(manifests).values():
        [shm] = [one["emptyDir"] for one in template["spec"]["volumes"] if one["name"] == "shm"]
        limit = template["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert shm["medium"] == "Memory" and gib(shm["sizeLimit"]) < gib(limit)


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def cluster_of(manifests: list[Manifest]) -> Manifest:
    [service] = of_kind(manifests, "RayService")
    cluster: Manifest = service["spec"]["rayClusterConfig"]
    return cluster


def test_the_cluster_survives_its_head_has_a_token_and_is_never_built_twice(manifests: list[Manifest]) -> None:
    [service] = of_kind(manifests, "RayService")
    assert service["spec"]["upgradeStrategy"] == {"type": "None"}
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    address = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]
    name, _, port = address.partition(":")
    [redis] = [one for one in of_kind(manifests, "Service") if one["metadata"]["name"] == name]
    assert [str(one["port"]) for one in redis["spec"]["ports"]] == [port]


# ---- they fit the configuration


def offered(manifests: list[Manifest]) -> dict[str, float]:
    """What all the worker pods together have, in Ray's words."""
    total: dict[str, float] = {}
    for group in cluster_of(manifests)["workerGroupSpecs"]:
        start = group["rayStartParams"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        # As the shell that KubeRay hands it to reads it: json.loads takes the quotes and backslashes off.
        resources = json.loads(json.loads(start["resources"]))
        resources |= {"CPU": int(start["num-cpus"]), "GPU": limits.get("nvidia.com/gpu", 0)}
        for name, amount in resources.items():
            total[name] = total.get(name, 0) + amount * group["replicas"]
    return total


def test_there_is_room_for_every_actor(manifests: list[Manifest]) -> None:
    [service] = of_kind(manifests, "RayService")
    [app] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = DeploymentConfig.model_validate(app["args"])
    needed: dict[str, float] = {}
    for role in (config.attention, config.experts):
        for name, amount in {"CPU": role.num_cpus, "GPU": role.num_gpus, **role.resources}.items():
            needed[name] = needed.get(name, 0) + role.actors * amount
    room = offered(manifests)
    assert all(room[name] >= amount for name, amount in needed.items()), (needed, room)
    assert room["GPU"] == needed["GPU"]  # none idle
    for name, amount in config.vision.resources.items():
        assert 0 < config.vision.min_replicas * amount <= room[name]
    for deployment in app["deployments"]:
        for name, amount in deployment["ray_actor_options"]["resources"].items():
            assert 0 < amount * deployment.get("num_replicas", 1) <= room[name]


def test_figures_of_the_overlays() -> None:
    counts = {}
    for name in OVERLAYS:
        groups = cluster_of(read(ROOT / "k8s" / "overlays" / name))["workerGroupSpecs"]
        counts[name] = {
            group["groupName"]: (
                group["replicas"],
                group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0),
            )
            for group in groups
            if group["groupName"] != "vision"
        }
    assert counts == {
        "cpu": {"attention": (2, 0), "experts": (2, 0)},
        "scout-1x8h100": {"attention": (1, 4), "experts": (1, 4)},
        "maverick-4x8h100": {"attention": (4, 4), "experts": (4, 4)},
    }


strategies = st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])


@given(
    attention=st.integers(1, 40), experts=st.integers(1, 40), strategy=strategies, gpus=st.integers(0, 1),
    per_node=st.integers(1, 16),
)  # fmt: skip
def test_every_actor_has_a_pod_and_no_pod_is_empty(
    attention: int, experts: int, strategy: Any, gpus: int, per_node: int
) -> None:
    config = DeploymentConfig(
        model=ModelConfig(path=Path("/x/model")),
        attention=AttentionConfig(actors=attention, num_gpus=float(gpus), strategy=strategy),
        experts=ExpertsConfig(actors=experts, num_gpus=float(gpus), strategy=strategy),
    )
    if gpus and strategy == "STRICT_PACK" and max(attention, experts) > per_node:
        with pytest.raises(ConfigError, match=r"needs \d+ GPUs in one pod"):
            render(config, target(gpus_per_node=per_node), "some", "")
        return
    for role, actors in (("attention", attention), ("experts", experts)):
        placed = pods(config, role, per_node)  # type: ignore[arg-type]
        assert (placed.count - 1) * placed.actors < actors <= placed.count * placed.actors
        assert not gpus or placed.actors <= per_node
        assert (placed.count == 1) if strategy == "STRICT_PACK" else True
        assert (placed.count == actors) if strategy == "STRICT_SPREAD" else True
    inside = in_containers(config, per_node)
    assert inside.gateway.replicas >= pods(config, "attention", per_node).count


# ---- the Serve configuration


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("standalone", [False, True])
def test_serve_accepts_it_and_nothing_is_lost(path: Path, standalone: bool) -> None:
    from ray.serve.schema import ServeDeploySchema

    changes = ["engine.max_waiting=7", "balance.mode=auto", "log_level=DEBUG", "gateway.replicas=3"]
    config = load_config(path, [*changes, *(["gateway.grpc.mode=standalone"] if standalone else [])])
    manifest = serve_config(config)
    ServeDeploySchema.model_validate(manifest)
    [app] = manifest["applications"]
    options = {deployment["name"]: deployment for deployment in app["deployments"]}
    back = LiveSettings.parse(options["fleet"]["user_config"]).over(DeploymentConfig.model_validate(app["args"]))
    gateway = {
        "replicas": options["gateway"]["num_replicas"],
        "max_ongoing_requests": options["gateway"]["max_ongoing_requests"],
    }
    assert back.model_copy(update={"gateway": back.gateway.model_copy(update=gateway)}) == config
    assert ("grpc_options" in manifest) == (not standalone)


def test_what_may_change_live_is_not_in_the_args() -> None:
    """A change of `args` starts everything anew."""
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml")
    live = ["balance.mode=manual", "engine.max_waiting=3", "log_level=WARNING", "gateway.max_ongoing_requests=9"]
    changed = load_config(ROOT / "configs" / "tiny_cpu.yaml", live)
    before, after = (serve_config(one)["applications"][0] for one in (config, changed))
    assert before["args"] == after["args"]
    assert before["deployments"] != after["deployments"]


def test_live_settings_name_the_wrong_field() -> None:
    with pytest.raises(ConfigError, match=r"user_config: balance\.mode must be 'off', 'manual' or 'auto', not 'fast'"):
        LiveSettings.parse({"balance": {"mode": "fast"}})
    with pytest.raises(ConfigError, match="user_config: max_wating is not a known key; the nearest is max_waiting"):
        LiveSettings.parse({"max_wating": 1})


def test_keys_never_get_into_a_file() -> None:
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", ["gateway.api_keys=[sesame]"])
    for make in (lambda: serve_config(config), lambda: render(config, target(), "some", "")):
        with pytest.raises(ConfigError, match=r"use gateway\.api_keys_file"):
            make()


def test_tls_files_come_from_a_secret() -> None:
    settings = ["gateway.grpc.mode=standalone", "gateway.grpc.tls={cert: a.pem, key: b.pem}"]
    config = load_config(ROOT / "configs" / "tiny_cpu.yaml", settings)
    files = render(config, target(), "some", "")
    service = yaml.safe_load(files[PurePosixPath("overlays/some/rayservice.yaml")])
    [attention, *_] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    [mount] = [
        one for one in attention["template"]["spec"]["containers"][0]["volumeMounts"] if one["name"] == "herder-tls"
    ]
    [app] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert Path(app["args"]["gateway"]["grpc"]["tls"]["key"]).parent == Path(mount["mountPath"])


def test_vision_pods_follow_their_replicas() -> None:
    path = ROOT / "configs" / "tiny_cpu.yaml"
    scaled = load_config(path, ["vision.min_replicas=0", "vision.max_replicas=3", "vision.allow_urls=true"])
    for config, autoscaled in ((scaled, True), (load_config(path), False)):
        files = render(config, target(), "some", "")
        cluster = yaml.safe_load(files[PurePosixPath("overlays/some/rayservice.yaml")])["spec"]["rayClusterConfig"]
        [group] = [one for one in cluster["workerGroupSpecs"] if one["groupName"] == "vision"]
        assert cluster["enableInTreeAutoscaling"] is autoscaled
        assert (group["minReplicas"], group["maxReplicas"]) == (config.vision.min_replicas, config.vision.max_replicas)
        store = int(group["rayStartParams"]["object-store-memory"])
        assert store > config.vision.cache_bytes
        assert (PurePosixPath("overlays/some/image-urls.yaml") in files) is autoscaled
    blind = render(scaled, target(vision=False), "some", "")
    cluster = yaml.safe_load(blind[PurePosixPath("overlays/some/rayservice.yaml")])["spec"]["rayClusterConfig"]
    assert [one["groupName"] for one in cluster["workerGroupSpecs"]] == ["attention", "experts"]
    assert not cluster["enableInTreeAutoscaling"]


def test_the_image_has_the_ray_that_kuberay_is_told() -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={RAY_VERSION}" in pinned


# ---- what is watched


def test_alerts_are_on_metrics_that_there_are() -> None:
    load = EngineLoad(
        running=1, parked=1, waiting=1, steps=1, kv_pages_total={"full": 4}, kv_pages_used={"full": 1},
        kv_pages_cached={"full": 1}, prompt_tokens=1, cached_prompt_tokens=1, generated_tokens=1, preemptions=1,
        tokens_per_second=1.0,
    )  # fmt: skip
    status = ClusterStatus(ready=True, reason="", epoch=1, actors=(), engines={"a": load}, balancedness=1.5)
    known = GatewayMetrics("m").text(status).decode()
    [rule] = of_kind(read(ROOT / "k8s" / "monitoring"), "PrometheusRule")
    names = set()
    for alert in rule["spec"]["groups"][0]["rules"]:
        found = {word for word in alert["expr"].replace("(", " ").replace(")", " ").split() if "herder_" in word}
        assert found, alert["alert"]
        names |= {word.split("[")[0] for word in found}
    assert all(f"\n{name}" in known for name in names), (names, known)


def test_a_pod_that_holds_what_nobody_else_has_is_not_evicted() -> None:
    path = ROOT / "configs" / "tiny_failover.yaml"
    for replicas, spare in ((2, 1), (1, 0)):
        config = load_config(path, [f"experts.replicas={replicas}"])
        files = render(config, target(), "some", "")
        budgets = list(yaml.safe_load_all(files[PurePosixPath("overlays/some/disruption.yaml")]))
        [least] = [one["spec"]["minAvailable"] for one in budgets if one["metadata"]["name"] == "herder-experts"]
        assert least == math.ceil(config.experts.actors) - spare
