"""What a killed process leaves behind in a run: half-prepared files, uploads without an end.

The parts of an upload that never ended are seen by nobody and paid for by the month.
"""

import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

STALE_S = 60.0
"""Seconds after which a half-prepared small file is of a process that was killed."""


def clear_unfinished(root: Path, prefix: str) -> None:
    """Removes folders at `root` and stale files below it whose names begin with `prefix`."""
    for left in root.glob(f"{prefix}*/"):
        shutil.rmtree(left, ignore_errors=True)
    # Others write small files at this moment, each in an instant.
    for left in root.rglob(f"{prefix}*"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()


def abort_uploads(s3: AbstractFileSystem, root: str) -> None:
    """Aborts the multipart uploads below `root` (bucket/key), all of which are left behind."""
    bucket, _, key = root.partition("/")
    markers: dict[str, str] = {}
    while True:
        try:
            page: dict[str, Any] = s3.call_s3(
                "list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **markers
            )
        except FileNotFoundError:
            # What rclone says of a bucket that never saw one.
            return
        for upload in page.get("Uploads", []):
            logger.info("aborting an upload that never ended: %s", upload["Key"])
            with suppress(FileNotFoundError):
                s3.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        if not page.get("IsTruncated"):
            return
        markers = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page["NextUploadIdMarker"],
        }
