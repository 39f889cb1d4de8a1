"""A whole deployment from the outside: start it, wait, stop it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle

from actors.controller import NAME, Controller
from actors.gateway import GRPC_SERVICER_FUNCTIONS, build_app
from actors.ray_client import RayEngineClient
from cluster.config import DeploymentConfig
from cluster.launch import connect
from llama4.config import TextConfig

Progress = Callable[[str, int, int], None]
_PROGRESS_EVERY_S = 0.2


class Deployment:
    """A deployment that is up. `stop` may be called again."""

    def __init__(self, config: DeploymentConfig, controller: ActorHandle, *, owns_ray: bool) -> None:
        gateway = config.gateway
        self.http_url = f"http://{gateway.host}:{gateway.http_port}"
        self.grpc_address = f"{gateway.host}:{gateway.grpc_port}"
        self._controller = controller
        self._owns_ray = owns_ray

    def wait(self) -> None:
        """Returns only by an exception: RuntimeError when the deployment cannot serve any more, or a signal's."""
        raise RuntimeError(ray.get(self._controller.until_fault.remote()))

    def stop(self) -> None:
        """Gateway first, then engines and experts, then Ray itself if it was started here."""
        _tear_down(self._controller, self._owns_ray)


def launch(config: DeploymentConfig, address: str | None = None, on_progress: Progress | None = None) -> Deployment:
    """Starts a deployment and returns when it is ready: weights loaded, a token through all layers, both endpoints up.

    Args:
        address: of a Ray cluster that runs; None starts one on this machine.
        on_progress: gets an actor's name, its bytes loaded and its bytes in all, whenever they change.

    Raises whatever kept it from starting, after everything that was started has been stopped.
    """
    connect(config, address)
    owns_ray = address is None
    controller = Controller.options(name=NAME, lifetime="detached").remote(config)
    try:
        started = controller.start.remote()
        _follow(controller, started, on_progress or _ignore)
        ray.get(started)
        _serve(config)
    except BaseException:
        _tear_down(controller, owns_ray)
        raise
    return Deployment(config, controller, owns_ray=owns_ray)


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


def _serve(config: DeploymentConfig) -> None:
    gateway, model = config.gateway, config.model
    serve.start(
        http_options={"host": gateway.host, "port": gateway.http_port},
        grpc_options={"port": gateway.grpc_port, "grpc_servicer_functions": list(GRPC_SERVICER_FUNCTIONS)},
    )
    app = build_app(
        str(model.path),
        model.served_name,
        model.max_context or TextConfig.from_dir(model.path).max_position_embeddings,
        RayEngineClient.connect,
        replicas=gateway.replicas,
        max_ongoing_requests=gateway.max_ongoing_requests,
        log_level=config.log_level,
    )
    serve.run(app, name="herder", route_prefix="/")


def _tear_down(controller: ActorHandle, owns_ray: bool) -> None:
    if not ray.is_initialized():
        return
    serve.shutdown()
    try:
        ray.get(controller.stop.remote(), timeout=30)
    finally:
        ray.kill(controller)
        ray.shutdown()
