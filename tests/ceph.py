"""A real production store for the tests: Ceph's S3 gateway on loopback, where it is installed."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.servers import S3Store, with_endpoint

SCRIPT = Path(__file__).parents[2] / "shared/tools/ceph_s3.sh"
"""Starts it (`start`, `rgw`, `stop`, each with a folder and a port); QUERYPATCH_CEPH names
another one."""
START_S = 60


@pytest.fixture(scope="session")
def ceph_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    """The gateway with an empty bucket, for the whole session; the test skips where it cannot be.

    Takes about 20 s and 0.4 GB of memory.
    """
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'querypatch[s3]'")
    script = Path(os.environ.get("QUERYPATCH_CEPH", SCRIPT))
    if not script.is_file() or shutil.which("radosgw") is None:
        pytest.skip(
            "no Ceph: apt-get install radosgw ceph-mon ceph-osd, QUERYPATCH_CEPH=ceph_s3.sh"
        )
    # Its daemons make sockets there, whose paths have to be short.
    folder, port = tmp_path_factory.mktemp("ceph"), _free_ports()
    command = ["bash", str(script)]
    with (folder.parent / "ceph.log").open("wb") as log:
        subprocess.run(
            [*command, "start", str(folder), str(port)], stdout=log, stderr=log, check=True,
            timeout=180,
        )  # fmt: skip
        gateway = subprocess.Popen(
            [*command, "rgw", str(folder), str(port)], stdout=log, stderr=log
        )
        try:
            yield _with_bucket(gateway, port)
        finally:
            gateway.terminate()
            gateway.wait(timeout=30)
            subprocess.run(
                [*command, "stop", str(folder)], stdout=log, stderr=log, check=False, timeout=60
            )
            shutil.rmtree(folder, ignore_errors=True)


def _with_bucket(gateway: "subprocess.Popen[bytes]", port: int) -> S3Store:
    config = {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path"},
    }
    options: dict[str, object] = {"key": "KEY", "secret": "SECRET1234", "config_kwargs": config}
    store = with_endpoint(
        S3Store("s3://pictures", "", options, Path("/nowhere")), f"http://127.0.0.1:{port}"
    )
    _wait_for(gateway, port)
    # Without a region, which Ceph would take for a place to put the bucket.
    there = {**store.storage_options, "client_kwargs": {"endpoint_url": store.endpoint}}
    fsspec.filesystem("s3", **there).call_s3("create_bucket", Bucket="pictures")
    return store


def _wait_for(gateway: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if gateway.poll() is not None:
            pytest.fail(f"radosgw ended with {gateway.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"radosgw does not answer on port {port} after {START_S} s")


def _free_ports() -> int:
    """The first of two free ports that follow each other."""
    for first in range(21_000, 29_000, 2):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", first))
                other.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first
    pytest.fail("no two free ports")
