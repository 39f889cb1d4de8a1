"""A whole deployment from the outside: start it, wait, stop it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError
from ray.serve.schema import ApplicationStatus, ProxyStatus

from actors.client import EngineClient
from actors.controller import Controller
from actors.gateway import build_app
from actors.giving_way import housekeeping_gives_way
from actors.ray_client import RayEngineClient
from actors.vision_app import build_vision, check_room
from cluster.config import DeploymentConfig
from cluster.launch import AT_HEAD, CONTROLLER, NAMESPACE, connect, remove_session
from cluster.manifests_serve import APP_NAME, GRPC_SERVICER_FUNCTIONS
from llama4.config import TextConfig

Progress = Callable[[str, int, int], None]
Connect = Callable[[], Awaitable[EngineClient]]  # in a gateway's replica
_PROGRESS_EVERY_S = 0.2
_LOOK_EVERY_S = 0.1
_DRAIN_EVERY_S = 0.1
_STOP_TIMEOUT_S = 30.0
_ASK_EVERY_S = 5.0
_GONE_S = 60.0


class Deployment:
    """A deployment that is up. `stop` may be called again."""

    def __init__(self, config: DeploymentConfig, controller: ActorHandle, session: Path | None) -> None:
        gateway = config.gateway
        self.http_url = f"http://{gateway.host}:{gateway.http_port}"
        self.grpc_address = f"{gateway.host}:{gateway.grpc_port}"
        self._controller = controller
        self._session = session

    def wait(self) -> None:
        """Returns only by an exception: RuntimeError when the controller is gone for good, or a signal's."""
        answered = time.monotonic()
        while True:
            time.sleep(_ASK_EVERY_S)
            try:
                ray.get(self._controller.config.remote(), timeout=_ASK_EVERY_S)  # which asks nobody else
                answered = time.monotonic()
            except (RayError, TimeoutError) as error:  # a controller that died comes back
                if time.monotonic() - answered > _GONE_S:
                    raise RuntimeError(f"the controller has not answered for {_GONE_S:g} s: {error}") from error

    def drain(self, timeout_s: float) -> int:
        """Takes no more requests, and waits for those under way; returns how many are left when the time is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            remaining: int = ray.get(self._controller.drain.remote())
            if remaining == 0 or time.monotonic() >= deadline:
                return remaining
            time.sleep(_DRAIN_EVERY_S)

    def stop(self, keep_logs: bool = False) -> Path | None:
        """Ends engines and experts, then the gateways, then Ray itself if `launch` started it.

        Nothing is left of such a Ray but, if asked, the folder of its session, which is returned.
        """
        _tear_down(self._controller)
        if self._session is not None and not keep_logs:
            remove_session(self._session)
            self._session = None
        return self._session


def launch(config: DeploymentConfig, address: str | None = None, on_progress: Progress | None = None) -> Deployment:
    """Starts a deployment and returns when it is ready: weights loaded, a token through all layers, both endpoints up.

    Args:
        address: of a Ray cluster that runs; None starts one on this machine.
        on_progress: gets an actor's name, its bytes loaded and its bytes in all, whenever they change.

    Raises whatever kept it from starting, after everything that was started has been stopped.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    session = connect(config, address)
    if session is not None:
        housekeeping_gives_way(psutil.Process())
    # Beside Serve's proxy, so that no other machine's death takes them along.
    controller = Controller.options(name=CONTROLLER, lifetime="detached", resources=AT_HEAD).remote(config)
    try:
        started = controller.start.remote()
        _serve(config, controller)  # its processes come up while the actors load
        _follow(controller, started, on_progress or _ignore)
        ray.get(started)
        _wait_until_served()
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            _tear_down(controller)
        raise
    return Deployment(config, controller, session)


def _ignore(name: str, done: int, total: int) -> None:
    """Nobody watches."""


def _follow(controller: ActorHandle, started: Any, on_progress: Progress) -> None:
    told: dict[str, tuple[int, int]] = {}
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([started], timeout=_PROGRESS_EVERY_S)
        if done:
            break
        _, loaded = ray.get(controller.progress.remote())
        for name, amount in loaded.items():
            if told.get(name) != amount and amount[1]:
                told[name] = amount
                on_progress(name, *amount)


def _serve(config: DeploymentConfig, controller: ActorHandle) -> None:
    """Begins to bring up Serve and the gateways, which wait for the engines. Raises PlacementError."""
    gateway = config.gateway
    grpc_options = None
    if gateway.grpc.mode == "serve":
        grpc_options = {"port": gateway.grpc_port, "grpc_servicer_functions": list(GRPC_SERVICER_FUNCTIONS)}
    options = {"host": gateway.host, "port": gateway.http_port}
    # Serve itself replaces a proxy that a busy machine is too slow to start: only the wait for the first one is lost.
    with suppress(ActorDiedError):
        serve.start(http_options=options, grpc_options=grpc_options)
    ray.get(controller.placed.remote())  # the encoder has what room the actors leave
    check_room(config)
    app = application(config, partial(_connect, connect_to_engines(config)), gateways_at=AT_HEAD)
    serve.run_many([serve.RunTarget(app, APP_NAME, "/")], wait_for_applications_running=False)


async def _connect(connect: Connect) -> EngineClient:
    """A gateway's way to the engines, once a token has gone through all layers of each."""
    controller = await asyncio.to_thread(ray.get_actor, CONTROLLER, NAMESPACE)
    await controller.start.remote()
    return await connect()


def _wait_until_served() -> None:
    """Until gateways, encoder and proxies are up. Raises RuntimeError when Serve cannot bring them up."""
    while True:
        status = serve.status()
        app = status.applications[APP_NAME]
        proxies = all(proxy == ProxyStatus.HEALTHY for proxy in status.proxies.values())
        if app.status == ApplicationStatus.RUNNING and proxies:
            return
        if app.status == ApplicationStatus.DEPLOY_FAILED:
            raise RuntimeError(f"the gateways did not start: {app.message}")
        time.sleep(_LOOK_EVERY_S)


def connect_to_engines(config: DeploymentConfig) -> Connect:
    """What makes a gateway's client of the engines and, where the model takes images, of their encoder.

    Binds the encoder's deployment, of which Serve makes a handle in the gateway's replica.
    """
    return partial(RayEngineClient.connect, build_vision(config), config.vision.cache_bytes, config.placement_timeout_s)


def application(
    config: DeploymentConfig, connect: Connect, gateways_at: Mapping[str, float] | None = None
) -> serve.Application:
    """Gateways, on nodes with these resources, and, through `connect`, whatever else Serve is to run.

    Raises:
        ValueError: the checkpoint is broken.
        ConfigError: the file of API keys cannot be used.
    """
    model = config.model
    return build_app(
        str(model.path),
        model.served_name,
        model.max_context or TextConfig.from_dir(model.path).max_position_embeddings,
        config.gateway,
        connect,
        vision=config.vision,
        log_level=config.log_level,
        resources=gateways_at,
        log_format=config.log_format,
        log_prompts=config.log_prompts,
        tracing=config.tracing,
    )


def _tear_down(controller: ActorHandle) -> None:
    if not ray.is_initialized():
        return
    try:
        # Engines first: what runs ends with an error that says so, and then no stream holds up the gateways.
        ray.get(controller.stop.remote(), timeout=_STOP_TIMEOUT_S)
        if APP_NAME in serve.status().applications:
            serve.delete(APP_NAME)
    finally:
        ray.kill(controller)
        ray.shutdown()  # ends Ray itself if it was started here
