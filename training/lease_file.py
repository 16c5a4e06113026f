"""The file of a run's lease: `lease/000003.json`, the number of the start in its name."""

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from models.settings import Settings
from training.run_folder import RunFolder

FOLDER = "lease"
GENERATION = re.compile(r"(\d{6,})\.json")


class LeaseRecord(Settings):
    """What a lease's file says."""

    job: str
    host: str
    pid: int
    boot: str
    nonce: str
    """Tells two that took one number from each other."""
    renewals: int = 0
    renewed_at: str
    """UTC, ISO 8601."""
    ttl_s: float
    released: bool = False
    """Whether its holder let go of it."""


@dataclass(frozen=True)
class SeenLease:
    """The file of the highest generation, as it was found."""

    generation: int
    raw: bytes
    record: LeaseRecord | None
    """None where the file is none of ours, or is just being written."""


def newest_lease(folder: RunFolder) -> SeenLease | None:
    """The lease of the highest number; None where there is none.

    Raises:
        StoreError: the folder cannot be read.
    """
    for generation in sorted(lease_generations(folder), reverse=True):
        # A new holder may have deleted it since it was listed.
        with suppress(FileNotFoundError):
            raw = folder.read(lease_place(generation))
            return SeenLease(generation, raw, _parsed(raw))
    return None


def lease_generations(folder: RunFolder) -> list[int]:
    """The numbers of all leases that are there, in no order."""
    found = (GENERATION.fullmatch(name) for name in folder.names(FOLDER))
    return [int(match[1]) for match in found if match]


def lease_place(generation: int) -> str:
    """The lease's name inside the run's folder."""
    return f"{FOLDER}/{generation:06d}.json"


def is_superseded(seen: SeenLease, token: str) -> bool:
    """Whether the newest lease is another's than that of `token` (number-nonce).

    A lower number is what remains where somebody deleted the token's file; the token's number with
    a content that nobody can read is its own renewal, torn on its way.
    """
    generation = int(token.partition("-")[0])
    if seen.generation != generation:
        return seen.generation > generation
    return seen.record is not None and f"{generation}-{seen.record.nonce}" != token


def renewed_record(record: LeaseRecord, now: datetime) -> LeaseRecord:
    """The record as its next renewal leaves it."""
    at = now.isoformat(timespec="seconds")
    return record.model_copy(update={"renewals": record.renewals + 1, "renewed_at": at})


def record_bytes(record: LeaseRecord) -> bytes:
    """The content of the file."""
    return record.model_dump_json(indent=1).encode()


def _parsed(raw: bytes) -> LeaseRecord | None:
    try:
        record = LeaseRecord.model_validate_json(raw)
        datetime.fromisoformat(record.renewed_at)
    except (ValidationError, ValueError):
        return None
    return record
