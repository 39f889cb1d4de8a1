"""A small checkpoint, a server of canned answers over HTTP and gRPC, and a run folder of the test's own."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from safetensors.torch import save_file
from typer.testing import CliRunner

from cli.runfile import Run
from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, types_pb2
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.moe import Experts

ANSWERS = {"17+25=": "42", "Reverse cat": "tac", "2+2=": "5"}
HELD = "to_slot: slot 9 is no slot; there are 0 to 3"
REFUSED = "temperature must be between 0 and 100, not -1.0"
BREAKS = "break after one word"


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "run" / "herder"


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, the second one MoE with four experts; weights are zeros."""
    path = tmp_path_factory.mktemp("models") / "little"
    path.mkdir()
    values = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    model = TextConfig.from_dir(path)

    tensors = {name: torch.zeros(t.shape) for name, t in Decoder(model, torch.float32, "cpu").tensors()}
    one = Experts(model, {layer: [0] for layer in model.moe_layers}, torch.float32, "cpu")
    tensors |= {name: torch.zeros(model.num_local_experts, *part.shape) for name, _, part in one.tensors()}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def config_file(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    gateway = {"http_port": free_port(), "grpc_port": free_port()}
    text = {"model": {"path": str(checkpoint)}, "experts": {"actors": 2}, "gateway": gateway}
    path.write_text(json.dumps(text), encoding="utf-8")  # JSON is YAML
    return path


@dataclass
class FakeServer:
    """What the canned server answers at, and what it was asked."""

    url: str
    address: str
    asked: list[Any] = field(default_factory=list)

    def run(self, model_dir: Path, serving: bool = True) -> Run:
        """A run file as `herder serve` would have left it, in the name of this very process."""
        port = int(self.url.rpartition(":")[2])
        me = psutil.Process()
        run = Run(
            os.getpid(),
            me.create_time(),
            port,
            self.url,
            self.address,
            "c.yaml",
            "little",
            str(model_dir),
            serving,
        )
        run.write()
        return run


def fake_app(asked: list[Any]) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "little", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        asked.append(body)
        if body["temperature"] < 0:
            return JSONResponse({"error": {"message": REFUSED, "param": "temperature"}}, status_code=400)
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        answer = ANSWERS.get(prompt, "well")
        if not body["stream"]:
            return {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}

        async def events() -> AsyncIterator[str]:
            yield f"data: {json.dumps({'choices': [{'delta': {'role': 'assistant'}}]})}\n\n"
            for letter in answer:
                yield f"data: {json.dumps({'choices': [{'delta': {'content': letter}}]})}\n\n"
            if prompt == BREAKS:
                yield f"data: {json.dumps({'error': {'message': 'an expert actor died'}})}\n\n"
                return
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def ChatStream(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append(request)
        if request.sampling.temperature < 0:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, REFUSED)
        prompt = request.messages[-1].content[-1].text
        yield inference_pb2.ChatStreamResponse(prompt=inference_pb2.PromptEvent(prompt_tokens=3))
        for letter in ANSWERS.get(prompt, "well"):
            yield inference_pb2.ChatStreamResponse(tokens=inference_pb2.TokensEvent(text=letter))
        if prompt == BREAKS:
            error = inference_pb2.ErrorEvent(code=types_pb2.ERROR_CODE_UNAVAILABLE, message="an expert actor died")
            yield inference_pb2.ChatStreamResponse(error=error)
            return
        yield inference_pb2.ChatStreamResponse(finished=inference_pb2.FinishedEvent())

    def Chat(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        text = ANSWERS.get(request.messages[-1].content[-1].text, "well")
        return inference_pb2.ChatResponse(choices=[inference_pb2.Choice(text=text)])


class FakeControl(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def Drain(self, request: Any, context: Any) -> Any:
        """Of two requests that run, one ends between one call and the next."""
        self.asked.append(dict(context.invocation_metadata()).get("authorization", ""))
        return control_pb2.DrainResponse(remaining=max(0, 3 - len(self.asked)))

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        actor = control_pb2.ActorInfo(
            name="expert-1",
            role=control_pb2.ACTOR_ROLE_EXPERT,
            index=1,
            node_ip="10.0.0.7",
            pid=4711,
            state="serving",
            device="cpu",
            loaded_bytes=2_500_000,
            rss_bytes=300_000_000,
        )
        return control_pb2.GetServerInfoResponse(version="0.1.0", ready=True, epoch=3, actors=[actor], failovers=6)

    def GetLoad(self, request: Any, context: Any) -> Any:
        pages = [control_pb2.KvPages(layer_kind="full", used=1, total=4, cached=2)]
        engine = control_pb2.EngineLoad(
            actor="attention-0",
            running=5,
            parked=4,
            tokens_per_second=1234.5,
            kv_pages=pages,
            cached_prompt_tokens=77,
            preemptions=2,
        )
        return control_pb2.GetLoadResponse(engines=[engine])

    def GetExpertPlacement(self, request: Any, context: Any) -> Any:
        experts = [
            control_pb2.ExpertPlacement(expert=0, slots=[0, 1], tokens=3000),
            control_pb2.ExpertPlacement(expert=1, slots=[1], tokens=1000),
        ]
        layers = [control_pb2.LayerExperts(layer=1, experts=experts)]
        return control_pb2.GetExpertPlacementResponse(
            epoch=3,
            layers=layers,
            balancedness=1.25,
            balancedness_before=2.5,
            seconds_since_move=12.4,
            balance_mode=control_pb2.BALANCE_MODE_MANUAL,
        )

    def ScaleExperts(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return control_pb2.ScaleExpertsResponse()

    def ScaleAttention(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return control_pb2.ScaleAttentionResponse()

    def MoveExpert(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        if request.to_slot == 9:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, HELD)
        return control_pb2.MoveExpertResponse()

    def DrainSlot(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return control_pb2.DrainSlotResponse()

    def Rebalance(self, request: Any, context: Any) -> Any:
        """The first time there is something to move."""
        self.asked.append(request)
        return control_pb2.RebalanceResponse(moved=len(self.asked) == 1)


@pytest.fixture(scope="session")
def _server() -> Iterator[FakeServer]:
    port = free_port()
    fake = FakeServer(f"http://127.0.0.1:{port}", "")
    http = uvicorn.Server(uvicorn.Config(fake_app(fake.asked), port=port, log_level="error"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    rpc = grpc.server(futures.ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(FakeInference(fake.asked), rpc)
    control_pb2_grpc.add_ControlServiceServicer_to_server(FakeControl(fake.asked), rpc)
    fake.address = f"127.0.0.1:{rpc.add_insecure_port('127.0.0.1:0')}"
    rpc.start()
    deadline = time.monotonic() + 10
    while not http.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert http.started
    yield fake
    http.should_exit = True
    thread.join(timeout=10)
    rpc.stop(None).wait()


@pytest.fixture
def server(_server: FakeServer) -> FakeServer:
    _server.asked.clear()
    return _server
