"""The notice of a spot machine is heard from its metadata, and Ray is told."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.node import NodeError, drain_node, wait_for_notice, work_here
from tests.cluster.ray_nodes import RayNodes

NOW = datetime(2026, 11, 26, 4, 0, 0, tzinfo=UTC)
DRAIN = (
    "import sys; from cluster.node import drain_node; drain_node(9, *sys.argv[1:], lambda: False)"
)
Answer = Callable[[str, str, Any], tuple[int, str]]
"""Method, path and headers of a request; status and text."""


@contextmanager
def metadata(answer: Answer) -> Iterator[str]:
    """URL of a service that answers as a cloud's metadata do."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            status, text = answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_aws_tells_when_the_machine_ends() -> None:
    asked: list[str] = []

    def answer(method: str, path: str, headers: Any) -> tuple[int, str]:
        if path == "/latest/api/token":
            seconds = headers["X-aws-ec2-metadata-token-ttl-seconds"]
            return (200, "ours") if method == "PUT" and seconds else (405, "")
        if headers["X-aws-ec2-metadata-token"] != "ours":
            return 401, ""
        asked.append(path)
        if len(asked) < 3:
            return 404, "none"
        return 200, json.dumps({"action": "terminate", "time": "2026-11-26T04:02:00Z"})

    with metadata(answer) as url:
        assert wait_for_notice("aws", url, sleep=lambda _: None, now=lambda: NOW) == 120
    assert asked == ["/latest/meta-data/spot/instance-action"] * 3


def test_google_cloud_says_that_the_machine_is_preempted() -> None:
    said = iter(["FALSE", "FALSE", "TRUE"])

    def answer(_: str, path: str, headers: Any) -> tuple[int, str]:
        if headers["Metadata-Flavor"] != "Google":
            return 403, ""
        return (200, next(said)) if path == "/computeMetadata/v1/instance/preempted" else (404, "")

    with metadata(answer) as url:
        assert wait_for_notice("gcp", url, sleep=lambda _: None) == 25
    assert next(said, None) is None


def test_metadata_that_stumble_are_asked_again() -> None:
    said = iter([(200, "FALSE"), (503, ""), (200, "TRUE")])
    with metadata(lambda *_: next(said)) as url:
        assert wait_for_notice("gcp", url, sleep=lambda _: None) == 25


def test_a_machine_of_no_cloud_is_said_at_once() -> None:
    with metadata(lambda *_: (404, "")) as url:
        pass
    with pytest.raises(NodeError, match=f"no metadata of gcp at {url}"):
        wait_for_notice("gcp", url, sleep=lambda _: None)


@pytest.mark.slow
def test_ray_takes_the_word_of_a_node_that_goes_and_of_no_other(ray_nodes: RayNodes) -> None:
    """By the command of the manifests, as a container's last act."""
    (node,) = ray_nodes.have_nodes(1)
    command = [sys.executable, "-m", "querypatch", "node", "drain", "--deadline", "30"]
    command += ["--address", ray_nodes.address, "--node-id"]
    environment = {**os.environ, **ray_nodes.environment}
    # Left out: the loop that waits for what other clusters of this machine may have at work.
    told = [sys.executable, "-c", DRAIN, ray_nodes.address, ray_nodes.node_id(node)]
    subprocess.run(told, env=environment, check=True, timeout=60)
    wrong = subprocess.run(
        [*command, "f" * 56],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ray_nodes.kill_node(node)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("querypatch: Ray could not be told that this node goes")


def test_titles_of_ray_s_processes_tell_whether_there_is_work(tmp_path: Path) -> None:
    for number, title in enumerate(["ray::IDLE", "ray::DashboardAgent", "python3"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes(title.encode() + b"\0-m\0x\0")
    assert not work_here(tmp_path)
    (tmp_path / "77").mkdir()
    (tmp_path / "77" / "cmdline").write_bytes(b"ray::RayTrainWorker\0")
    assert work_here(tmp_path)


def test_a_head_that_is_away_is_said_within_the_deadline() -> None:
    began = time.monotonic()
    with pytest.raises(NodeError, match=r"the head is away|could not be told"):
        drain_node(3, "127.0.0.1:1", "0" * 56, sleep=lambda _: None)
    assert time.monotonic() - began < 10
