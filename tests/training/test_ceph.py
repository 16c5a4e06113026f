"""The run's folder in a production store: conditional writes, kills in the middle of an upload."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.ceph import ceph_store
from tests.faulty_store import Fault, Request, faulty_store
from tests.servers import S3Store
from training.lease import LeaseHeld, LeaseSettings, check_held, take_lease, this_process
from training.run_folder import RunFolder, open_run_folder
from training.stored_content import PART_BYTES

__all__ = ["ceph_store"]
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


def folder_in(store: S3Store, name: str) -> RunFolder:
    return open_run_folder(f"{store.url}/{name}", store.storage_options)


@pytest.mark.parametrize("turn", range(3))
def test_of_eight_that_start_at_once_one_gets_the_run(ceph_store: S3Store, turn: int) -> None:
    settings = LeaseSettings(ttl_s=30, renew_every_s=0.5, settle_s=60)
    start, end = threading.Barrier(8), threading.Event()
    told: list[str] = []

    def begin(job: str) -> None:
        folder = folder_in(ceph_store, f"race-{turn}")
        start.wait()
        try:
            with take_lease(folder, this_process(job), settings) as lease:
                told.append("taken")
                end.wait(60)
                check_held(folder, lease.token)
        except LeaseHeld:
            told.append("held")
            if told.count("held") == 7:
                end.set()

    began = time.monotonic()
    threads = [threading.Thread(target=begin, args=(job,)) for job in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["held"] * 7 + ["taken"]
    assert time.monotonic() - began < 55  # nobody had to settle: the store keeps conditions


PUT = """
import json, sys
from pathlib import Path
from training.run_folder import open_run_folder
url, options, source = sys.argv[1:]
open_run_folder(url, json.loads(options)).put(Path(source), "best/model")
"""


def test_a_kill_in_the_middle_of_an_upload_leaves_the_old_file_and_its_parts_are_removed(
    ceph_store: S3Store, tmp_path: Path
) -> None:
    folder = folder_in(ceph_store, "killed")
    folder.write("best/model", b"old")
    source = tmp_path / "new"
    source.write_bytes(b"n" * (6 * PART_BYTES))
    parts: list[str] = []

    def hold_later_parts(request: Request) -> Fault:
        if "partNumber=" not in request.path:
            return Fault()
        parts.append(request.path)
        return Fault("wait", seconds=60) if len(parts) > 2 else Fault()

    with faulty_store(ceph_store, hold_later_parts) as faulty:
        url, options = f"{faulty.store.url}/killed", json.dumps(faulty.store.storage_options)
        command = [sys.executable, "-c", PUT, url, options, str(source)]
        job = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 60
        while len(parts) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        job.kill()
        job.wait()
    assert folder.read("best/model") == b"old"
    assert uploads_in(folder) == 1
    folder.clear_spool()
    assert uploads_in(folder) == 0
    folder.put(source, "best/model")
    assert folder.size("best/model") == 6 * PART_BYTES


def uploads_in(folder: RunFolder) -> int:
    bucket, _, key = folder.root.partition("/")
    page = folder.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    return len(page.get("Uploads", []))
