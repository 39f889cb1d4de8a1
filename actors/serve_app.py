"""The whole deployment as one application of Ray Serve: `serve deploy` starts it, and deleting the application ends it.

`herder render serve` writes the configuration that names `build`. Serve keeps gateways and image encoders; the
attention and expert actors stay the controller's, and the deployment `fleet` ties their life to the application's: its
one replica brings them up, and takes them down when the application is deleted, but not when the replica is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from actors.client import EngineClient
from actors.controller import Controller
from actors.deployment import Connect, application, connect_to_engines
from actors.logs import set_up_logs
from actors.reasons import first_line
from cluster.config import ConfigError, DeploymentConfig
from cluster.config_errors import sentences
from cluster.launch import CONTROLLER, ENVIRONMENT, NAMESPACE
from cluster.live import LiveSettings
from cluster.manifests_serve import FLEET

log = logging.getLogger("herder")

_STOP_TIMEOUT_S = 30.0
_ANSWER_S = 5.0
_DRAIN_EVERY_S = 0.2
_LOOK_EVERY_S = 0.05
_SILENCES = 6  # of the controller in a row, at Serve's checks ten seconds apart, after which its keeper begins anew


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application, from its `args` in Serve's configuration: a DeploymentConfig without defaults.

    Raises:
        ConfigError: they are none.
        ValueError: the checkpoint is broken.
    """
    try:
        config = DeploymentConfig.model_validate(args)
    except ValidationError as error:
        problems = [problem for fault in error.errors() for problem in sentences(fault, DeploymentConfig)]
        raise ConfigError([f"args: {problem}" for problem in problems]) from None
    fleet = serve.deployment(
        name=FLEET,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 2 * _STOP_TIMEOUT_S,
    )
    return application(config, partial(_connect, fleet(FleetKeeper).bind(config), connect_to_engines(config)))


async def _connect(fleet: DeploymentHandle, connect: Connect) -> EngineClient:
    """A gateway's way to the engines, once there are any. (Serve makes a handle of the deployment bound in `build`.)"""
    await fleet.ready.remote()
    return await connect()


class FleetKeeper:
    """Keeps the controller, and with it the attention and expert actors, for as long as the application exists.

    It may die and come back: the controller is found by its name, and goes on as it was.
    """

    async def __init__(self, config: DeploymentConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns when all actors have loaded and a token has gone through. Raises what keeps them from that."""
        set_up_logs(config.log_level, config.log_format)
        self._config = config
        self._live = LiveSettings.of(config)
        self._silences = 0
        self._app_name = serve.get_replica_context().app_name
        self._controller = _controller(config)
        present: DeploymentConfig = await self._controller.config.remote()
        if _actors_of(present) != _actors_of(config):
            log.info("the configuration has changed: all actors begin anew")
            await self._end()
            self._controller = _controller(config)
        try:
            await self._controller.start.remote()
        except BaseException:
            await self._end()
            raise

    async def ready(self) -> None:
        """Returns as soon as the engines are up: Serve calls nothing before `__init__` is through."""

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve's `user_config`: what changes while requests run. Raises ConfigError, and then nothing has changed."""
        self._live = LiveSettings.parse(user_config)
        await self._controller.reconfigure.remote(self._live)

    async def check_health(self) -> None:
        """For Serve. Raises RuntimeError when the controller is gone for good.

        A controller that died comes back with the settings that it was born with, so it is told the live ones again.
        """
        try:
            await asyncio.wait_for(self._controller.reconfigure.remote(self._live), _ANSWER_S)
            self._silences = 0
        except (RayError, TimeoutError) as error:
            self._silences += 1
            log.warning("the controller does not answer times=%d reason=%s", self._silences, first_line(error))
            if self._silences >= _SILENCES:
                raise RuntimeError("the controller has not answered for a minute") from error

    async def __del__(self) -> None:  # Serve awaits it, before it ends the replica
        if await asyncio.to_thread(_is_deleted, self._app_name):
            with suppress(RayError, TimeoutError):
                await asyncio.wait_for(self._drain(), self._config.gateway.drain_timeout_s)
            await self._end()

    async def _drain(self) -> None:
        while await self._controller.drain.remote():
            await asyncio.sleep(_DRAIN_EVERY_S)

    async def _end(self) -> None:
        """Ends all actors and the controller."""
        try:
            await asyncio.wait_for(self._controller.stop.remote(), _STOP_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            log.warning("the controller did not stop its actors reason=%s", first_line(error))
        ray.kill(self._controller)
        await asyncio.to_thread(_wait_until_gone)


def _wait_until_gone() -> None:
    """Until the name is free for the next controller."""
    with suppress(ValueError):
        while ray.get_actor(CONTROLLER, namespace=NAMESPACE) is not None:
            time.sleep(_LOOK_EVERY_S)


def _controller(config: DeploymentConfig) -> ActorHandle:
    """The controller: the one that there is, else a new one."""
    options: Any = Controller.options(
        name=CONTROLLER,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        runtime_env={"env_vars": ENVIRONMENT},
    )
    handle: ActorHandle = options.remote(config)
    return handle


def _actors_of(config: DeploymentConfig) -> DeploymentConfig:
    """What of a configuration makes up the attention and expert actors and cannot be changed under them."""
    rest = LiveSettings().over(config)
    defaults = DeploymentConfig(model=config.model)
    same = {"gateway": defaults.gateway, "vision": defaults.vision, "tracing": defaults.tracing, "log_prompts": False}
    return rest.model_copy(update=same)


def _is_deleted(app_name: str) -> bool:
    """Whether the application is on its way out, rather than this replica alone."""
    status = serve.status().applications.get(app_name)
    return status is None or status.status == ApplicationStatus.DELETING
