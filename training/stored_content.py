"""Whether a store holds just what was put there, by its size and its hash.

Most stores tell a hash of what they hold: S3 an ETag, which is the MD5 of an object or, of one that
came in parts, the MD5 of the parts' MD5s; Google an MD5. Where none is told, or it is of something
else (S3 encrypts with a key of the customer), the object is read back.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fsspec import AbstractFileSystem

PART_BYTES = 16 << 20
"""Parts in which large files are put: ten of them are in memory at once (s3fs)."""

MAX_PARTS = 10_000
"""Of one object in S3."""


@dataclass(frozen=True)
class Content:
    """What a store should hold."""

    size: int
    """Bytes."""
    md5: bytes
    parts_md5: bytes
    """MD5 of the MD5s of its parts."""
    parts: int
    sha256: str


def content_of(source: Path | bytes) -> Content:
    """What is in a local file, or in memory; one pass."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    whole, sha256, of_parts = _md5(), hashlib.sha256(), _md5()
    parts = 0
    for part in _parts(source, part_bytes(size)):
        whole.update(part)
        sha256.update(part)
        of_parts.update(_md5(part).digest())
        parts += 1
    return Content(size, whole.digest(), of_parts.digest(), parts, sha256.hexdigest())


def part_bytes(size: int) -> int:
    """Bytes of each part of a file of `size` bytes but the last."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


def is_told(content: Content, info: Mapping[str, object]) -> bool:
    """Whether the hash that a store tells of an object (fsspec's info) is that of the content."""
    etag = str(info.get("ETag", "")).strip('"')
    if etag in (content.md5.hex(), f"{content.parts_md5.hex()}-{content.parts}"):
        return True
    try:
        return base64.b64decode(str(info.get("md5Hash", "")), validate=True) == content.md5
    except binascii.Error:
        return False


def is_read_back(content: Content, filesystem: AbstractFileSystem, path: str) -> bool:
    """Whether the bytes that the store hands out are those of the content; reads them all."""
    digest = hashlib.sha256()
    with filesystem.open(path, "rb", block_size=PART_BYTES) as file:
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest() == content.sha256


def _parts(source: Path | bytes, size: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield from (source[begin : begin + size] for begin in range(0, len(source), size))
        return
    with source.open("rb") as file:
        while part := file.read(size):
            yield part


def _md5(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)
