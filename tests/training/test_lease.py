"""One writer per run: who gets the lease, who is refused, and who learns that it was lost."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.ceph import ceph_store
from tests.servers import S3Store
from tests.training.stumbling_store import Moods, stumbling_folder
from training.lease import (
    Holder,
    Lease,
    LeaseHeld,
    LeaseLost,
    LeaseSettings,
    check_held,
    read_lease,
    take_lease,
    this_process,
)
from training.lease_file import newest_lease
from training.run_folder import RunFolder, StoreError, open_run_folder

__all__ = ["ceph_store"]

ME, OTHER = Holder("a", "one", 1, "boot-1"), Holder("b", "two", 1, "boot-2")
QUICK = LeaseSettings(ttl_s=30, renew_every_s=5, settle_s=0)
NOW = datetime(2026, 11, 26, 4, tzinfo=UTC)


@dataclass
class Time:
    """A clock that only sleeping moves; `meanwhile` is what others do in that time."""

    now_s: float = 100.0
    meanwhile: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()


def take(folder: RunFolder, holder: Holder, time: Time | None = None) -> Lease:
    time = time or Time()
    return take_lease(folder, holder, QUICK, time, time.sleep, now=lambda: NOW)


@pytest.fixture(params=["disk", "memory", "rclone", pytest.param("ceph", marks=pytest.mark.long)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A run on a disk, in memory, in a store without conditional writes, and in one with them."""
    match request.param:
        case "disk":
            return open_run_folder(str(tmp_path / "run"))
        case "memory":
            return stumbling_folder(Moods())
        case _:
            name = "s3_store" if request.param == "rclone" else "ceph_store"
            store: S3Store = request.getfixturevalue(name)
            url = f"{store.url}/{request.node.originalname}"
            return open_run_folder(url, store.storage_options)


def test_a_second_job_is_refused_until_the_first_lets_go(folder: RunFolder) -> None:
    assert read_lease(folder) is None
    first = take(folder, ME)
    time = Time(meanwhile=first.renew)
    with pytest.raises(LeaseHeld, match=r"is being written by job a on one .*querypatch stop"):
        take(folder, OTHER, time)
    assert time.now_s - 100 <= 5
    assert first.lost() is None
    first.release()
    assert take(folder, OTHER, time).lost() is None
    state = read_lease(folder, now=lambda: NOW + timedelta(seconds=7))
    assert state is not None
    assert (state.holder, state.generation, state.age_s, state.is_released) == (OTHER, 2, 7, False)
    assert folder.names("lease") == ["000002.json"]


def test_a_holder_without_a_sign_of_life_is_watched_for_its_ttl(folder: RunFolder) -> None:
    left = take(folder, ME)
    time, said = Time(), list[str]()
    taken = take_lease(folder, OTHER, QUICK, time, time.sleep, said.append, now=lambda: NOW)
    assert 30 <= time.now_s - 100 <= 31 + 3
    assert len(said) == 1
    assert "watching for 30 s" in said[0]
    left.renew()
    assert left.lost() == (
        f"{folder.url} was taken over by job b on two while this job could not renew its lease; "
        "this one ends and writes nothing more"
    )
    left.release()  # says nothing any more
    with pytest.raises(LeaseLost, match="taken over by job b"):
        check_held(folder, left.token)
    check_held(folder, taken.token)
    taken.renew()
    assert taken.lost() is None


def test_a_dead_process_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    me = this_process("c")
    take(folder, replace(me, pid=gone.pid, job="dead"))
    time = Time()
    taken = take(folder, me, time)
    assert time.now_s == 100
    # This process lives: nothing but a watch can tell whether the lease is still kept.
    time.meanwhile = taken.renew
    with pytest.raises(LeaseHeld):
        take(folder, me, time)


