"""The image encoder's deployment in Ray Serve, as it is asked for; what a replica does is in `vision`.

Imports no torch, which the replica alone needs.
"""

from __future__ import annotations

import math

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.config import DeploymentConfig, VisionConfig
from cluster.launch import PlacementError
from engine.image_spec import ImageSpec

NAME = "vision"  # the deployment's, in Serve
_REPLICA = "actors.vision.Vision"  # by name: only the replica imports it
_MAX_WAITING = 1024  # images of a replica
_METRICS_EVERY_S = 1.0  # how often Serve's autoscaler hears of the load
_LONGEST_LOOK_BACK_S = 30.0
_HEALTH_EVERY_S = 2.0  # so long Serve takes to notice that a replica has died


def check_room(config: DeploymentConfig) -> None:
    """Raises PlacementError when Ray has no room for the replicas that are to start at once: Serve waits for ever."""
    if ImageSpec.from_dir(config.model.path) is None or not config.vision.min_replicas:
        return
    wanted = _resources(config.vision)
    group = placement_group([wanted] * config.vision.min_replicas)
    try:
        if not group.wait(config.placement_timeout_s):
            raise PlacementError(
                f"vision.min_replicas: no room for {config.vision.min_replicas} replicas of {wanted} each within "
                f"placement_timeout_s ({config.placement_timeout_s:g})"
            )
    finally:
        remove_placement_group(group)


def _resources(vision: VisionConfig) -> dict[str, float]:
    """What one replica reserves in Ray."""
    wanted = {"CPU": vision.num_cpus, "GPU": vision.num_gpus, **vision.resources}
    return {name: amount for name, amount in wanted.items() if amount > 0}


def build_vision(config: DeploymentConfig) -> serve.Application | None:
    """The deployment, to be bound into the gateway's application; None if the checkpoint takes no images."""
    if ImageSpec.from_dir(config.model.path) is None:
        return None
    vision = config.vision
    options: dict[str, object] = {"num_cpus": vision.num_cpus, "num_gpus": vision.num_gpus}
    if vision.resources:
        options["resources"] = vision.resources
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options=options,
        # Images wait in a replica: what it refused, Serve would send to it again and again, with the file.
        max_ongoing_requests=max(_MAX_WAITING, math.ceil(vision.target_ongoing_requests)),
        autoscaling_config={
            "min_replicas": vision.min_replicas,
            "max_replicas": vision.max_replicas,
            "target_ongoing_requests": vision.target_ongoing_requests,
            "upscale_delay_s": vision.upscale_delay_s,
            "downscale_delay_s": vision.downscale_delay_s,
            "metrics_interval_s": _METRICS_EVERY_S,
            # A mean over more than the delay would see a burst only when it is over.
            "look_back_period_s": min(_LONGEST_LOOK_BACK_S, max(2 * _METRICS_EVERY_S, vision.upscale_delay_s)),
        },
        # By its digest an image comes to the replica that has it already, whichever gateway asks.
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        health_check_period_s=_HEALTH_EVERY_S,
    )
    return deployment(_REPLICA).bind(config)
