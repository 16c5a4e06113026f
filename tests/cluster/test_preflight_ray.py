"""`querypatch preflight --address`: the machines of a cluster are asked, and a worker tries."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ray_nodes import RayNodes
from tests.pretrain.small_run import RECIPE, small_shards

WORKERS = 2


def test_a_cluster_with_too_few_places_is_named_before_a_job_waits_for_ever(
    ray_nodes: RayNodes, tmp_path: Path
) -> None:
    ray_nodes.have_nodes(WORKERS)
    told = _looked(ray_nodes, ray_nodes.address, tmp_path, "quick", "resources.workers=3")
    found = {check["name"]: check for check in told["checks"]}
    assert f"the same on {WORKERS} machines: python" in found["versions"]["said"]
    assert found["places"]["state"] == "well"
    assert found["workers"]["state"] == "fault"
    assert "say resources.workers=2, or add machines" in found["workers"]["said"]
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_worker_of_the_cluster_tries_a_step_and_a_checkpoint(
    ray_nodes: RayNodes, tmp_path: Path
) -> None:
    ray_nodes.have_nodes(WORKERS)
    asked = (tmp_path, "trial", f"resources.workers={WORKERS}")
    told = _looked(ray_nodes, ray_nodes.address, *asked)
    assert told["ready"]
    found = {check["name"]: check for check in told["checks"]}
    assert found["checkpoint"]["state"] == "well"
    assert found["forecast"]["facts"]["workers"] == WORKERS


@pytest.mark.long
def test_a_cluster_that_is_reached_by_its_jobs_api_looks_as_a_job(
    ray_nodes: RayNodes, tmp_path: Path
) -> None:
    ray_nodes.have_nodes(WORKERS)
    told = _looked(ray_nodes, ray_nodes.jobs_url, tmp_path, "quick")
    assert told["ready"]
    assert "versions" in {check["name"] for check in told["checks"]}


def _looked(nodes: RayNodes, address: str, place: Path, depth: str, *more: str) -> Any:
    recipe = place / "recipe.yaml"
    recipe.write_text(f"stage: pretrain\n{RECIPE}")
    command = [sys.executable, "-m", "querypatch", "preflight", str(recipe), *more]
    command += [f"run={place / 'run'}", f"data.shards={small_shards(place)}"]
    command += ["--depth", depth, "--json", "--address", address]
    environment = {**os.environ, **nodes.environment}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    begin, end = done.stdout.find("{\n"), done.stdout.rfind("\n}")
    assert begin >= 0, done.stdout + done.stderr
    return json.loads(done.stdout[begin : end + 2])
