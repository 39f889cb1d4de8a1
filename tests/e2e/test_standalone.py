"""The gateway's own gRPC server in a live deployment: TLS, health, rich errors, deadlines, API keys, draining."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from actors.deployment import Deployment
from herder.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.certificates import Authority
from tests.e2e.conftest import running

pytestmark = pytest.mark.cluster

KEY = (("authorization", "Bearer sk-one"),)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture(scope="module")
def deployment(authority: Authority) -> Iterator[Deployment]:
    cert, key = authority.issue("server")
    tls = f"gateway.grpc={{mode: standalone, tls: {{cert: {cert}, key: {key}}}}}"
    with running(tls, "gateway.api_keys=[sk-one]", "gateway.replicas=2") as found:
        yield found


@pytest.fixture(scope="module")
def channel(deployment: Deployment, authority: Authority) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(Path(authority.cert).read_bytes())
    with grpc.secure_channel(deployment.grpc_address, credentials) as found:
        yield found


def ask(channel: grpc.Channel, **sampling: object) -> inference_pb2.GenerateResponse:
    request = inference_pb2.GenerateRequest(token_ids={"ids": [1, 2, 3]}, sampling={"temperature": 0.0, **sampling})
    return inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=30, metadata=KEY)


def test_calls_over_tls_and_http_beside_it(deployment, channel):
    tokens = list(ask(channel, max_tokens=5, ignore_eos=True).choices[0].token_ids)
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    url, key = f"{deployment.http_url}/v1/completions", {"authorization": "Bearer sk-one"}
    answer = httpx.post(url, json=body, headers=key, timeout=30)
    assert answer.json()["choices"][0]["token_ids"] == tokens
    assert httpx.post(url, json=body, timeout=30).status_code == 401
    with pytest.raises(grpc.RpcError), grpc.insecure_channel(deployment.grpc_address) as plain:
        ask(plain, max_tokens=1)


def test_rich_errors(channel):
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, temperature=-1.0)
    (detail,) = rpc_status.from_call(caught.value).details
    found = error_details_pb2.BadRequest()
    assert detail.Unpack(found) and found.field_violations[0].field == "temperature"
    with pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceServiceStub(channel).Generate(inference_pb2.GenerateRequest(), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_calls_deadline_ends_the_request(channel):
    request = inference_pb2.GenerateRequest(token_ids={"ids": [1]}, sampling={"max_tokens": 4000, "ignore_eos": True})
    with pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=0.2, metadata=KEY)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    control = control_pb2_grpc.ControlServiceStub(channel)
    deadline = time.monotonic() + 10
    while any(e.running for e in control.GetLoad(control_pb2.GetLoadRequest(), timeout=30, metadata=KEY).engines):
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


def test_draining_finishes_what_runs_and_admits_nothing(deployment, channel):
    """The last test: the deployment takes no request after it."""
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == serving
    control = control_pb2_grpc.ControlServiceStub(channel)
    with ThreadPoolExecutor() as pool:
        long = pool.submit(ask, channel, max_tokens=500, ignore_eos=True)
        while not any(
            e.running for e in control.GetLoad(control_pb2.GetLoadRequest(), timeout=30, metadata=KEY).engines
        ):
            time.sleep(0.01)
        assert control.Drain(control_pb2.DrainRequest(), timeout=30, metadata=KEY).remaining == 1
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status != serving
        ready = httpx.get(f"{deployment.http_url}/health/ready", timeout=30)
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        with pytest.raises(grpc.RpcError) as caught:
            ask(channel, max_tokens=1)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(long.result().choices[0].token_ids) == 500
    assert deployment.drain(10) == 0
