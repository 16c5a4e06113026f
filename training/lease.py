"""One writer per run: a lease in the run's folder that its holder keeps renewing.

`lease/000003.json` is the third start's. The next start creates the file of the next number, which
a store with conditional writes (S3, GCS, a disk) grants to one alone; where a store ignores the
condition, a pause and a look back decide, and every renewal looks again. A holder that was killed
is known by its process number on the same machine; elsewhere its lease is watched for `ttl_s` on
our own clock, and any renewal ends the watch: no two machines' clocks are compared unless they
would differ by more than a store lets pass. A holder that cannot reach the store goes on, since
nobody else can take the run there either; once it is back it looks before it writes, and where the
run has another holder by then it ends without a word in the folder.
"""

import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field

from models.settings import Settings
from models.urls import public_url
from training.lease_file import (
    LeaseRecord,
    SeenLease,
    is_superseded,
    lease_generations,
    lease_place,
    newest_lease,
    record_bytes,
    renewed_record,
)
from training.run_folder import Patience, RunFolder, StoreError

logger = logging.getLogger(__name__)

SKEW = timedelta(minutes=15)
"""Clocks that differ by more cannot use S3, which refuses their signatures."""


TOLD_EVERY_S = 60.0
"""Seconds between two words about a store that is away."""


class LeaseHeld(ValueError):  # noqa: N818
    """Another job writes to the run, or began to at the same moment."""


class LeaseLost(ValueError):  # noqa: N818
    """The run has another writer by now: nothing of this one may reach the folder any more."""


@dataclass(frozen=True)
class Holder:
    """Who writes to a run."""

    job: str
    host: str
    pid: int
    boot: str
    """Of the machine's start and its space of process numbers, within which `pid` means something;
    empty where the system does not tell."""


def this_process(job: str) -> Holder:
    """This process as the holder of a lease, for the job that is called `job`."""
    return Holder(job, socket.gethostname(), os.getpid(), _boot())


class LeaseSettings(Settings):
    """How a lease is kept."""

    ttl_s: float = Field(default=30, gt=0)
    """Seconds without a renewal after which a lease counts as left behind."""
    renew_every_s: float = Field(default=5, gt=0)
    """Seconds between renewals."""
    settle_s: float = Field(default=2, ge=0)
    """Seconds of the pause in a store that ignores conditions."""


