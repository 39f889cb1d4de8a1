"""The tiny deployment over both endpoints: right answers, the single process's tokens, transformers' logprobs."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator

import grpc
import httpx
import openai
import psutil
import pytest
import ray
import torch
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from actors.deployment import Deployment
from engine.request import Request, SamplingParams
from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.e2e.conftest import TINY
from tests.llama4.reference import reference_logits
from tests.single import SingleProcess

pytestmark = pytest.mark.cluster

VOCABULARY = 256


@pytest.fixture(scope="module")
def http(tiny: Deployment) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny.http_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def channel(tiny: Deployment) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(tiny.grpc_address) as channel:
        yield channel


def eval_questions(per_task: int) -> list[dict[str, str]]:
    """The first questions of each task of the held-out set that shows no images."""
    by_task: dict[str, list[dict[str, str]]] = {}
    for line in (TINY / "eval.jsonl").read_text().splitlines():
        question = json.loads(line)
        if "images" not in question:
            by_task.setdefault(question["task"], []).append(question)
    return [question for questions in by_task.values() for question in questions[:per_task]]


def mixed_prompts(count: int) -> list[list[int]]:
    """Random prompts of 1 to 300 tokens, and beside them repeated and common beginnings."""
    generator = torch.Generator().manual_seed(64)
    lengths = torch.randint(1, 300, (count,), generator=generator).tolist()
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [prompts[n - 1][: n + 5] + prompt if n % 7 == 3 else prompt for n, prompt in enumerate(prompts)]


def test_held_out_questions_are_answered_over_http(tiny):
    questions = eval_questions(4)

    async def ask_all() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{tiny.http_url}/v1", api_key="none")

        async def ask(question: dict[str, str]) -> str:
            stream = await client.chat.completions.create(
                model="tiny", temperature=0, stream=True, messages=[{"role": "user", "content": question["prompt"]}]
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        return await asyncio.gather(*(ask(question) for question in questions))

    answers = asyncio.run(ask_all())
    right = sum(answer.strip() == question["answer"] for answer, question in zip(answers, questions, strict=True))
    assert right >= 0.9 * len(questions), list(zip(questions, answers, strict=True))


def test_sixty_four_mixed_prompts_give_the_single_process_tokens(tiny):
    prompts = mixed_prompts(64)

    async def ask_all() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=tiny.http_url, timeout=120) as client:

            async def ask(prompt: list[int]) -> list[int]:
                body = {
                    "model": "tiny",
                    "prompt": prompt,
                    "max_tokens": 24,
                    "temperature": 0,
                    "ignore_eos": True,
                    "logprobs": 0,
                    "return_tokens_as_token_ids": True,
                }
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
                return [int(token.removeprefix("token_id:")) for token in tokens]

            return await asyncio.gather(*(ask(prompt) for prompt in prompts))

    single = SingleProcess(TINY)
    try:
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
        expected = single.tokens([Request(str(n), tuple(prompt), params) for n, prompt in enumerate(prompts)])
    finally:
        single.close()
    assert asyncio.run(ask_all()) == [expected[str(n)] for n in range(64)]


def test_a_seed_gives_the_same_tokens_on_whichever_actor(http):
    body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 20, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    body |= {"logprobs": 0, "return_tokens_as_token_ids": True}
    answers = {
        tuple(http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]) for _ in range(6)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("length", [1, 2, 37, 200])
def test_echoed_logprobs_are_those_of_transformers(http, length):
    prompt = mixed_prompts(64)[0:64]
    tokens = [token for part in prompt for token in part][:length]
    body = {"model": "tiny", "prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    expected_TV = reference_logits(TINY, tokens).log_softmax(-1)
    assert found[0] is None and len(found) == length
    for position in range(1, length):
        assert abs(found[position] - float(expected_TV[position - 1, tokens[position]])) < 1e-4


def test_chat_streams_over_grpc(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.ChatStreamRequest(
        messages=[{"role": "user", "content": [{"text": "17+25="}]}], sampling={"temperature": 0.0}
    )
    events = list(stub.ChatStream(request, timeout=60))
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("prompt", "finished") and set(kinds[1:-1]) == {"tokens"} and len(kinds) >= 4
    assert "".join(event.tokens.text for event in events[:-1]) == "42"
    assert events[-1].finished.usage.completion_tokens == 3  # with the end of turn


def test_grpc_generates_from_token_ids_with_logprobs(channel):
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    request = inference_pb2.GenerateRequest(
        token_ids={"ids": [1, 2, 3]}, sampling={"temperature": 0.0, "max_tokens": 5, "logprobs": 2, "ignore_eos": True}
    )
    answer = stub.Generate(request, timeout=60)
    (choice,) = answer.choices
    assert len(choice.token_ids) == 5 == len(choice.logprobs) and answer.usage.prompt_tokens == 3
    logits_V = reference_logits(TINY, [1, 2, 3])[-1]
    assert choice.token_ids[0] == int(logits_V.argmax())
    assert abs(choice.logprobs[0].logprob - float(logits_V.log_softmax(-1).max())) < 1e-4


def test_reflection_lists_both_services(channel):
    database = ProtoReflectionDescriptorDatabase(channel)
    services = set(database.get_services())
    assert {"herder.v1.InferenceService", "herder.v1.ControlService"} <= services
    service = DescriptorPool(database).FindServiceByName("herder.v1.InferenceService")
    assert {method.name for method in service.methods} == {
        "Generate",
        "GenerateStream",
        "Chat",
        "ChatStream",
        "Tokenize",
        "Detokenize",
    }


def test_control_service_tells_the_topology(channel):
    stub = control_pb2_grpc.ControlServiceStub(channel)
    info = stub.GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=60)
    assert info.ready and {actor.name for actor in info.actors} == {
        "controller",
        "attention-0",
        "attention-1",
        "expert-0",
        "expert-1",
    }
    placement = stub.GetExpertPlacement(control_pb2.GetExpertPlacementRequest(), timeout=60)
    for layer in placement.layers:
        assert len(layer.experts) == 16
        assert [list(expert.slots) for expert in layer.experts] == [[0]] * 8 + [[1]] * 8


def test_health_means_servable(http):
    assert http.get("/health").status_code == 200
    assert http.get("/health/ready").status_code == 200


BAD_COMPLETIONS = [
    ({"model": "gpt"}, 404, "model"),
    ({"prompt": [1] * 5000}, 400, "prompt"),
    ({"prompt": [1, 10**6]}, 400, "prompt"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temprature": 1}, 400, "temprature"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"n": 17}, 400, "n"),
]


def test_bad_input_is_refused_by_name_and_a_running_stream_is_untouched(http, channel):
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 0, "return_tokens_as_token_ids": True, "stream": True}

    def stream_tokens() -> list[str]:
        tokens: list[str] = []
        with http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        tokens += (choice["logprobs"] or {}).get("tokens", [])
        return tokens

    undisturbed = stream_tokens()
    assert len(undisturbed) == 200
    disturbed: list[list[str]] = []
    reader = threading.Thread(target=lambda: disturbed.append(stream_tokens()))
    reader.start()
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    while reader.is_alive():
        for change, status, param in BAD_COMPLETIONS:
            answer = http.post("/v1/completions", json={"model": "tiny", "prompt": [1], **change})
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["param"] == param and param in answer.json()["error"]["message"]
        bad = inference_pb2.GenerateRequest(token_ids={"ids": [1, 10**6]})
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(bad, timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "prompt has token id" in caught.value.details()
    reader.join()
    assert disturbed == [undisturbed]


def test_a_client_that_goes_away_frees_its_pages(http, channel):
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    stub = control_pb2_grpc.ControlServiceStub(channel)
    deadline = time.monotonic() + 10
    while True:
        load = stub.GetLoad(control_pb2.GetLoadRequest(), timeout=60)
        if all(engine.running == 0 for engine in load.engines):
            break
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


@ray.remote(num_cpus=0)
class Bare:
    """An actor that does nothing: what Ray itself takes for each process."""

    def pid(self) -> int:
        return os.getpid()


def test_an_idle_deployment_uses_next_to_no_cpu(tiny, channel):
    info = control_pb2_grpc.ControlServiceStub(channel).GetServerInfo(control_pb2.GetServerInfoRequest(), timeout=60)
    bare = [Bare.remote() for _ in info.actors]
    ours = [psutil.Process(actor.pid) for actor in info.actors]
    rays = [psutil.Process(pid) for pid in ray.get([actor.pid.remote() for actor in bare])]
    time.sleep(1)

    def used(processes: list[psutil.Process]) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in processes))

    def share_of_a_core(seconds: float) -> float:
        before = used(ours), used(rays)
        time.sleep(seconds)
        return (used(ours) - before[0] - (used(rays) - before[1])) / seconds

    # Other tests run beside this one and make everything dearer for a while; what is always done is in every span.
    shares = (share_of_a_core(5) for _ in range(12))
    assert any(share < 0.02 for share in shares)
