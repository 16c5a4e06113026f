"""Files of `ray up`: what Ray would refuse is refused here; tokens, loopback, notices are there."""

from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.render.ray_up import render_ray_up
from cluster.render.settings import RayUpSettings
from tests.cluster.test_render import IMAGE, Tree, recipe
from training.recipe import RecipeError

AWS: Tree = {
    "image": IMAGE,
    "region": "eu-central-1",
    "zone": "eu-central-1a",
    "head_machine": "m7i.large",
    "worker_machine": "g6.4xlarge",
    "worker_cpus": 16,
    "gpus": 1,
}
GCP: Tree = {
    **AWS,
    "region": "europe-west4",
    "zone": "europe-west4-a",
    "project": "mine",
    "head_machine": "n2-standard-4",
    "worker_machine": "g2-standard-16",
    "machine_image": "projects/mine/global/images/family/gpu",
}


def ray_up(provider: Any, settings: Tree, *more: str) -> Tree:
    text = render_ray_up(
        recipe("resources.workers=2..8", *more), provider, RayUpSettings(**settings)
    )
    cluster: Tree = yaml.safe_load(text)
    return cluster


@pytest.mark.parametrize(("provider", "settings"), [("aws", AWS), ("gcp", GCP)])
def test_ray_takes_the_cluster_file(provider: str, settings: Tree) -> None:
    cluster = ray_up(provider, settings)
    validate_config(prepare_config(cluster))
    assert cluster["max_workers"] == 8
    cluster["idle_timeout_minuts"] = 3
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(cluster))


@pytest.mark.parametrize(("provider", "settings"), [("aws", AWS), ("gcp", GCP)])
def test_a_started_cluster_wants_a_token_and_listens_on_loopback(
    provider: str, settings: Tree
) -> None:
    cluster = ray_up(provider, settings)
    starts = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert f"querypatch node watch {provider}" in cluster["worker_start_ray_commands"][-1]
    types = cluster["available_node_types"]
    spot = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[provider]
    assert spot in types["workers"]["node_config"]
    assert spot not in types["head"]["node_config"]


@pytest.mark.parametrize(
    ("provider", "settings", "complaint"),
    [
        ("aws", {**AWS, "gpus": 0}, "gpus=0: resources.device=cuda needs one"),
        ("aws", {**AWS, "worker_cpus": 8}, "worker_cpus=8: .* need 12"),
        ("gcp", {**GCP, "project": None}, "project: Google Cloud needs"),
        ("gcp", {**GCP, "machine_image": None}, "machine_image: GPUs need one"),
    ],
)
def test_machines_that_do_not_fit_the_recipe_are_refused(
    provider: str, settings: Tree, complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        ray_up(provider, settings)
