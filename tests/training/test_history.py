"""What happened to a run: written by one, read by anybody, whatever the store does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.stumbling_store import Moods, stumbling_folder
from training.history import Event, History, read_history
from training.moments import seconds_between, utc_now
from training.run_folder import open_run_folder


def _clock() -> Iterator[str]:
    for second in range(60):
        yield f"2026-11-26T04:00:{second:02d}.000Z"


def test_events_of_all_starts_are_read_in_order(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path / "run"))
    assert read_history(folder) == ()
    clock = _clock()
    for workers in (2, 1):
        with History(folder, now=lambda: next(clock)) as history:
            history.add("workers", f"{workers} workers", step=4, count=workers)
            history.add("finished", "done")
    assert read_history(folder) == (
        Event("2026-11-26T04:00:01.000Z", "workers", "2 workers", 4, {"count": 2}),
        Event("2026-11-26T04:00:02.000Z", "finished", "done"),
        Event("2026-11-26T04:00:04.000Z", "workers", "1 workers", 4, {"count": 1}),
        Event("2026-11-26T04:00:05.000Z", "finished", "done"),
    )
    assert len(list((tmp_path / "run/history").iterdir())) == 2


def test_what_a_store_did_not_take_is_written_with_the_next_event(
    caplog: pytest.LogCaptureFixture,
) -> None:
    moods = Moods(fail_puts=3)
    folder = stumbling_folder(moods)
    history = History(folder)
    history.add("started", "one")
    while moods.fail_puts:
        pass
    assert read_history(folder) == ()
    history.add("workers", "two")
    history.close()
    assert [event.text for event in read_history(folder)] == ["one", "two"]
    assert "waits for the next event" in caplog.text


def test_a_history_that_cannot_be_written_ends_in_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = stumbling_folder(Moods(fail_puts=1000))
    with History(folder) as history:
        history.add("started", "one")
    assert "1 events are not in stumbling://run/history/" in caplog.text


def test_a_line_that_is_no_event_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_run_folder(str(tmp_path))
    good = json.dumps({"at": utc_now(), "kind": "told_later", "text": "x"})
    folder.write("history/2026.jsonl", f'{good}\n{{"at": 1}}\n{{"a\n'.encode())
    assert [event.kind for event in read_history(folder)] == ["told_later"]
    assert caplog.text.count("leaving out a line") == 2


def test_seconds_between_two_moments_have_a_sign() -> None:
    earlier, later = "2026-11-26T23:59:59.500Z", "2026-11-27T00:00:01.000Z"
    assert seconds_between(earlier, later) == 1.5
    assert seconds_between(later, earlier) == -1.5
