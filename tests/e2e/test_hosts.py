"""Three hosts, started as docs/bare_machines.md says: attention on the head, experts on both others, one cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.e2e.conftest import CONFIG, TINY, end_kept
from tests.e2e.harm import Control, disturbed, undisturbed
from tests.e2e.hosts import Host, hosts
from tests.e2e.test_topology import HERDER, PROMPTS, grpc_tokens, http_tokens, single_process_tokens

TOOLS = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(bool(TOOLS), reason=f"not installed: {', '.join(TOOLS)}"),
]

STREAMS, TOKENS = range(16), 200
# A raylet ends when its agents have not started within 15 s, as on a machine that runs other tests: then once or twice
# more, and each try takes as long again.
BACK_S = 180
SETTINGS = (
    "gateway.host=0.0.0.0",
    "attention.actors=1",
    "attention.resources={attends: 1}",
    "experts.actors=2",
    "experts.replicas=2",
    "experts.resources={expert_host: 1}",
    "transport.deadline_s=1",
    "vision.min_replicas=0",
)
# Ray gives up a silent node after a minute, and so does a node its head.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}

QUIET = ("--", "--include-dashboard=false")  # a dozen processes less


@dataclass(frozen=True)
class Served:
    """The deployment: its experts' hosts and their `herder join`, and where it answers."""

    experts: dict[str, tuple[Host, subprocess.Popen[bytes]]]  # by address
    http_url: str
    grpc_address: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    end_kept()
    with hosts(tmp_path_factory.mktemp("hosts"), "head", "left", "right") as (head, *others):
        _head_up(head)
        address = f"{head.address}:6379"
        joined = {}
        for host in others:
            shutil.copytree(head.home / ".ray", host.home / ".ray")
            command = (HERDER, "join", address, "--resource", "expert_host=1")
            joined[host.address] = host, host.start(*command, log="join", environment=QUICK)
        for host, join in joined.values():
            host.until_said("join", "is in the cluster", join, 180)
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        serve = head.start(HERDER, "serve", str(CONFIG), "--address", "auto", *settings, log="serve")
        head.until_said("serve", "Ctrl-C", serve, 240)
        yield Served(joined, f"http://{head.address}:8000", f"{head.address}:9000")


def _head_up(head: Host) -> None:
    """By limits as short as QUICK's, a busy machine's head may be taken for dead while it starts: then once more."""
    for left in (2, 1, 0):
        up = head.start(HERDER, "up", "--head", "--resource", "attends=1", *QUIET, log="up", environment=QUICK)
        try:
            return head.until_said("up", "Ctrl-C ends", up, 180)
        except AssertionError:
            up.kill()
            up.wait()
            if not left:
                raise


@pytest.fixture(scope="module")
def control(served: Served) -> Control:
    return Control(served.grpc_address)


def test_answers_come_across_hosts(served, control):
    found = control.actors()
    assert {found[name].node_ip for name in ("expert-0", "expert-1")} == set(served.experts)
    assert not {found[name].node_ip for name in ("attention-0", "controller")} & set(served.experts)
    for asked, tokens in zip(PROMPTS, single_process_tokens(TINY, 16), strict=True):
        assert http_tokens(served.http_url, asked, 16) == tokens
        assert grpc_tokens(served.grpc_address, asked, 16) == tokens


def test_a_host_that_is_cut_off_is_missed_by_nobody_and_comes_back(served, control):
    expected = undisturbed(served.grpc_address, STREAMS, TOKENS)
    before = control.actors()["expert-1"]
    host, join = served.experts[before.node_ip]

    def cut() -> float:
        host.plug(in_=False)
        return time.monotonic()

    gap_s, _ = disturbed(served.grpc_address, cut, expected)
    assert gap_s < 10
    assert httpx.get(f"{served.http_url}/health/ready").status_code == 200
    host.until_said("join", "joining again", join, BACK_S)  # the answers may have ended long before Ray gives it up
    host.plug(in_=True)
    host.until_said("join", "is in the cluster", join, BACK_S, times=2)
    control.until_whole({"expert-1": before.pid})
    assert control.actors()["expert-1"].node_ip == host.address
    assert undisturbed(served.grpc_address, STREAMS, TOKENS) == expected
