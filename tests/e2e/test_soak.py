"""Minutes of mixed load, clients that cancel, vanish and err: nothing leaks, nothing sticks, all answers are right."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter

import grpc
import httpx
import pytest

from actors.deployment import Deployment
from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

SECONDS = float(os.environ.get("HERDER_SOAK_SECONDS", "300"))
CLIENTS = 24
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "word": {"enum": ["yes", "no"]}},
    "required": ["n", "word"],
    "additionalProperties": False,
}


class Load:
    """Clients of one deployment. `answers`: the questions that it answers right when nobody disturbs it."""

    def __init__(self, deployment: Deployment, http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
        self.url = deployment.http_url
        self.http = http
        self.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.answers: dict[str, str] = {}
        self.done: Counter[str] = Counter()
        self.wrong: list[tuple[str, object]] = []

    def chat(self, prompt: str, **more: object) -> dict[str, object]:
        return {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": prompt}], **more}

    async def ask(self, prompt: str) -> str:
        answer = await self.http.post("/v1/chat/completions", json=self.chat(prompt))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"]).strip()

    async def learn(self) -> None:
        lines = map(json.loads, (TINY / "eval.jsonl").read_text().splitlines())
        questions = [question for question in lines if "images" not in question][::9]
        answers = await asyncio.gather(*(self.ask(question["prompt"]) for question in questions))
        for question, answer in zip(questions, answers, strict=True):
            if answer == question["answer"]:
                self.answers[question["prompt"]] = answer
        assert len(self.answers) >= 0.9 * len(questions)

    async def http_question(self, rng: random.Random) -> None:
        prompt = rng.choice(list(self.answers))
        self.check("question", prompt, await self.ask(prompt), self.answers[prompt])

    async def grpc_question(self, rng: random.Random) -> None:
        prompt = rng.choice(list(self.answers))
        request = inference_pb2.ChatStreamRequest(
            messages=[{"role": "user", "content": [{"text": prompt}]}], sampling={"temperature": 0.0}
        )
        text = "".join([event.tokens.text async for event in self.stub.ChatStream(request, timeout=120)])
        self.check("grpc question", prompt, text.strip(), self.answers[prompt])

    async def cancelled_stream(self, rng: random.Random) -> None:
        """Reads a few events of a long stream, then goes."""
        body = {"model": "tiny", "prompt": [rng.randrange(256) for _ in range(rng.randint(1, 200))], "stream": True}
        body |= {"max_tokens": 1000, "ignore_eos": True, "temperature": 1.0}
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            events = 0
            async for _ in answer.aiter_lines():
                events += 1
                if events > rng.randint(1, 20):
                    break
        self.done["cancelled"] += 1

    async def cancelled_call(self, rng: random.Random) -> None:
        """A gRPC call that is cancelled at a random moment."""
        call = self.stub.Generate(
            inference_pb2.GenerateRequest(
                token_ids={"ids": [1, 2, 3]}, sampling={"max_tokens": 1000, "ignore_eos": True}
            ),
            timeout=60,
        )
        await asyncio.sleep(rng.random() * 0.5)
        call.cancel()
        self.done["grpc cancelled"] += 1

    async def too_long(self, rng: random.Random) -> None:
        answer = await self.http.post("/v1/completions", json={"model": "tiny", "prompt": [1] * 5000})
        self.check("too long", "status", answer.status_code, 400)

    async def schema(self, rng: random.Random) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": SCHEMA}}
        body = self.chat("17+25=", response_format=form, temperature=1.0, max_tokens=60)
        answer = await self.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            found = json.loads(choice["message"]["content"])
            self.check("schema", form, (set(found), found["word"] in ("yes", "no")), ({"n", "word"}, True))

    def check(self, kind: str, asked: object, found: object, expected: object) -> None:
        self.done[kind] += 1
        if found != expected:
            self.wrong.append((kind, (asked, found, expected)))

    async def client(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        kinds = (
            self.http_question,
            self.grpc_question,
            self.cancelled_stream,
            self.cancelled_call,
            self.too_long,
            self.schema,
        )
        while time.monotonic() < until:
            await asyncio.wait_for(rng.choices(kinds, (30, 25, 15, 10, 10, 10))[0](rng), timeout=120)


async def resident(control: control_pb2_grpc.ControlServiceStub) -> dict[str, int]:
    info = await control.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=60)
    return {actor.name: actor.rss_bytes for actor in info.actors}


async def test_mixed_load(tiny: Deployment) -> None:
    async with (
        httpx.AsyncClient(base_url=tiny.http_url, timeout=120, limits=httpx.Limits(max_connections=None)) as http,
        grpc.aio.insecure_channel(tiny.grpc_address) as channel,
    ):
        load = Load(tiny, http, channel)
        control = control_pb2_grpc.ControlServiceStub(channel)
        await load.learn()
        warm_until = time.monotonic() + SECONDS / 3
        await asyncio.gather(*(load.client(seed, warm_until) for seed in range(CLIENTS)))
        warm = await resident(control)
        until = time.monotonic() + SECONDS * 2 / 3
        await asyncio.gather(*(load.client(1000 + seed, until) for seed in range(CLIENTS)))
        assert load.wrong == []
        assert min(load.done[kind] for kind in ("question", "grpc question", "cancelled", "schema", "too long")) > 5
        end = await resident(control)
        for name, rss in end.items():
            assert rss < warm[name] + (24 << 20), f"{name} grew from {warm[name]} to {rss} bytes"
        deadline = time.monotonic() + 30
        while True:
            loads = (await control.GetLoad(control_pb2.GetLoadRequest(), timeout=60)).engines
            if all(engine.running == engine.waiting == 0 for engine in loads):
                break
            assert time.monotonic() < deadline, "a request is stuck"
            await asyncio.sleep(0.2)
        assert all(pool.used == 0 for engine in loads for pool in engine.kv_pages)
