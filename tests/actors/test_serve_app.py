"""The Serve application that a rendered configuration names, as Serve builds it. (e2e/test_deploy_yaml runs it.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve._private.build_app import build_app

from actors.serve_app import build
from cluster.config import load_config
from cluster.config_errors import ConfigError
from cluster.manifests_serve import FLEET, GATEWAY, serve_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"


def test_every_deployment_that_the_configuration_names_is_in_the_application() -> None:
    [application] = serve_config(load_config(CONFIG))["applications"]
    built = build_app(build(application["args"]), name=application["name"])
    assert {deployment["name"] for deployment in application["deployments"]} == {FLEET, GATEWAY}
    assert {FLEET, GATEWAY} <= {deployment.name for deployment in built.deployments}
    assert built.ingress_deployment_name == GATEWAY


def test_bad_args_are_sentences() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": {}, "expert": {"actors": 1}})
    assert caught.value.problems == (
        "args: model.path is required",
        "args: expert is not a known key; the nearest is experts",
    )