def test_the_same_number_on_another_machine_is_another_process(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    first = take(folder, replace(this_process("a"), pid=gone.pid, host="elsewhere"))
    with pytest.raises(LeaseHeld):
        take(folder, this_process("b"), Time(meanwhile=first.renew))


def test_clocks_that_differ_by_minutes_do_not_end_a_lease(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    first = take(folder, ME)
    late, hours = Time(meanwhile=first.renew), Time()
    with pytest.raises(LeaseHeld):
        take_lease(folder, OTHER, QUICK, late, late.sleep, now=lambda: NOW + timedelta(minutes=10))
    day = NOW + timedelta(days=1)
    take_lease(folder, OTHER, QUICK, hours, hours.sleep, now=lambda: day)
    assert hours.now_s == 100


def test_a_store_that_stumbles_in_the_watch_starts_it_anew() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    take(folder, ME)
    time = Time()

    def slow_once() -> None:
        if 110 < time.now_s < 120:
            time.now_s += 20

    moods.before_read = slow_once
    take(folder, OTHER, time)
    assert time.now_s - 100 >= 20 + 10 + 30


def test_a_holder_that_cannot_reach_the_store_keeps_its_lease() -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    lease = take(folder, ME)
    moods.fail_puts = 1
    with pytest.raises(StoreError):
        lease.renew()
    assert lease.lost() is None
    lease.renew()
    check_held(folder, lease.token)


def test_a_lease_that_somebody_deleted_comes_back(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    lease = take(folder, ME)
    folder.delete("lease/000001.json")
    check_held(folder, lease.token)
    lease.renew()
    check_held(folder, lease.token)
    assert folder.names("lease") == ["000001.json"]


@pytest.mark.parametrize("store", ["honours", "ignores"])
def test_of_two_at_the_same_moment_one_wins(store: str) -> None:
    """The second one writes between the first one's look and its own write."""
    moods = Moods(ignores_conditions=store == "ignores")
    folder = stumbling_folder(moods)
    others = list[Lease]()

    def sneak() -> None:
        moods.before_put = lambda: None
        others.append(take(folder, OTHER))

    moods.before_put = sneak
    try:
        mine: Lease | None = take(folder, ME)
    except LeaseHeld:
        mine = None
    held = [lease for lease in (mine, *others) if lease is not None]
    for lease in held:
        lease.renew()
    assert [lease.lost() is None for lease in held].count(True) == 1


def test_who_comes_too_late_with_a_low_number_is_refused(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    for holder in (ME, OTHER, ME):
        last = take(folder, holder)
        last.release()
    last = take(folder, OTHER)
    folder.write("lease/000002.json", newest_lease(folder).raw)  # type: ignore[union-attr]
    last.renew()
    assert last.lost() is None


def test_a_file_that_is_none_of_ours_is_watched_too(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    folder.write("lease/000001.json", b"{ half")
    assert read_lease(folder) is None
    time = Time()
    take(folder, ME, time)
    assert time.now_s >= 130


def test_it_is_renewed_in_the_background_and_given_back(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    quick = LeaseSettings(ttl_s=5, renew_every_s=0.02)
    with take_lease(folder, this_process("a"), quick) as lease:
        first = newest_lease(folder)
        end = threading.Event()
        for _ in range(200):
            end.wait(0.02)
            if (newest_lease(folder) or first) != first:
                break
        assert newest_lease(folder) != first
        assert lease.lost() is None
    state = read_lease(folder)
    assert state is not None
    assert state.is_released
    assert not any(thread.name == "lease" for thread in threading.enumerate())


def test_of_four_that_start_at_once_one_gets_the_run(tmp_path: Path) -> None:
    quick = LeaseSettings(ttl_s=10, renew_every_s=0.05)
    start, end = threading.Barrier(4), threading.Event()
    told = list[str]()

    def begin(job: str) -> None:
        folder = open_run_folder(str(tmp_path))
        start.wait()
        try:
            with take_lease(folder, this_process(job), quick):
                told.append("taken")
                end.wait(20)
        except LeaseHeld:
            told.append("held")
            if told.count("held") == 3:
                end.set()

    threads = [threading.Thread(target=begin, args=(job,)) for job in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["held", "held", "held", "taken"]


def test_a_renewal_that_was_torn_on_its_way_is_still_the_holders_and_the_next_one_mends_it(
    folder: RunFolder,
) -> None:
    lease = take(folder, ME)
    folder.write("lease/000001.json", b'{"job": "a", "ho')
    check_held(folder, lease.token)
    lease.renew()
    assert lease.lost() is None
    seen = newest_lease(folder)
    assert seen is not None
    assert seen.record is not None


def test_a_store_that_allows_no_deletes_has_leases_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = stumbling_folder(Moods(may_delete=False))
    take(folder, ME).release()
    second = take(folder, OTHER)
    second.renew()
    assert second.lost() is None
    assert folder.names("lease") == ["000001.json", "000002.json"]
    assert "older leases stay: may not delete" in caplog.text


def test_who_wrote_last_in_the_pause_of_a_store_without_conditions_has_it() -> None:
    folder = stumbling_folder(Moods(ignores_conditions=True))
    other = stumbling_folder(Moods(ignores_conditions=True))
    take(other, OTHER)
    theirs = other.read("lease/000001.json")
    settings = LeaseSettings(ttl_s=30, renew_every_s=5, settle_s=2)
    time = Time(meanwhile=lambda: folder.write("lease/000001.json", theirs))
    with pytest.raises(LeaseHeld, match=r"by job b on two \(took it at this moment\)"):
        take_lease(folder, ME, settings, time, time.sleep)
    assert time.now_s == 102


def test_a_store_that_is_away_is_told_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    moods = Moods()
    folder = stumbling_folder(moods)
    settings = LeaseSettings(ttl_s=5, renew_every_s=0.01, settle_s=0)
    with take_lease(folder, this_process("a"), settings) as lease:
        moods.fail_puts = 10**6
        end = threading.Event()
        while moods.fail_puts > 10**6 - 5:
            end.wait(0.01)
        moods.fail_puts = 0
    assert lease.lost() is None
    assert len([text for text in caplog.messages if "the lease was last renewed" in text]) == 1
    state = read_lease(folder)
    assert state is not None
    assert state.is_released
