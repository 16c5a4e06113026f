"""The news of a run become its history, and starts that come to nothing are counted."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.board import Happening, Message, Stored, Taken
from cluster.witness import Witness
from training.history import Event, History, read_history
from training.metrics import StepRecord
from training.run_folder import RunFolder, open_run_folder

LOST = Happening("worker_lost", "1 worker died: killed", facts={"announced": False})
ANNOUNCED = Happening("worker_lost", "machines went", facts={"announced": True})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_run_folder(str(tmp_path / "run"))


def test_the_first_step_of_each_start_is_told_with_the_steps_that_are_made_again(
    folder: RunFolder,
) -> None:
    seconds = iter([100.0, 107.5, 200.0, 230.0])
    with History(folder) as history:
        witness = Witness(history, 3, clock=lambda: next(seconds))
        witness.see(_taken(_message("a", 0, 0)))
        witness.see(_taken(_message("a", 0, 1)))
        witness.see(_taken(_message("a", 0, 17)))
        witness.see(_taken(None, LOST))
        witness.see(_taken(_message("b", 12, 12)))
        witness.see(_taken(_message("b", 12, 14)))
    first, second = (event for event in read_history(folder) if event.kind == "first_step")
    assert first.facts == {"seconds": 7.5, "start_step": 0, "steps_again": 0}
    assert second.facts == {"seconds": 30.0, "start_step": 12, "steps_again": 5}
    assert second.text == "step 13 is done after 30 s, 5 steps are made a second time"
    assert second.step == 14


def test_starts_that_come_to_no_new_checkpoint_are_counted_and_then_given_up(
    folder: RunFolder,
) -> None:
    said: list[str] = []
    with History(folder) as history:
        witness = Witness(history, 2, said.append)
        assert witness.see(_taken(None, LOST)) is None
        assert witness.see(_taken(None, LOST)) is None
        assert witness.see(_taken(None, LOST, stored=1)) is None
        assert witness.see(_taken(None, LOST, stored=1)) is None
        assert witness.see(_taken(None, ANNOUNCED, stored=1)) is None
        reason = witness.see(_taken(None, LOST, stored=1))
    assert reason is not None
    assert reason.startswith("1 worker died: killed (")
    assert "resources.max_restarts allows 2" in reason
    counted = [event.facts["in_vain"] for event in _of(folder, "restarting")]
    assert counted == [1, 2, 1, 2, 2]
    assert said[:2] == [
        "worker lost: 1 worker died: killed",
        "restarting: from the newest checkpoint, 1 of 2 starts without a new one",
    ]


def test_bad_steps_and_uploads_are_told_once_as_they_grow(folder: RunFolder) -> None:
    with History(folder) as history:
        witness = Witness(history, 3)
        for step, bad, failed in ((1, 0, 0), (2, 1, 0), (3, 1, 2), (4, 1, 2)):
            witness.see(_taken(_message("a", 0, step, _record(step, bad, failed))))
    assert [(event.step, event.facts) for event in _of(folder, "bad_step")] == [(2, {"count": 1})]
    assert [(event.step, event.facts) for event in _of(folder, "upload_failed")] == [
        (3, {"count": 2})
    ]


def _of(folder: RunFolder, kind: str) -> Iterator[Event]:
    return (event for event in read_history(folder) if event.kind == kind)


def _taken(message: Message | None, *happenings: Happening, stored: int = 0) -> Taken:
    return Taken(message, happenings, Stored(stored, stored), None)


def _message(attempt: str, start: int, step: int, record: StepRecord | None = None) -> Message:
    return Message(attempt, start, 100, step, record)


def _record(step: int, bad: int, failed: int) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0.5,
        pictures=step,
        losses={"total": 1.0},
        rates={"all": 1e-4},
        grad_norm=1.0,
        pictures_per_s=1.0,
        wait_share=0.0,
        memory_gib=1.0,
        seconds_left=1.0,
        bad_steps=bad,
        counters={"uploads_failed": float(failed)},
    )
