"""URLs without their credentials, and which have any."""

import pytest

from models.urls import holds_credentials, public_url

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
