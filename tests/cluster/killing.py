"""Jobs that are killed, and what their workers noted (`tests.cluster.recorded_job`)."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from cluster.processes import kill_tree


def begin_job(place: Path, run: str, *arguments: object) -> subprocess.Popen[bytes]:
    """`querypatch ARGUMENT...` in a process group of its own; notes and log lie in `place`."""
    command = [sys.executable, "-m", "tests.cluster.recorded_job", str(place / f"{run}.notes")]
    with (place / f"{run}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, *map(str, arguments)], stdout=log, stderr=log, start_new_session=True
        )


def finish(job: subprocess.Popen[bytes]) -> None:
    assert job.wait(timeout=300) == 0


def kill_when(job: subprocess.Popen[bytes], is_time: Callable[[], bool]) -> None:
    """SIGKILL to the job and all that it started, once it is time."""
    deadline = time.monotonic() + 300
    while not is_time():
        assert job.poll() is None, f"the job ended early with status {job.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill_tree(job.pid)
    job.wait()


def last_step(place: Path, run: str) -> int:
    return max((int(str(note["step"])) for note in _notes(place, run)), default=-1)


def ids_of(place: Path, run: str, steps: int) -> dict[int, list[int]]:
    """The ids of each global batch, joined over workers; a batch seen twice must be the same."""
    parts: dict[int, dict[str, set[int]]] = {}
    for file in sorted((place / f"{run}.notes").glob("*/*.jsonl")):
        start = file.parent.name
        for line in file.read_text().splitlines():
            note = json.loads(line) if line.endswith("}") else {"step": -1, "ids": []}
            parts.setdefault(note["step"], {}).setdefault(start, set()).update(note["ids"])
    joined: dict[int, list[int]] = {}
    for step, starts in sorted(parts.items()):
        whole = max(starts.values(), key=len)
        assert all(seen <= whole for seen in starts.values()), f"step {step}: {starts}"
        joined[step] = sorted(whole)
    joined.pop(-1, None)
    return {step: ids for step, ids in joined.items() if step < steps}


def pixels_of(place: Path, run: str, steps: int) -> set[tuple[object, object]]:
    """Step and hash of every worker's part."""
    return {
        (note["step"], note["pixels"])
        for note in _notes(place, run)
        if int(str(note["step"])) < steps
    }


def losses_of(place: Path, run: str) -> list[tuple[object, object, object]]:
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"
    ]


def weights_of(place: Path, run: str, steps: int) -> dict[str, torch.Tensor]:
    return load_file(place / run / "checkpoints" / f"step_{steps:06d}" / "model.safetensors")


def _notes(place: Path, run: str) -> list[dict[str, object]]:
    files = sorted((place / f"{run}.notes").glob("*/*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]
