"""What was put is what is stored: hashes that stores tell, reading back, refusals, leftovers."""

import base64
import hashlib
from pathlib import Path

import pytest

from tests.servers import S3Store
from tests.training.stumbling_store import Moods, stumbling_folder
from training.run_folder import StoreError, open_run_folder
from training.stored_content import MAX_PARTS, PART_BYTES, content_of, is_told, part_bytes

DATA = b"checkpoint" * 7


class AnswerError(OSError):
    """An error as s3fs raises it: caused by one of botocore that holds the answer."""

    def __init__(self, status: int, code: str = "Some") -> None:
        super().__init__(5, f"An error occurred ({code})")
        self.__cause__ = OSError()
        vars(self.__cause__)["response"] = {"ResponseMetadata": {"HTTPStatusCode": status}}


def test_the_hashes_that_stores_tell_are_known(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    content = content_of(tmp_path / "file")
    assert content == content_of(DATA)
    assert (content.size, content.sha256) == (70, hashlib.sha256(DATA).hexdigest())
    md5 = hashlib.md5(DATA).digest()
    assert is_told(content, {"ETag": f'"{md5.hex()}"'})
    assert is_told(content, {"ETag": f'"{hashlib.md5(md5).hexdigest()}-1"'})
    assert is_told(content, {"md5Hash": base64.b64encode(md5).decode()})
    other = hashlib.md5(b"other").hexdigest()
    for info in (
        {},
        {"ETag": f'"{other}"'},
        {"ETag": f'"{md5.hex()}-1"'},
        {"md5Hash": "none"},
    ):
        assert not is_told(content, info)


def test_parts_are_as_many_as_a_store_takes() -> None:
    assert part_bytes(5) == PART_BYTES
    huge = 3 * MAX_PARTS * PART_BYTES + 1
    assert -(-huge // part_bytes(huge)) <= MAX_PARTS


def test_altered_bytes_are_found_by_reading_back_and_put_again() -> None:
    moods = Moods(alter_puts=2)
    folder = stumbling_folder(moods)
    folder.write("a", DATA)
    assert (folder.read("a"), moods.writes) == (DATA, 3)
    moods.alter_puts = 3
    with pytest.raises(StoreError, match=r"in 3 attempts: .*holds other bytes than were put"):
        folder.write("a", DATA)


@pytest.mark.parametrize("status", [400, 405, 411, 416])
def test_a_store_that_says_no_is_not_asked_again(status: int) -> None:
    moods = Moods(fail_puts=9, error=AnswerError(status))
    with pytest.raises(StoreError, match=r"could not write .*will not do this however often"):
        stumbling_folder(moods).write("a", DATA)
    assert moods.fail_puts == 8


@pytest.mark.parametrize(
    "error",
    [
        AnswerError(408),
        AnswerError(429),
        AnswerError(500),
        AnswerError(503),
        AnswerError(400, "RequestTimeout"),
    ],
    ids=str,
)
def test_a_store_that_is_busy_is_asked_again(error: AnswerError) -> None:
    folder = stumbling_folder(Moods(fail_puts=2, error=error))
    folder.write("a", DATA)
    assert folder.read("a") == DATA


def test_a_file_is_created_once_and_a_lost_answer_is_told(tmp_path: Path) -> None:
    for folder in (open_run_folder(str(tmp_path)), stumbling_folder(Moods())):
        folder.create("lease/1", DATA)
        with pytest.raises(FileExistsError):
            folder.create("lease/1", b"other")
        assert (folder.read("lease/1"), folder.names("lease")) == (DATA, ["1"])


@pytest.mark.parametrize("status", [409, 412])
def test_a_condition_that_failed_is_a_file_that_is_there(status: int) -> None:
    moods = Moods(fail_puts=1, error=AnswerError(status))
    with pytest.raises(FileExistsError):
        stumbling_folder(moods).create("a", DATA)


def test_a_disk_without_hard_links_creates_a_file_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("training.run_folder.os.link", no_links)
    folder = open_run_folder(str(tmp_path))
    folder.create("a", DATA)
    with pytest.raises(FileExistsError):
        folder.create("a", b"other")
    assert (folder.read("a"), folder.names("")) == (DATA, ["a"])


def test_large_files_go_in_parts_and_what_was_left_is_aborted(
    s3_store: S3Store, tmp_path: Path
) -> None:
    folder = open_run_folder(s3_store.url, s3_store.storage_options)
    data = b"7" * (2 * PART_BYTES + 3)
    (tmp_path / "model").write_bytes(data)
    folder.put(tmp_path / "model", "model")
    assert folder.size("model") == len(data)
    s3, bucket = folder.filesystem, folder.root.partition("/")[0]
    for key in (folder.path("checkpoints/step_000001/a"), folder.path("export/a")):
        s3.call_s3("create_multipart_upload", Bucket=bucket, Key=key.partition("/")[2])
    folder.clear_spool()
    left = s3.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    assert [upload["Key"].endswith("/export/a") for upload in left] == [True]
