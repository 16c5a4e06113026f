"""`querypatch doctor`, and runs that would fall back to plain PyTorch on a GPU."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster import doctor, kernels
from cluster.kernels import NoKernels, check_kernels
from cluster.stages import recipe_of
from models.ops.library import Missing
from querypatch import app

SAID = ("run=r", "data.train=t", "model.backbone.weights=random")
CUDA = torch.device("cuda")


def test_the_doctor_names_what_is_installed_and_which_kernel_runs() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    lines = {line[8:].split("  ")[0]: line for line in done.stdout.splitlines()}
    assert torch.__version__ in lines["torch"]
    assert {"python", "ray", "webdataset", "kernel cache"} <= lines.keys()
    assert "plain PyTorch" in lines["deformable attention on cpu"] or "compiled" in done.stdout
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "nothing is broken")
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert told["broken"] is False
    assert {"name", "state", "said"} == told["findings"][0].keys()


def test_kernels_that_answer_wrongly_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = doctor.sampled_once

    def wrong(device: torch.device, *operator: object) -> tuple[torch.Tensor, torch.Tensor]:
        sampled, gradient = asked(device)
        return (sampled, gradient) if operator else (sampled + 1, gradient)

    monkeypatch.setattr(doctor, "sampled_once", wrong)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "differs from the plain version" in done.stdout
    assert done.stdout.splitlines()[-1] == "broken: deformable attention on cpu"


def test_no_library_is_slow_and_a_missing_package_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "load_library", lambda: Missing("there is none"))
    monkeypatch.setattr(doctor, "_NEEDED", ("ray", "no-such-package"))
    found = {finding.name: finding for finding in doctor.findings()}
    assert found["deformable attention on cpu"].state == "slow"
    assert found["no-such-package"].state == "broken"
    assert found["no-such-package"].said == "not installed; pip install querypatch"


def test_a_gpu_run_without_kernels_is_refused_unless_it_may_be_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And detectors that sample nothing need none."""

    def nothing(device: torch.device) -> None:
        raise RuntimeError("no compiled deformable attention on cuda: say ops.allow_reference=true")

    monkeypatch.setattr(kernels, "sampled_once", nothing)
    recipe = recipe_of("finetune", "deformable_tiny_cpu_scratch", SAID)
    with pytest.raises(NoKernels, match=r"say ops\.allow_reference=true"):
        check_kernels(recipe, CUDA)
    check_kernels(recipe, torch.device("cpu"))
    slow = recipe_of("finetune", "sparse_tiny_cpu_scratch", [*SAID, "ops.allow_reference=true"])
    check_kernels(slow, CUDA)
    check_kernels(recipe_of("finetune", "tiny_cpu_scratch", SAID), CUDA)


def test_the_front_door_says_where_kernels_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {finding.name: finding.said for finding in doctor.findings()}
    assert found["kernel cache"] == str(tmp_path / "querypatch")
