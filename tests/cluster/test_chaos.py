"""Chaos: schedules are pure, the store fails as told, runs under faults end as calm ones do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.chaos.campaign import (
    Bench,
    open_bench,
    run_schedule,
    summary,
    taken_over,
    verdict_lines,
)
from cluster.chaos.check import Course, Differs, check_equal, check_same_batches, distance
from cluster.chaos.group import Ended
from cluster.chaos.schedule import (
    Attempt,
    Fault,
    Hang,
    Kill,
    KillAtFile,
    Rival,
    Schedule,
    StoreAway,
    StoreStumbles,
    Terminate,
    draw_ray_schedule,
    draw_schedule,
    fault_line,
    schedule_lines,
)
from cluster.chaos.store import ChaosFileSystem, Weather
from cluster.chaos.through_ray import _ended
from training.run_folder import Patience, StoreError, open_run_folder
from training.snapshot import Position, Snapshot


def test_a_schedule_is_a_pure_function_of_seed_and_number() -> None:
    again = [draw_schedule(1, number) for number in range(1, 40)]
    assert again == [draw_schedule(1, number) for number in range(1, 40)]
    assert len({str(schedule.attempts) for schedule in again}) == 39
    assert draw_schedule(2, 1) != draw_schedule(1, 1)


def test_two_hundred_schedules_hold_every_kind_of_fault_and_tell_of_each() -> None:
    schedules = [draw_schedule(1, number) for number in range(1, 201)]
    faults = [fault for s in schedules for a in s.attempts for fault in a.faults]
    assert {type(fault) for fault in faults} == set(Fault.__args__)
    assert all(fault_line(fault) for fault in faults)
    assert {s.store for s in schedules} == {"disk", "objects"}
    assert {a.workers for s in schedules for a in s.attempts} == {1, 2, 3}
    assert {a.machine for s in schedules for a in s.attempts} == {0, 1}
    changing = [s for s in schedules if len({a.workers for a in s.attempts}) > 1]
    assert 20 < len(changing) < 180
    assert schedule_lines(schedules[0])[0].startswith("schedule 1 of seed 1: run ")


def test_schedules_through_ray_end_with_a_job_that_meets_nothing() -> None:
    schedules = [draw_ray_schedule(1, number) for number in range(1, 60)]
    faults = [fault for s in schedules for a in s.attempts for fault in a.faults]
    assert {type(fault) for fault in faults} == {Kill, KillAtFile, Terminate, Hang}
    assert all(not s.attempts[-1].faults for s in schedules)
    assert {s.store for s in schedules} == {"disk"}


@pytest.mark.parametrize(
    ("away_s", "refused", "allowed"),
    [(2.0, "taken over by another", True), (2.0, None, False), (0.3, "taken over", False)],
)
def test_only_who_was_cut_off_as_long_as_a_lease_lives_and_gave_way_may_be_followed(
    away_s: float, refused: str | None, allowed: bool
) -> None:
    ended = Ended(1, "finished", 7, ((),), None, (), (), refused, (), Path("log.txt"))
    attempt = Attempt(1, faults=(Rival(0), StoreAway(2, away_s)))
    assert taken_over(attempt, ended) is allowed
    assert not taken_over(Attempt(1, faults=(Rival(0),)), ended)


def test_what_became_of_a_job_is_told_by_the_notes_of_each_start_of_its_workers(
    tmp_path: Path,
) -> None:
    note = '{"step": %d, "keys": [], "skipped": [], "at": 1.0}'
    for start, steps in (("start-1", range(3)), ("start-2", range(2, 6))):
        (tmp_path / start).mkdir()
        (tmp_path / start / "rank-0.jsonl").write_text("\n".join(note % step for step in steps))
    starts = sorted(tmp_path.iterdir())
    first, last = _ended(starts, 0, Path("log.txt"), 6)
    assert (first.ending, first.step) == ("lost", None)
    assert (last.ending, last.step) == ("finished", 6)


@pytest.fixture
def weather(monkeypatch: pytest.MonkeyPatch) -> Weather:
    """Of the store, for this test alone."""
    weather = Weather(key=3)
    monkeypatch.setattr(ChaosFileSystem, "weather", weather)
    return weather


def test_a_run_folder_in_a_stumbling_store_is_whole_in_the_end(
    tmp_path: Path, weather: Weather
) -> None:
    folder = open_run_folder(f"chaos://{tmp_path}/run", patience=Patience(20, 0.0))
    weather.stumbling = weather.torn = 0.4
    weather.tells_torn = False
    for number in range(10):
        folder.write(f"a/{number}", bytes([number]) * 9)
    assert folder.names("a") == [str(number) for number in range(10)]
    assert [folder.read(f"a/{number}") for number in range(10)] == [
        bytes([number]) * 9 for number in range(10)
    ]
    assert sum(weather.asked.values()) > 60, "nothing had to be asked again"


def test_what_fails_depends_on_the_request_alone(tmp_path: Path) -> None:
    one, other = Weather(key=3), Weather(key=3)
    other.dice("read", f"{tmp_path}/b/c")
    assert one.dice("read", "/a/b/d") == other.dice("read", f"{tmp_path}/b/d")
    assert one.dice("read", "/a/b/d") != Weather(key=3).dice("read", "/a/b/d")


def test_a_store_that_is_away_answers_nothing(tmp_path: Path, weather: Weather) -> None:
    folder = open_run_folder(f"chaos://{tmp_path}/run", patience=Patience(2, 0.0))
    weather.away_until = float("inf")
    with pytest.raises(StoreError, match="the store is away"):
        folder.write("a", b"1")
    assert not (tmp_path / "run").exists()


def _course(**changes: object) -> Course:
    batches = {step: ((f"picture {step}",), ()) for step in range(3)}
    snapshot = Snapshot(
        model={"w": torch.tensor([1.0, 2.0])},
        optimiser={"state": {0: {"step": torch.tensor(3.0)}}},
        ema={"w": torch.tensor([0.5, 1.5])},
        position=Position(step=3),
        world_size=2,
    )
    record = tuple(("train", step, f"{step}.5") for step in (1, 2, 3))
    return replace(Course(batches, (2, 2, 2), snapshot, record), **changes)


def _with_state(**changes: object) -> Course:
    return _course(snapshot=replace(_course().snapshot, **changes))


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (_course(batches={0: ((), ()), 1: ((), ())}), "batches: only one of them has 2"),
        (_with_state(model={"w": torch.tensor([1.0, 2.0000002])}), "weights: 1 of 1 differ"),
        (_with_state(optimiser={"state": {0: {"step": torch.tensor(2.0)}}}), "optimiser: 1 of 1"),
        (_with_state(ema={}), "moving average: only one of them has /w"),
        (_with_state(position=Position(step=2)), "position: 1 of"),
        (_course(record=_course().record[1:]), "record: 1 lines are missing"),
        (_course(record=(*_course().record, ("train", 3, "3.5"))), "record: .* comes twice"),
    ],
)
def test_every_difference_from_the_calm_run_is_seen(other: Course, complaint: str) -> None:
    check_equal(_course(), _course(), may_lack=False)
    with pytest.raises(Differs, match=complaint):
        check_equal(other, _course(), may_lack=False)


def test_a_record_may_lack_lines_where_the_store_failed_but_never_hold_others() -> None:
    check_equal(_course(record=_course().record[1:]), _course(), may_lack=True)
    with pytest.raises(Differs, match="record"):
        check_equal(_course(record=(("train", 2, "7.5"),)), _course(), may_lack=True)


def test_the_distance_is_a_share_of_the_way_from_the_first_weights() -> None:
    begin = {"w": torch.tensor([1.0, 0.0])}
    other = _with_state(model={"w": torch.tensor([1.0, 2.02])})
    assert distance(other, _course(), begin) == pytest.approx(0.01, rel=1e-5)
    check_same_batches(other, _course())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return open_bench("chaos_cpu", ["loop.steps=8"], tmp_path_factory.mktemp("chaos"))


@pytest.mark.slow
def test_killed_torn_and_resumed_with_fewer_workers_a_run_ends_as_the_calm_one(
    bench: Bench,
) -> None:
    schedule = Schedule(
        seed=0,
        number=1,
        store="objects",
        loaders=0,
        attempts=(
            Attempt(2, (StoreStumbles(0.05), Kill(1, 4, everybody=False))),
            Attempt(1, (KillAtFile("manifest.json", 1, "half"),), machine=1),
        ),
    )
    verdict = run_schedule(bench, schedule)
    told = "\n".join(verdict_lines(verdict))
    assert verdict.difference is None, told
    assert [ended.ending for ended in verdict.attempts] == ["lost", "lost", "finished"], told
    assert verdict.apart is not None
    assert "1 of 1 schedules are equal" in summary([verdict])


@pytest.mark.slow
def test_a_run_that_is_not_the_calm_one_is_found_out(bench: Bench) -> None:
    schedule = Schedule(0, 2, "disk", 0, (Attempt(1, (Kill(0, 3, everybody=True),)),))
    other = replace(bench, values={**bench.values, "seed": 43}, calm={}, out=bench.out / "other")
    assert run_schedule(other, schedule).difference is None
    mixed = replace(bench, calm=other.calm)
    verdict = run_schedule(mixed, schedule)
    assert verdict.difference is not None
    assert verdict.difference.startswith("batches: ")
