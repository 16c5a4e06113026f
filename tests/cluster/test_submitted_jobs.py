"""Jobs on a real cluster with tokens: submitted, followed, refused, stopped, resumed by URL."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import querypatch
from cluster.jobs import queue
from cluster.jobs.client import connect
from cluster.jobs.orders import start_order
from cluster.jobs.submitting import submit
from tests.cluster.ray_nodes import RayNodes
from tests.finetune import small_run as finetuning
from tests.pretrain.small_run import RECIPE, small_shards
from training.checkpoint import newest_checkpoint
from training.metrics import read_metrics
from training.run_folder import open_run_folder
from training.strict_yaml import dump_yaml

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # Ray's own client says it.
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),
]

TOKEN = "5" * 64
PATIENCE_S = 200


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The Jobs API of a head with two CPUs that asks for a token."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with RayNodes(token=TOKEN, env={"PATH": path}) as nodes:
        nodes.start_head(num_cpus=2)
        yield nodes.jobs_url


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("submitted")
    small_shards(place)
    (place / "own.yaml").write_text(f"stage: pretrain\n{RECIPE}")
    return place


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def call(*words: object, status: int = 0) -> str:
    """What a command says, on both streams."""
    done = CliRunner().invoke(querypatch.app, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.output


def test_without_the_token_nothing_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert "asks for a token" in call("jobs", "--address", address, status=1)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "6" * 64)
    assert "does not take this token" in call("jobs", "--address", address, status=1)


@dataclass(frozen=True)
class Contested:
    """A run for which two jobs were started at once."""

    run: Path
    winner: str
    """Id of the job that writes it."""
    loser: str


@pytest.fixture(scope="module")
def contested(address: str, place: Path) -> Contested:
    """One of the jobs has been refused, the other has stored a checkpoint and goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        client, run, ids = connect(address), place / "contested", list[str]()
    order = start_order(str(place / "own.yaml"), _told(place, "contested", 100_000))
    threads = [
        threading.Thread(target=lambda: ids.append(submit(client, order, {}))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == ["contested-1", "contested-2"]

    def ended() -> list[str]:
        return [id for id in ids if queue.find_job(client, id).status.is_terminal()]

    _wait(lambda: bool(ended()), "refusal")
    (loser,) = ended()
    (winner,) = set(ids) - {loser}
    _wait(lambda: newest_checkpoint(open_run_folder(str(run))) is not None, "checkpoint")
    return Contested(run, winner, loser)


def test_of_two_jobs_on_one_run_one_is_refused_and_a_third_is_not_even_started(
    address: str, place: Path, contested: Contested
) -> None:
    said = call("logs", contested.loser, "--address", address)
    assert f"is being written by job {contested.winner} on" in said
    told = (*_told(place, "contested", 100_000), "--address", address)
    said = call("submit", place / "own.yaml", *told, status=1)
    assert f"is being written by job {contested.winner} on this cluster" in said
    status = json.loads(call("status", contested.run, "--json"))
    assert (status["state"], status["workers"]) == ("running", 1)
    assert status["writer"].startswith(f"job {contested.winner} on ")


def test_a_job_beside_it_is_checked_submitted_followed_and_listed(
    address: str, place: Path, contested: Contested
) -> None:
    told = (*_told(place, "beside", 4), "--address", address)
    said = call("submit", place / "own.yaml", *told, "--follow")
    assert "beside-1\n" in said
    assert said.count("step 4/4") == 1
    assert call("logs", "beside-1", "--address", address).count("step 4/4") == 1
    lines = [line.split() for line in call("jobs", "--address", address).splitlines()]
    states = {line[0]: (line[1], line[-1]) for line in lines}
    assert states["beside-1"] == ("SUCCEEDED", str(place / "beside"))
    assert states[contested.winner] == ("RUNNING", str(contested.run))
    assert states[contested.loser][0] == "FAILED"
    assert f"{place / 'beside'}: finished" in call("status", "beside-1", "--address", address)


def test_it_is_stopped_with_a_checkpoint_and_resumed_from_its_url_alone(
    address: str, contested: Contested
) -> None:
    run, client = contested.run, connect(address)
    assert f"{run}: stopped at step" in call("stop", run)
    ended = queue.wait_for_end(client, contested.winner, PATIENCE_S)
    assert ended is not None
    assert queue.succeeded(ended)
    stopped = _last_step(run)
    assert json.loads(call("status", run, "--json"))["checkpoint_step"] == stopped

    assert call("resume", run, "--address", address).splitlines()[0] == "contested-3"
    _wait(lambda: _last_step(run) > stopped, "step after the resume")
    # Ray's own way to end a job: it has 30 s for its checkpoint, not Ray's 3.
    assert "job contested-3 STOPPED" in call("stop", run, "--now", "--address", address)
    newest = newest_checkpoint(open_run_folder(str(run)))
    assert newest is not None
    assert newest.step == _last_step(run)
    steps = [line["step"] for line in _records(run)]
    assert steps == list(range(1, newest.step + 1))


@pytest.mark.long
def test_a_pipeline_is_one_job_that_may_be_given_again(address: str, place: Path) -> None:
    """Its runs have workers, its evaluation and its export are tasks of the cluster."""
    sets = finetuning.small_sets(place / "sets", count=4)
    (place / "finetune.yaml").write_text(finetuning.RECIPE.replace("from_scratch: true\n", ""))
    train, validation = finetuning.sets_of(sets)
    first = [f"data.shards={place / 'shards'}", "loop.steps=2"]
    stages = {
        "first": {"pretrain": str(place / "own.yaml"), "set": first},
        "second": {
            "finetune": str(place / "finetune.yaml"),
            "set": ["init=$first", train, validation, "loop.steps=2"],
        },
        "judged": {"evaluate": "$second", "data": validation.partition("=")[2]},
        "exported": {"export": "$second"},
    }
    (place / "walk.yaml").write_text(dump_yaml({"folder": str(place / "walk"), "stages": stages}))
    to = ("--address", address, "--follow", "--no-check")
    assert "all 4 stages are done" in call("pipeline", place / "walk.yaml", *to)
    assert json.loads((place / "walk/judged/scores.json").read_text())["pictures"] == 2
    assert (place / "walk/exported/config.json").is_file()
    assert call("pipeline", place / "walk", *to).count("done before") == 4
    assert f"{place / 'walk/judged'}: done (evaluate)" in call("status", place / "walk")


def _told(place: Path, run: str, steps: int) -> list[str]:
    """With checkpoints seconds apart: Ray takes note of one in a second, and waits for the last."""
    run_and_data = (f"run={place / run}", f"data.shards={place / 'shards'}")
    return [*run_and_data, f"loop.steps={steps}", "loop.checkpoint_every_steps=40"]


def _last_step(run: Path) -> int:
    records = _records(run)
    step = records[-1]["step"] if records else 0
    assert isinstance(step, int)
    return step


def _records(run: Path) -> list[dict[str, object]]:
    return [line for line in read_metrics(open_run_folder(str(run))) if line["kind"] == "train"]


def _wait(is_there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_there():
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s"
        time.sleep(0.2)
