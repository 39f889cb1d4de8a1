"""`herder render serve` and `serve deploy` by command line, as an engineer uses them, on a Ray cluster of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
import ray
import yaml
from ray.util import placement_group_table
from ray.util.state import list_actors

from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import CONFIG, ROOT, end_kept, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}  # this process, whose Ray is loaded already, looks on as well
NAMESPACE = "herder"
WAIT_S = 240.0
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "17+25="}], "temperature": 0}


@dataclass
class RayCluster:
    """One node, started by `ray start`, at which this process looks on.

    `file` is where Serve configurations are written for it.
    """

    dashboard: str
    file: Path
    http: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    grpc: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    def deploy(self, configuration: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        self.serve("deploy", str(self.file))

    def serve(self, verb: str, *arguments: str) -> str:
        flags = ("--address", self.dashboard)
        command = [BIN / "serve", verb, *flags, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def applications(self) -> dict[str, Any]:
        status: dict[str, Any] = yaml.safe_load(self.serve("status"))
        return status["applications"]

    def rendered(self, *settings: str) -> dict[str, Any]:
        """What `herder render serve` prints for the tiny configuration."""
        ports = (f"gateway.http_port={self.http.split(':')[1]}", f"gateway.grpc_port={self.grpc.split(':')[1]}")
        flags = [word for setting in (*ports, *settings) for word in ("--set", setting)]
        command = [sys.executable, "-c", "from cli.render import app; app()", "serve", str(CONFIG), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        configuration: dict[str, Any] = yaml.safe_load(done.stdout)
        return configuration


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("serve")
    port, dashboard = free_port(), free_port()
    end_kept()
    url = f"http://127.0.0.1:{dashboard}"
    node = start_node(port, dashboard, folder / "ray.log")
    try:
        until(lambda: answers(f"{url}/api/gcs_healthz"), "Ray's dashboard")
        ray.init(address=f"127.0.0.1:{port}", namespace="looks-on", log_to_driver=False)
        yield RayCluster(url, folder / "serve.yaml")
    finally:
        ray.shutdown()
        processes = psutil.Process(node.pid).children(recursive=True)
        node.terminate()
        node.wait(60)
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.kill()


def start_node(port: int, dashboard: int, said: Path, attempts: int = 3) -> subprocess.Popen[bytes]:
    """A node that is up. On a busy machine it may take longer than Ray gives it, and is started again.

    Before its raylet is up, Ray takes another cluster's on this machine for it, and waits in vain.
    """
    command = [
        BIN / "ray", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats",
        f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    for _ in range(attempts):
        # No session of its own: Linux shares CPUs out among sessions first, whatever the niceness within, so that it
        # would take minutes beside tests that use them all.
        with said.open("w") as log:
            node = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0, env=ENVIRONMENT)
        if comes_up(node, said):
            return node
        with contextlib.suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)  # what it leaves of itself
    raise AssertionError(said.read_text())


def comes_up(node: subprocess.Popen[bytes], said: Path) -> bool:
    until(lambda: node.poll() is not None or "Ray runtime started" in said.read_text(), "Ray's node")
    return node.poll() is None


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} is not there after {seconds:g} s"
        time.sleep(0.3)


def running(cluster: RayCluster) -> bool:
    application = cluster.applications().get("herder", {})
    assert application.get("status") != "DEPLOY_FAILED", application
    ready = application.get("status") == "RUNNING"
    return ready and answers(f"http://{cluster.http}/health/ready")


def ask(cluster: RayCluster) -> str:
    response = httpx.post(f"http://{cluster.http}/v1/chat/completions", json=QUESTION, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def ask_grpc(cluster: RayCluster) -> str:
    message = {"role": "user", "content": [{"text": "17+25="}]}
    request = inference_pb2.ChatRequest(messages=[message], sampling={"temperature": 0.0})
    with grpc.insecure_channel(cluster.grpc) as channel:
        return inference_pb2_grpc.InferenceServiceStub(channel).Chat(request, timeout=60).choices[0].text


def control(cluster: RayCluster, call: Callable[[control_pb2_grpc.ControlServiceStub], Any]) -> Any:
    with grpc.insecure_channel(cluster.grpc) as channel:
        return call(control_pb2_grpc.ControlServiceStub(channel))


def pids(cluster: RayCluster) -> dict[str, int]:
    """Of the attention and expert actors."""
    info = control(cluster, lambda stub: stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=30))
    return {actor.name: actor.pid for actor in info.actors if actor.name != "controller"}


def balance_mode(cluster: RayCluster) -> int:
    request = control_pb2.GetExpertPlacementRequest()
    return int(control(cluster, lambda stub: stub.GetExpertPlacement(request, timeout=30)).balance_mode)


def replica_pids(name: str) -> list[int]:
    found = list_actors(address=ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
    return [actor.pid for actor in found if str(actor.name or "").startswith(f"SERVE_REPLICA::herder#{name}#")]


def herder_actors() -> set[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return {str(actor["name"]) for actor in names if actor["namespace"] == NAMESPACE}


def reserved() -> list[str]:
    table = placement_group_table().values()
    return [group["name"] for group in table if group["name"].startswith("herder") and group["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def deployed(cluster: RayCluster) -> RayCluster:
    cluster.deploy(cluster.rendered())
    until(lambda: running(cluster), "the application")
    return cluster


def test_a_configuration_that_cannot_start_leaves_nothing(cluster: RayCluster) -> None:
    cluster.deploy(cluster.rendered("experts.num_cpus=99", "placement_timeout_s=1"))
    until(lambda: cluster.applications()["herder"]["status"] == "DEPLOY_FAILED", "the failure")
    assert "experts.actors: no room" in str(cluster.applications()["herder"])
    until(lambda: not herder_actors() and not reserved(), "an end of what was begun")


def test_it_answers_over_both_endpoints(deployed: RayCluster) -> None:
    assert ask(deployed) == ask_grpc(deployed) == "42"


def test_live_settings_change_in_place(deployed: RayCluster) -> None:
    """Balance, log level and the limit of waiting requests: no actor and no replica is replaced."""
    before, gateways = pids(deployed), replica_pids("gateway")
    changed = ("balance.mode=manual", "engine.max_waiting=0", "log_level=DEBUG")
    deployed.deploy(deployed.rendered(*changed))
    until(lambda: balance_mode(deployed) == control_pb2.BALANCE_MODE_MANUAL, "the new balance mode")
    response = httpx.post(f"http://{deployed.http}/v1/chat/completions", json=QUESTION, timeout=60)
    assert response.status_code == 429 and "engine.max_waiting" in response.text
    controller = ray.get_actor("controller", namespace=NAMESPACE)
    assert ray.get(controller.config.remote()).log_level == "DEBUG"

    deployed.deploy(deployed.rendered())
    until(lambda: balance_mode(deployed) == control_pb2.BALANCE_MODE_OFF, "the old balance mode")
    assert ask(deployed) == "42"
    assert pids(deployed) == before and replica_pids("gateway") == gateways


def test_live_settings_outlive_the_controller(deployed: RayCluster) -> None:
    before = pids(deployed)
    deployed.deploy(deployed.rendered("balance.mode=manual"))
    until(lambda: balance_mode(deployed) == control_pb2.BALANCE_MODE_MANUAL, "the new balance mode")
    ray.kill(ray.get_actor("controller", namespace=NAMESPACE), no_restart=False)
    until(lambda: running(deployed) and balance_mode(deployed) == control_pb2.BALANCE_MODE_MANUAL, "the mode again")
    assert pids(deployed) == before


def test_the_keeper_may_die(deployed: RayCluster) -> None:
    before, [keeper] = pids(deployed), replica_pids("fleet")
    psutil.Process(keeper).kill()
    until(lambda: replica_pids("fleet") not in ([], [keeper]), "another keeper")
    until(lambda: running(deployed), "the application")
    assert pids(deployed) == before
    assert ask(deployed) == "42"


def test_a_changed_gateway_leaves_the_actors_alone(deployed: RayCluster) -> None:
    before, gateways = pids(deployed), replica_pids("gateway")
    deployed.deploy(deployed.rendered("gateway.max_body_bytes=1000000"))
    until(lambda: set(replica_pids("gateway")).isdisjoint(gateways) and running(deployed), "another gateway")
    assert pids(deployed) == before
    assert ask(deployed) == "42"


def herder_names() -> set[str]:
    return {name.partition("@")[0] for name in herder_actors()}


def test_other_actors_begin_anew(deployed: RayCluster) -> None:
    before = pids(deployed)
    deployed.deploy(deployed.rendered("experts.actors=3"))
    until(lambda: "expert-2" in herder_names(), "a third expert actor")
    until(lambda: running(deployed), "the application")
    assert set(before.values()).isdisjoint(pids(deployed).values())
    assert ask(deployed) == "42"


def test_a_shutdown_of_serve_leaves_nothing(deployed: RayCluster) -> None:
    assert {"controller", "attention-0", "expert-1"} <= herder_names()
    deployed.serve("shutdown", "--yes")
    until(lambda: not herder_actors() and not reserved(), "the actors' end")
