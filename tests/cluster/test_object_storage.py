"""The main job on a real S3 server: shards from it, checkpoints to it, resumed from it alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from cluster.processes import kill_tree
from data.synthetic import write_scenes
from tests.cluster.service_walk import store_environment
from tests.pretrain.small_run import RECIPE
from tests.servers import S3Store

STEPS = 40


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_on_s3_through_ray_is_killed_and_resumed_elsewhere_from_its_url_alone(
    s3_store: S3Store, tmp_path: Path
) -> None:
    write_scenes(tmp_path / "pictures", seed=6, count=12)
    (tmp_path / "own.yaml").write_text(RECIPE.replace("steps: 6", f"steps: {STEPS}"))
    shards, run = f"{s3_store.url}/shards", f"{s3_store.url}/runs/a"
    _call(s3_store, tmp_path, "shards", "write", tmp_path / "pictures", shards)
    job = _begin(
        s3_store, tmp_path, "pretrain", tmp_path / "own.yaml", f"run={run}",
        f"data.shards={shards}", "resources.workers=2", "data.stream.processes=1",
    )  # fmt: skip
    filesystem = fsspec.filesystem("s3", **s3_store.storage_options)
    _wait_for_checkpoint(job, filesystem, run)
    kill_tree(job.pid)
    job.wait()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = _call(s3_store, elsewhere, "resume", run, "--local", "resources.workers=1")
    assert f"step {STEPS}/{STEPS}" in said
    _check_store(filesystem, run)
    _call(s3_store, elsewhere, "show", "patches", run, "-o", elsewhere / "p.png", "--count", 2)
    assert (elsewhere / "p.png").is_file()


def _check_store(filesystem: fsspec.AbstractFileSystem, run: str) -> None:
    """The record is one story from the first step to the last, and the last checkpoint whole."""
    filesystem.invalidate_cache()
    text = filesystem.cat_file(f"{run}/metrics.jsonl").decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    last = f"{run}/checkpoints/step_{STEPS:06d}"
    manifest = json.loads(filesystem.cat_file(f"{last}/manifest.json"))
    for name, file in manifest["files"].items():
        assert filesystem.info(f"{last}/{name}")["size"] == file["size"]
    assert len(json.loads(filesystem.cat_file(f"{run}/environment.json"))["starts"]) == 2


def _wait_for_checkpoint(
    job: "subprocess.Popen[bytes]", filesystem: fsspec.AbstractFileSystem, run: str
) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        filesystem.invalidate_cache()
        if filesystem.glob(f"{run}/checkpoints/*/manifest.json"):
            return
        assert job.poll() is None, "the job ended before its first checkpoint"
        time.sleep(0.2)
    pytest.fail("no checkpoint in 300 s")


def _call(store: S3Store, place: Path, *arguments: object) -> str:
    done = subprocess.run(
        _line(arguments), cwd=place, env=_environment(store), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _begin(store: S3Store, place: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    with (place / "job.log").open("wb") as log:
        return subprocess.Popen(
            _line(arguments), cwd=place, env=_environment(store), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def _line(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "querypatch", *map(str, arguments)]


def _environment(store: S3Store) -> dict[str, str]:
    code = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return os.environ | store_environment(store) | code
