"""URLs without their credentials, and which have any."""

import pytest

from data.storage import StorageError, open_folder
from models.urls import holds_credentials, http_status, public_url
from training.run_folder import open_run_folder


class Told(OSError):  # noqa: N818
    """An error that holds what a library put into it."""

    def __init__(self, **known: object) -> None:
        super().__init__("an answer")
        vars(self).update(known)


SECRET = (
    ("s3://KEY:SECRET@bucket/a", "s3://bucket/a"),
    ("s3://KEY:SEC/RET@bucket/a", "s3://bucket/a"),
    ("sftp://me:SECRET@host:22/a", "sftp://host:22/a"),
    ("https://SECRET@host/a", "https://host/a"),
    ("https://host/a?X-Amz-Signature=SECRET&x=1", "https://host/a"),
    ("https://host/set?sig=SECRET#val", "https://host/set#val"),
    ("zip://w.pth::simplecache::s3://KEY:SECRET@b/w.zip", "zip://w.pth::simplecache::s3://b/w.zip"),
)
OPEN = ("/a/b?c", "s3://b/k#07-test", "file:///a/b:c@d", "s3://b/a@b", "http://host:80/a@b", "a:b")


@pytest.mark.parametrize(("url", "shown"), SECRET)
def test_credentials_are_seen_and_not_shown(url: str, shown: str) -> None:
    assert holds_credentials(url)
    assert public_url(url) == shown


@pytest.mark.parametrize("url", OPEN)
def test_places_without_credentials_stay_as_they_are(url: str) -> None:
    assert not holds_credentials(url)
    assert public_url(url) == url


def test_a_name_alone_and_a_harmless_query_are_no_secrets() -> None:
    assert not holds_credentials("sftp://me@host/a")
    assert not holds_credentials("https://host/a?download=true")


def test_no_folder_is_opened_by_a_url_with_a_password() -> None:
    """Its URL stands in every message about it; nothing is asked of the host."""
    url = "sftp://me:SECRET@host/a"
    with pytest.raises(StorageError, match=r"^sftp://host/a was given with a password") as data:
        open_folder(url)
    with pytest.raises(ValueError, match=r"^run=sftp://host/a was given with a password") as run:
        open_run_folder(url)
    assert "SECRET@" not in f"{data.value} {run.value}"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Told(response={"ResponseMetadata": {"HTTPStatusCode": 412}}), 412),
        (Told(response={"Error": {"Code": "x"}}), None),
        (Told(status=503), 503),
        (Told(code="429"), 429),
        (Told(code="NoSuchKey"), None),
        (OSError("no answer"), None),
    ],
    ids=str,
)
def test_the_status_is_found_wherever_a_library_keeps_it(
    error: OSError, status: int | None
) -> None:
    assert http_status(error) == status
    around = OSError("translated")
    around.__cause__ = error
    assert http_status(around) == status
