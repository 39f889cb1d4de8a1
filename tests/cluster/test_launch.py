"""What is decided before Ray starts."""

import pytest

from cluster.config import DeploymentConfig
from cluster.launch import shares_cores

ATTENTION_AND_EXPERTS = {"attention": {"actors": 2, "num_cpus": 2}, "experts": {"actors": 3, "num_cpus": 1}}


@pytest.mark.parametrize(
    ("sections", "cores", "share"),
    [
        ({}, 2, False),
        ({}, 1, True),
        (ATTENTION_AND_EXPERTS, 7, False),
        (ATTENTION_AND_EXPERTS, 6, True),
        ({"attention": {"threads": 8}}, 8, True),
        ({"attention": {"num_gpus": 1, "num_cpus": 16}, "experts": {"num_gpus": 1, "num_cpus": 16}}, 8, False),
    ],
)
def test_threads_that_outnumber_the_cores(sections: dict[str, object], cores: int, share: bool) -> None:
    config = DeploymentConfig.model_validate({"model": {"path": "/models/tiny"}, **sections})
    assert shares_cores(config, cores) is share