@dataclass(frozen=True)
class LeaseState:
    """A run's newest lease, for those who look on."""

    holder: Holder
    generation: int
    age_s: float
    """Seconds since the last renewal, by the clocks of two machines."""
    is_released: bool
    """Whether nobody writes to the run."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Lease:
    """A lease that was taken: renewed in a thread from `with` on, let go of at its end."""

    def __init__(
        self,
        folder: RunFolder,
        generation: int,
        record: LeaseRecord,
        settings: LeaseSettings,
        now: Callable[[], datetime],
    ) -> None:
        self._folder = folder
        self._generation = generation
        self._record = record
        self._settings = settings
        self._now = now
        self._lost: str | None = None
        self._renewed_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    @property
    def token(self) -> str:
        """What `check_held` knows this lease by, in any process."""
        return f"{self._generation}-{self._record.nonce}"

    def lost(self) -> str | None:
        """Why this lease is no longer ours, in one line; None while it is."""
        return self._lost

    def silent_s(self) -> float:
        """Seconds since the store last took a renewal; above `renew_every_s`, it is away."""
        return time.monotonic() - self._renewed_at

    def renew(self) -> None:
        """Renews the lease now, or learns that it is lost.

        Raises:
            StoreError: the store cannot be reached; the lease is as good as it was.
        """
        if self._lost is not None:
            return
        seen = newest_lease(self._folder)
        if seen is not None and is_superseded(seen, self.token):
            self._lost = _lost_to(self._folder, seen)
            return
        self._record = renewed_record(self._record, self._now())
        self._folder.write(lease_place(self._generation), record_bytes(self._record))
        self._renewed_at = time.monotonic()

    def release(self) -> None:
        """Lets go of the run, so that the next start need not wait; without effect once lost."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._settings.ttl_s)
        if self._lost is not None:
            return
        try:
            check_held(self._folder, self.token)
            freed = renewed_record(self._record, self._now()).model_copy(update={"released": True})
            self._folder.write(lease_place(self._generation), record_bytes(freed))
        except (StoreError, LeaseLost) as error:
            logger.warning("the lease was not given back, the next start waits for it: %s", error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _keep(self) -> None:
        told_at = -math.inf
        while not self._ended.wait(self._settings.renew_every_s) and self._lost is None:
            try:
                self.renew()
                told_at = -math.inf
            except StoreError as error:
                now = time.monotonic()
                if now - told_at >= TOLD_EVERY_S:
                    told_at = now
                    away_s = now - self._renewed_at
                    logger.warning("the lease was last renewed %.0f s ago: %s", away_s, error)
        if self._lost is not None:
            logger.error("%s", self._lost)


def take_lease(
    folder: RunFolder,
    holder: Holder,
    settings: LeaseSettings | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = logger.info,
    now: Callable[[], datetime] = _utc_now,
) -> Lease:
    """The lease of a run, for the one process that will write to it.

    At once where nobody holds it; after `ttl_s` of watching, which `say` is told of, where a holder
    went without letting go.

    Raises:
        LeaseHeld: another job renews it, or took it at this very moment.
        StoreError: the folder cannot be read or written.
    """
    settings = settings or LeaseSettings()
    seen = newest_lease(folder)
    if seen is not None and not _is_free(seen, holder, now()):
        seen = _watched(folder, seen, settings, clock, sleep, say)
    generation = 1 if seen is None else seen.generation + 1
    record = LeaseRecord(
        job=holder.job,
        host=holder.host,
        pid=holder.pid,
        boot=holder.boot,
        nonce=secrets.token_hex(8),
        renewed_at=now().isoformat(timespec="seconds"),
        ttl_s=settings.ttl_s,
    )
    _take(folder, generation, record, settings, sleep)
    try:
        for older in lease_generations(folder):
            if older < generation:
                folder.delete(lease_place(older))
    except StoreError as error:
        logger.warning("older leases stay: %s", error)
    # A renewal that fails is tried again at the next one: it shall not wait in between.
    once = replace(folder, patience=Patience(attempts=1))
    return Lease(once, generation, record, settings, now)


def read_lease(folder: RunFolder, now: Callable[[], datetime] = _utc_now) -> LeaseState | None:
    """The newest lease of a run; None where it never had one.

    Raises:
        StoreError: the folder cannot be read.
    """
    seen = newest_lease(folder)
    if seen is None or seen.record is None:
        return None
    record = seen.record
    age_s = (now() - datetime.fromisoformat(record.renewed_at)).total_seconds()
    return LeaseState(_holder(record), seen.generation, max(0.0, age_s), record.released)


def check_held(folder: RunFolder, token: str) -> None:
    """Asks the store whether the lease of this token is still the run's; before each write.

    Costs a listing and a small read.

    Raises:
        LeaseLost: the run has another writer.
        StoreError: the store cannot be reached.
    """
    seen = newest_lease(folder)
    if seen is not None and is_superseded(seen, token):
        raise LeaseLost(_lost_to(folder, seen))


def _take(
    folder: RunFolder,
    generation: int,
    record: LeaseRecord,
    settings: LeaseSettings,
    sleep: Callable[[float], None],
) -> None:
    data, place = record_bytes(record), lease_place(generation)
    # A refusal may be of our own file: its answer was lost, and the library asked again.
    with suppress(FileExistsError):
        folder.create(place, data)
    _check_taken(folder, data)
    try:
        folder.create(place, data)
    except FileExistsError:
        return
    # The condition was ignored: whoever else is at this writes within the pause, the last one wins.
    sleep(settings.settle_s)
    _check_taken(folder, data)


def _check_taken(folder: RunFolder, data: bytes) -> None:
    seen = newest_lease(folder)
    if seen is None or seen.raw != data:
        raise LeaseHeld(_held_by(folder, seen, "took it at this moment"))


def _is_free(seen: SeenLease, holder: Holder, now: datetime) -> bool:
    """Whether the lease may be taken without a watch."""
    record = seen.record
    if record is None:
        return False
    if record.released:
        return True
    if record.boot and (record.boot, record.host) == (holder.boot, holder.host):
        return not _is_alive(record.pid)
    left = now - datetime.fromisoformat(record.renewed_at)
    return left > SKEW + timedelta(seconds=record.ttl_s)


def _watched(
    folder: RunFolder,
    seen: SeenLease,
    settings: LeaseSettings,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    say: Callable[[str], None],
) -> SeenLease | None:
    """The lease as it was left behind, after a whole `ttl_s` in which the store answered."""
    ttl_s = seen.record.ttl_s if seen.record else settings.ttl_s
    pause_s = min(1.0, ttl_s / 10)
    say(_held_by(folder, seen, f"may still be there; watching for {ttl_s:.0f} s"))
    begin = watched_from = clock()
    while clock() - watched_from < ttl_s:
        sleep(pause_s)
        asked = clock()
        newest = newest_lease(folder)
        if newest is None or (newest.record is not None and newest.record.released):
            return newest
        if newest.raw != seen.raw:
            raise LeaseHeld(_held_by(folder, newest, "renewed just now"))
        if clock() - asked > settings.renew_every_s:
            # The store stumbled, and the holder may have stumbled over it too.
            watched_from = clock()
        if clock() - begin > 10 * ttl_s:
            raise LeaseHeld(_held_by(folder, newest, "the store is too slow to tell"))
    return seen


def _held_by(folder: RunFolder, seen: SeenLease | None, how: str) -> str:
    shown = public_url(folder.url)
    who = "another job"
    if seen is not None and seen.record is not None:
        who = f"job {seen.record.job} on {seen.record.host}"
    return f"{shown} is being written by {who} ({how}); stop it with `querypatch stop {shown}`"


def _lost_to(folder: RunFolder, seen: SeenLease) -> str:
    who = f"job {seen.record.job} on {seen.record.host}" if seen.record else "another job"
    return (
        f"{public_url(folder.url)} was taken over by {who} while this job could not renew its "
        "lease; this one ends and writes nothing more"
    )


def _holder(record: LeaseRecord) -> Holder:
    return Holder(record.job, record.host, record.pid, record.boot)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""
