"""A job through Ray whose workers find out that it cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cluster.ray_nodes import RayNodes
from tests.pretrain.small_run import RECIPE, small_shards
from training.history import read_history
from training.run_folder import open_run_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_weights_that_do_not_fit_end_the_job_at_once_with_one_line(
    ray_nodes: RayNodes, tmp_path: Path
) -> None:
    ray_nodes.have_nodes(2)
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "wrong.pth")
    (tmp_path / "own.yaml").write_text(RECIPE)
    done = subprocess.run(
        [
            sys.executable, "-m", "querypatch", "pretrain", str(tmp_path / "own.yaml"),
            f"run={tmp_path / 'run'}", f"data.shards={small_shards(tmp_path)}",
            "resources.workers=2", f"model.backbone.weights={tmp_path / 'wrong.pth'}",
            "--address", ray_nodes.address,
        ],
        env={**os.environ, **ray_nodes.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("querypatch: ")]
    assert len(lines) == 1, done.stdout
    (line,) = lines
    assert "wrong.pth" in line
    assert "layer1.0.conv1.weight" in line
    *_, last = read_history(open_run_folder(str(tmp_path / "run")))
    assert (last.kind, last.text) == ("failed", line.removeprefix("querypatch: "))
