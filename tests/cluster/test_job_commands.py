"""Jobs at the front door, against a stand-in for the cluster: what is sent, said and refused."""

import io
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cluster.jobs.queue
import querypatch
from cluster.jobs.cluster_check import pins_of_this_machine
from cluster.jobs.packaging import EXTRAS
from cluster.jobs.submitting import Order
from cluster.jobs.submitting import submit as submit_there
from tests.cluster.jobs_server import TOKEN, JobsServer, doctor_says, serving
from tests.pretrain.small_run import RECIPE
from training.recipe import parse_recipe
from training.record import code_commit

# Ray's own client says it.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")

FITS = {"python": "3.11.7, /usr/bin/python", "torch": "2.14.1+cu130, CUDA 13.0", "ray": "2.60.0"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsServer]:
    """A cluster with everything we need, whose token is in our environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.jobs.queue, "_RECONNECT_S", 0.05)
    with serving(JobsServer(doctor=doctor_says(**FITS))) as started:
        yield started


def call(*words: object, status: int = 0) -> str:
    """What a command says, on both streams."""
    done = CliRunner().invoke(querypatch.app, [str(word) for word in words])
    assert done.exit_code == status, done.output
    return done.output


def submit(server: JobsServer, place: Path, *more: object, status: int = 0) -> str:
    (place / "own.yaml").write_text(f"# mine\nstage: pretrain\n{RECIPE}")
    told = ("s3://bucket/runs/a", "data.shards=s3://bucket/s", "queries.num_patches=3")
    words = (f"run={told[0]}", *told[1:], "--address", server.url, *more)
    return call("submit", place / "own.yaml", *words, status=status)


def test_a_submitted_job_is_our_code_and_its_recipe_and_nothing_else(
    server: JobsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert submit(server, tmp_path, "--env", "AWS_ENDPOINT_URL").splitlines()[0] == "a-1"
    job = server.jobs["a-1"]
    recipe = f"{EXTRAS}/recipe.yaml"
    command = f"exec python -m querypatch pretrain {recipe} --continue --address auto"
    assert job["entrypoint"] == command
    assert job["metadata"]["run"] == "s3://bucket/runs/a"
    variables = job["runtime_env"]["env_vars"]
    assert variables["AWS_ENDPOINT_URL"] == "http://store:9000"
    assert (variables["QUERYPATCH_JOB"], variables["RAY_JOB_STOP_WAIT_TIME_S"]) == ("a-1", "30")
    assert variables.get("QUERYPATCH_COMMIT") == code_commit()
    package = job["runtime_env"]["working_dir"].rpartition("/")[2]
    files = zipfile.ZipFile(io.BytesIO(server.packages[package]))
    names = {name for name in files.namelist() if not name.endswith("/")}
    assert {"querypatch.py", "models/detector.py", recipe} <= names
    assert {Path(name).suffix for name in names} <= {".py", ".yaml", ".typed"}
    sent = parse_recipe(files.read(recipe).decode())
    assert (sent["run"], sent["queries"]) == ("s3://bucket/runs/a", {"num_patches": 3})
    assert "ema" not in sent
    assert TOKEN not in str(server.jobs)


def test_paths_in_a_recipe_for_another_machine_are_told(
    server: JobsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.jobs.commands.is_this_machine", lambda _: False)
    (tmp_path / "own.yaml").write_text(RECIPE)
    words = ("run=runs/b", "data.shards=s3://s", "--no-check", "--address", server.url)
    said = call("submit", tmp_path / "own.yaml", *words)
    assert "paths and no URLs, the same on all machines of the cluster: run\n" in said


def test_ids_count_the_attempts_and_never_collide(server: JobsServer, tmp_path: Path) -> None:
    for id in ("a-1", "a-2"):
        assert submit(server, tmp_path).splitlines()[0] == id
        server.end(id, "FAILED")
    assert submit(server, tmp_path, "--name", "night run").splitlines()[0] == "night-run-1"
    client = cluster.jobs.client.connect(server.url)
    order = Order(("doctor",), "x")
    made = list[str]()

    def one() -> None:
        made.append(submit_there(client, order, {}))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == ["x-1", "x-2", "x-3", "x-4"]


def test_a_run_that_a_job_writes_is_refused_to_another(server: JobsServer, tmp_path: Path) -> None:
    submit(server, tmp_path)
    said = submit(server, tmp_path, "--no-check", status=1)
    assert "s3://bucket/runs/a is being written by job a-1 on this cluster; stop it with" in said
    server.end("a-1", "STOPPED")
    submit(server, tmp_path, "--no-check")


def test_a_run_is_resumed_from_its_url_alone(server: JobsServer) -> None:
    said = call("resume", "s3://b/runs/a/", "resources.workers=2", "--address", server.url)
    assert said.splitlines()[0] == "a-1"
    command = "querypatch resume s3://b/runs/a resources.workers=2 --address auto"
    assert server.jobs["a-1"]["entrypoint"] == f"exec python -m {command}"
    assert server.jobs["a-1"]["metadata"]["run"] == "s3://b/runs/a"


def test_start_commands_with_the_address_of_a_jobs_api_submit(
    server: JobsServer, tmp_path: Path
) -> None:
    """Relative paths are those of this folder."""
    (tmp_path / "own.yaml").write_text(RECIPE)
    words = (tmp_path / "own.yaml", "run=runs/b", "data.shards=s", "--address", server.url)
    assert call("pretrain", *words).splitlines()[0] == "b-1"
    assert server.jobs["b-1"]["metadata"]["run"] == str(Path("runs/b").absolute())


def test_a_followed_job_shows_each_line_once_though_connections_break(
    server: JobsServer, tmp_path: Path
) -> None:
    def run() -> None:
        while "a-1" not in server.jobs:
            time.sleep(0.01)
        server.cuts = 2
        server.logs["a-1"] = "step 1/2 one\n"
        time.sleep(0.5)
        server.end("a-1", "SUCCEEDED", "step 2/2 two\n")

    thread = threading.Thread(target=run)
    thread.start()
    said = submit(server, tmp_path, "--follow", "--no-check")
    thread.join()
    assert server.cuts == 0
    assert said == "a-1\nstep 1/2 one\nstep 2/2 two\n"


def test_a_job_that_fails_says_its_last_line_and_status_1(server: JobsServer) -> None:
    call("resume", "s3://b/runs/a", "--address", server.url)
    server.end("a-1", "FAILED", "querypatch: s3://b/runs/a holds no run\n", "x\nno run\n")
    said = call("logs", "a-1", "-f", "--address", server.url, status=1)
    assert said.splitlines()[-2:] == [
        "querypatch: s3://b/runs/a holds no run",
        "job a-1 FAILED: no run",
    ]
    assert call("logs", "s3://b/runs/a", "--address", server.url) == server.logs["a-1"]


def test_jobs_are_listed_and_found(server: JobsServer) -> None:
    call("resume", "s3://b/runs/a", "--address", server.url)
    said = call("jobs", "--address", server.url)
    assert said.splitlines()[-1] == "a-1       RUNNING    2023-11-14 22:13:20 UTC  s3://b/runs/a"
    assert '"state": "RUNNING"' in call("jobs", "--address", server.url, "--json")
    said = call("logs", "b-1", "--address", server.url, status=1)
    assert "has no job 'b-1'; its newest are doctor-1, a-1" in said
    assert "for the id of a job give --address" in call("status", "b-1", status=1)


def test_a_job_is_ended_at_once_through_ray(server: JobsServer) -> None:
    call("resume", "s3://b/runs/a", "--address", server.url)
    server.jobs["a-1"]["metadata"].pop("run")
    assert "job a-1 STOPPED" in call("stop", "a-1", "--now", "--address", server.url)
    assert "is not running: STOPPED" in call("stop", "a-1", "--now", "--address", server.url)
    assert "job a-1 writes no run" in call("stop", "a-1", "--address", server.url, status=1)
    assert "--now asks Ray" in call("stop", "a-1", "--now", status=1)


@pytest.mark.parametrize(
    ("finding", "line"),
    [
        (
            {"torch": "2.10.0, CUDA 12"},
            r"torch 2.10.0: needs >=2.11; renew the image, or --install",
        ),
        ({"s3fs": "broken: not installed; pip install s3fs"}, "s3fs: not installed"),
        ({"deformable attention on cuda:0": "broken: schema 3, needs 4"}, "on cuda:0: schema 3"),
    ],
)
def test_a_cluster_that_does_not_fit_is_named_before_anything_starts(
    server: JobsServer, tmp_path: Path, finding: dict[str, str], line: str
) -> None:
    server.doctor = doctor_says(**{**FITS, **finding})
    said = submit(server, tmp_path, status=1)
    assert f"{server.url} does not fit:\n  " in said
    assert line in said
    assert list(server.jobs) == ["doctor-1"]


def test_a_cluster_that_differs_or_is_slow_gets_a_word(server: JobsServer, tmp_path: Path) -> None:
    server.doctor = doctor_says(**{**FITS, "python": "3.12.1, /p", "ops": "slow: plain PyTorch"})
    said = submit(server, tmp_path)
    assert "the cluster has python 3.12.1, this machine 3.11" in said
    assert "slow on the cluster's head: ops, plain PyTorch" in said
    assert "a-1" in said


def test_a_cluster_that_cannot_run_our_code_says_why(server: JobsServer, tmp_path: Path) -> None:
    server.doctor = "Traceback\nModuleNotFoundError: No module named 'typer'\n"
    said = submit(server, tmp_path, status=1)
    assert (
        "could not run `querypatch doctor` (ModuleNotFoundError: No module named 'typer')" in said
    )
    assert "--install" in said


def test_versions_are_pinned_when_asked(server: JobsServer, tmp_path: Path) -> None:
    submit(server, tmp_path, "--install")
    pins = server.jobs["a-1"]["runtime_env"]["pip"]
    assert pins == server.jobs["doctor-1"]["runtime_env"]["pip"]
    assert set(pins["packages"]) == set(pins_of_this_machine())
    assert not [pin for pin in pins["packages"] if "+" in pin or pin.startswith("ray==")]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x", "looks like a secret"),
        ("AWS_ACCESS_KEY_ID", "x", "looks like a secret"),
        ("HF_TOKEN", "x", "looks like a secret"),
        ("FSSPEC_S3", '{"key": "a", "secret": "word"}', "looks like a secret"),
        ("AZURE_STORAGE_CONNECTION_STRING", "word", "looks like a secret"),
        ("PROXY", "http://me:word@proxy:3128", "looks like a secret"),
        ("NOWHERE", None, "there is no such variable here"),
    ],
)
def test_secrets_are_not_passed_on(
    server: JobsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str | None,
    message: str,
) -> None:
    if value is not None:
        monkeypatch.setenv(name, value)
    said = submit(server, tmp_path, "--env", name, status=1)
    assert f"--env {name}" in said
    assert message in said
    assert "word" not in said
    assert not server.jobs


def test_urls_with_credentials_are_not_passed_on(server: JobsServer) -> None:
    said = call("resume", "s3://me:word@b/runs/a", "--address", server.url, status=1)
    assert "s3://b/runs/a was given with credentials" in said
    assert "word" not in said


def test_a_missing_or_wrong_token_is_one_line(
    server: JobsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    said = call("jobs", "--address", server.url, status=1)
    assert said.startswith(f"querypatch: {server.url} does not take this token; RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    said = call("jobs", "--address", server.url, status=1)
    assert said.startswith(f"querypatch: {server.url} asks for a token; set RAY_AUTH_TOKEN or")
    assert len(said.splitlines()) == 1
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(f"{TOKEN}\n")
    assert "has no jobs" in call("jobs", "--address", server.url)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "RAY_AUTH_TOKEN_PATH=" in call("jobs", "--address", server.url, status=1)


def test_a_cluster_without_tokens_is_refused_unless_it_is_here_or_insecure_is_said(
    server: JobsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = None
    assert "has no jobs" in call("jobs", "--address", server.url)
    monkeypatch.setattr("cluster.jobs.client.is_this_machine", lambda _: False)
    said = call("jobs", "--address", server.url, status=1)
    assert "asks for no token: whoever reaches it can run commands there" in said
    assert "has no jobs" in call("jobs", "--address", server.url, "--insecure")


def test_wrong_addresses_are_one_line(server: JobsServer) -> None:
    said = call("jobs", "--address", "http://127.0.0.1:9", status=1)
    assert said.startswith("querypatch: http://127.0.0.1:9 does not answer; is it the head's")
    said = call("jobs", "--address", f"{server.url}/x", status=1)
    assert "answers, but not as Ray's Jobs API does (status 404 for /api/version)" in said
    said = call("jobs", "--address", "head:8265", status=1)
    assert "--address head:8265 is no http://HEAD:8265" in said
    said = call("jobs", "--address", "http://me:word@head:8265", status=1)
    assert "word" not in said


def test_the_given_address_counts_more_than_the_environments(
    server: JobsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own client would follow the variable."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert "has no jobs" in call("jobs", "--address", server.url)


def test_looking_at_jobs_does_not_wait_for_torch() -> None:
    look = "import sys, cluster.jobs.views; print({'torch', 'cv2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
