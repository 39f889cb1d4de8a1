"""`herder chaos` against a make-believe deployment: its actors are idle processes, which it replaces when they die."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import psutil
import pytest
from typer.testing import CliRunner, Result

from cli import chaos
from cli.main import app
from herder.v1 import control_pb2 as pb
from herder.v1 import control_pb2_grpc, inference_pb2, inference_pb2_grpc, types_pb2
from tests.imports import loaded_by

_TOKENS_S = 0.002  # between tokens
_STATES = {"attention-0": "serving", "expert-0": "serving", "expert-1": "serving", "controller-0": "ready"}


class MakeBelieve(inference_pb2_grpc.InferenceServiceServicer, control_pb2_grpc.ControlServiceServicer):
    """Tokens are a function of the request. `fault` sets in with the first death of an actor."""

    def __init__(self) -> None:
        self.processes = {name: spawn() for name in _STATES}
        self.deaths: list[str] = []
        self.ready = True
        self.repairs = True
        self.fault = ""
        self._strange = itertools.count(100)
        self._lock = threading.Lock()

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        with self._lock:
            if self.repairs:
                self._repair()
            actors = [self._actor(name) for name in _STATES]
        return pb.GetServerInfoResponse(ready=self.ready, reason="" if self.ready else "loading", actors=actors)

    def _repair(self) -> None:
        for name, process in self.processes.items():
            how = "died" if process.poll() is not None else psutil.Process(process.pid).status()
            if how in ("died", psutil.STATUS_STOPPED):
                self.deaths.append(f"{name} {how}")
                end(process)
                self.processes[name] = spawn()

    def _actor(self, name: str) -> pb.ActorInfo:
        role, _, index = name.partition("-")
        return pb.ActorInfo(
            name=name,
            role=pb.ActorRole.Value(f"ACTOR_ROLE_{role.upper()}"),
            index=int(index),
            node_ip="127.0.0.1",
            pid=self.processes[name].pid,
            state=_STATES[name],
        )

    def GetExpertPlacement(self, request: Any, context: Any) -> Any:
        experts = [pb.ExpertPlacement(expert=0, slots=[0, 1])]
        return pb.GetExpertPlacementResponse(layers=[pb.LayerExperts(layer=1, experts=experts)])

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        return pb.GetModelInfoResponse(vocab_size=100, max_context=64)

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        if self.fault == "refuses" and self.deaths:
            context.abort(grpc.StatusCode.UNAVAILABLE, "expert-0 has died")
        yield inference_pb2.GenerateStreamResponse(prompt=inference_pb2.PromptEvent())
        for i in range(request.sampling.max_tokens):
            time.sleep(_TOKENS_S)
            token = (sum(request.token_ids.ids) + request.sampling.seed + i * i) % 100
            if (i == 5 and self.fault == "whim") or (i == 7 and self.fault == "changes" and self.deaths):
                token = next(self._strange)
            if i == 9 and self.fault == "breaks" and self.deaths:
                error = inference_pb2.ErrorEvent(code=types_pb2.ERROR_CODE_UNAVAILABLE, message="attention-0 has died")
                yield inference_pb2.GenerateStreamResponse(error=error)
                return
            yield inference_pb2.GenerateStreamResponse(tokens=inference_pb2.TokensEvent(token_ids=[token]))
        yield inference_pb2.GenerateStreamResponse(finished=inference_pb2.FinishedEvent())


def spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def believed() -> MakeBelieve:
    return MakeBelieve()


@pytest.fixture
def url(believed: MakeBelieve) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(8))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(believed, server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(believed, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
    for process in believed.processes.values():
        end(process)


def run(cli: CliRunner, url: str, *actions: chaos.Action, time_: str = "1.1s") -> Result:
    chosen = [word for action in actions for word in ("--action", action)]
    return cli.invoke(app, ["chaos", "--url", url, "--for", time_, "--every", "0.25s", "--streams", "4", *chosen])


def cells(report: str) -> dict[str, list[str]]:
    """Cells of each line of the report, by the first one."""
    lines = [re.split(r"  +", line.strip()) for line in report.splitlines()]
    return {first: rest for first, *rest in lines}


def test_nothing_is_lost(cli: CliRunner, believed: MakeBelieve, url: str) -> None:
    result = run(cli, url, time_="3s")
    assert result.exit_code == 0, result.stderr + result.stdout
    found = cells(result.stdout)
    assert (found["streams"], found["lost answers"], found["changed answers"]) == (["4", "4"], ["0", "0"], ["0", "0"])
    calm, answers = (int(cell) for cell in found["answers, whole and the same"])
    tokens = int(found["tokens"][1].replace(",", ""))
    assert calm == 4 and answers >= 4 and tokens > 30 * answers
    # One round of all four that end a process, at least; a stopped process is one that is there and does not run.
    assert {death.split("-")[0] + death.split()[1] for death in believed.deaths} == {
        "attentiondied", "controllerdied", "expertdied", f"expert{psutil.STATUS_STOPPED}"
    }  # fmt: skip
    assert all(int(found[action][0]) >= 1 for action in chaos.ENDING)
    assert result.stderr.count("full strength after") == len(believed.deaths)


@pytest.mark.parametrize(
    ("fault", "lost", "said"),
    [
        ("refuses", True, "lost: expert-0 has died"),
        ("breaks", True, "lost: attention-0 has died"),
        ("changes", False, "another token at 7"),
    ],
)
def test_what_goes_wrong_is_found(
    cli: CliRunner, believed: MakeBelieve, url: str, fault: str, lost: bool, said: str
) -> None:
    believed.fault = fault
    result = run(cli, url, chaos.Action.KILL_EXPERT)
    counts = [int(cells(result.stdout)[kind][1]) for kind in ("lost answers", "changed answers")]
    assert result.exit_code == 1
    assert (counts[0] > 0, counts[1] > 0) == (lost, not lost)
    assert result.stderr.endswith(f"herder: {sum(counts)} answers were lost or changed\n")
    assert said in result.stdout


def test_what_cannot_be_compared(cli: CliRunner, believed: MakeBelieve, url: str) -> None:
    believed.fault = "whim"
    result = run(cli, url)
    assert result.exit_code == 1 and "other tokens before anything was harmed" in result.stderr
    believed.ready = False
    result = run(cli, url)
    assert (result.exit_code, result.stderr) == (1, "herder: the deployment is not ready: loading\n")
    assert believed.deaths == []


def test_what_does_not_come_back(
    cli: CliRunner, believed: MakeBelieve, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "_PATIENCE_S", 0.4)
    believed.repairs = False
    result = run(cli, url, chaos.Action.KILL_CONTROLLER)
    assert result.exit_code == 1 and "not at full strength 0.4 s after kill-controller controller-0" in result.stderr
    assert cells(result.stdout)["kill-controller"][0] == "1"


def test_ctrl_c_leaves_nothing_stopped(believed: MakeBelieve, url: str) -> None:
    """In a process of its own, as Ctrl-C finds it."""
    believed.repairs = False
    words = ["--url", url, "--for", "60s", "--every", "0.25s", "--streams", "4", "--action", chaos.Action.STOP_EXPERT]
    # A background job of a shell ignores SIGINT, and so does whatever it starts, such as these tests.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    started = [sys.executable, "-c", f"{heeding}; from cli.main import main; main()", "chaos", *words]
    experts = [psutil.Process(believed.processes[name].pid) for name in ("expert-0", "expert-1")]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not (stopped := [expert for expert in experts if expert.status() == psutil.STATUS_STOPPED]):
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(1)  # until it is noted
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert cells(output)["stop-expert"][0] == "1"
    assert stopped[0].status() != psutil.STATUS_STOPPED


def test_what_cannot_be_asked(cli: CliRunner, url: str) -> None:
    for words, said in (
        (["--for", "5s", "--every", "5s"], "--every (5s) must be shorter than --for (5s)"),
        (["--for", "soon"], "must be a time such as 60s"),
        (["--action", "kill-ray"], "kill-ray"),
    ):
        result = cli.invoke(app, ["chaos", "--url", url, *words])
        assert result.exit_code == 2 and said in result.stderr


def test_it_starts_without_ray() -> None:
    """Ray takes a second to import; only harm on other machines needs it."""
    assert not loaded_by("import cli.chaos", "ray")
