"""Where actors land, what they hold, how a deployment starts, fails and ends; without a tokenizer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.cluster_utils import Cluster

from engine.request import Request, SamplingParams
from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from llama4.config import TextConfig
from tests.e2e.conftest import CONFIG, ROOT, free_port, running
from tests.llama4.reference import save_random
from tests.single import SingleProcess

pytestmark = pytest.mark.cluster

HERDER = str(Path(sys.executable).parent / "herder")
EXPERTS = 10
PROMPTS = [[7], [1, 2, 3], list(range(60)), [299, 0] * 20]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untold")
    save_random(path, seed=5, vocab_size=300, num_local_experts=EXPERTS, num_experts_per_tok=2, max_shard_size="200KB")
    return path


def single_process_tokens(path: Path, count: int) -> list[list[int]]:
    single = SingleProcess(path)
    try:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        requests = [Request(str(n), tuple(prompt), params) for n, prompt in enumerate(PROMPTS)]
        return list(single.tokens(requests).values())
    finally:
        single.close()


def http_tokens(url: str, prompt: list[int], count: int) -> list[int]:
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    answer = httpx.post(f"{url}/v1/completions", json={**body, "return_tokens_as_token_ids": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    return [int(token.removeprefix("token_id:")) for token in answer.json()["choices"][0]["logprobs"]["tokens"]]


def grpc_tokens(address: str, prompt: list[int], count: int) -> list[int]:
    with grpc.insecure_channel(address) as channel:
        request = inference_pb2.GenerateRequest(
            token_ids={"ids": prompt}, sampling={"max_tokens": count, "temperature": 0.0, "ignore_eos": True}
        )
        return list(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60).choices[0].token_ids)


def actors(address: str) -> dict[str, control_pb2.ActorInfo]:
    with grpc.insecure_channel(address) as channel:
        request = control_pb2.GetServerInfoRequest()
        info = control_pb2_grpc.ControlServiceStub(channel).GetServerInfo(request, timeout=60)
    return {actor.name: actor for actor in info.actors}


def test_three_expert_actors_with_replicas_give_the_single_process_tokens(checkpoint):
    """Top-2 routing, an uneven split (4 seats for each of 3 slots, 10 experts), token ids only, both interfaces."""
    expected = single_process_tokens(checkpoint, 16)
    with running(f"model.path={checkpoint}", "experts.actors=3", "experts.per_actor=4") as deployment:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert http_tokens(deployment.http_url, prompt, 16) == tokens
            assert grpc_tokens(deployment.grpc_address, prompt, 16) == tokens
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        refused = httpx.post(f"{deployment.http_url}/v1/chat/completions", json=chat, timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
        config = TextConfig.from_dir(checkpoint)
        expert_bytes = 3 * config.hidden_size * config.intermediate_size * 4
        held = {name: actor.loaded_bytes for name, actor in actors(deployment.grpc_address).items()}
        assert [held[f"expert-{slot}"] for slot in range(3)] == [4 * expert_bytes * len(config.moe_layers)] * 3


def test_two_nodes_hold_what_the_configuration_says(checkpoint):
    expected = single_process_tokens(checkpoint, 8)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"attends": 2}})
    try:
        expert_node = cluster.add_node(num_cpus=2, resources={"expert_host": 2})
        settings = ("attention.resources={attends: 1}", "experts.resources={expert_host: 1}")
        with running(f"model.path={checkpoint}", *settings, address=cluster.address) as deployment:
            found = actors(deployment.grpc_address)
            nodes = {name: actor.node_id for name, actor in found.items()}
            assert nodes["expert-0"] == nodes["expert-1"] == expert_node.node_id
            assert nodes["attention-0"] == nodes["attention-1"] == cluster.head_node.node_id
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                assert http_tokens(deployment.http_url, prompt, 8) == tokens
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_what_the_cluster_has_no_room_for_is_said_and_nothing_stays(checkpoint):
    with (
        pytest.raises(Exception, match=r"experts\.actors: no room for 2 actors"),
        running(f"model.path={checkpoint}", "experts.resources={unobtainable: 1}", "placement_timeout_s=2"),
    ):
        pass
    assert not ray.is_initialized()


class Serve:
    """`herder serve` as a process of its own."""

    def __init__(self, *arguments: str, runtime: Path) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        ports = ("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port))
        self.process = subprocess.Popen(
            [HERDER, "serve", str(CONFIG), *ports, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until_up(self) -> list[psutil.Process]:
        """All of its processes, once it says that it serves."""
        lines = []
        for line in self.process.stdout or ():
            lines.append(line)
            if "Ctrl-C" in line:
                return psutil.Process(self.process.pid).children(recursive=True)
        raise AssertionError("".join(lines))

    def herder(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [HERDER, *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.mark.parametrize("by", ["SIGINT", "stop"])  # herder stop sends SIGTERM
def test_serve_ends_without_leaving_a_process(checkpoint, tmp_path, by):
    few = ("--set", "attention.actors=1", "--set", "experts.actors=1")
    serve = Serve("--model", str(checkpoint), *few, runtime=tmp_path)
    try:
        processes = serve.until_up()
        assert len(processes) > 6
        sessions = set(re.findall(r"/\S+/session_[\d_-]+", " ".join(word for p in processes for word in p.cmdline())))
        assert len(sessions) == 1 and all(map(os.path.isdir, sessions))
        assert serve.herder("status").returncode == 0
        if by == "stop":
            stopped = serve.herder("stop")
            assert stopped.returncode == 0, stopped.stderr
        else:
            serve.process.send_signal(signal.Signals[by])
        assert serve.process.wait(timeout=60) == 0
        deadline = time.monotonic() + 10
        while left := [process for process in processes if process.is_running()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        current = Path(get_default_ray_temp_dir()) / "ray_current_cluster"
        assert not current.exists() and not any(map(os.path.exists, sessions))
    finally:
        serve.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "experts.per_actor=11"], "experts.per_actor"),
        (["--set", "engine.page_sise=8"], "engine.page_size"),
        (["--model", "/nowhere"], "model.path"),
    ],
)
def test_serve_refuses_bad_input_by_name(checkpoint, tmp_path, arguments, said):
    serve = Serve("--model", str(checkpoint), *arguments, runtime=tmp_path)
    try:
        output, _ = serve.process.communicate(timeout=60)
        assert serve.process.returncode == 2 and said in output and "Traceback" not in output
    finally:
        serve.kill()
