"""The record of a run and what a person sees of it."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.stumbling_store import Moods, stumbling_folder
from training.metrics import BadStep, Journal, StepRecord, read_metrics
from training.progress import Bar, PlainLines, duration, open_display
from training.run_folder import RunFolder, open_run_folder
from training.uploads import Uploads

RECORD = StepRecord(
    step=20,
    epoch=0.4,
    pictures=640,
    losses={"total": 3.5, "boxes": 0.5},
    rates={"backbone": 1e-5, "rest": 1e-4},
    grad_norm=12.0,
    pictures_per_s=171.2,
    wait_share=0.034,
    memory_gib=10.26,
    seconds_left=93784.0,
)


def journal_from(folder: RunFolder, uploads: Uploads, start_step: int) -> Journal:
    return Journal(folder, uploads, start_step, clock=lambda: 0.0)


@pytest.fixture(params=["local", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    if request.param == "local":
        return open_run_folder(str(tmp_path / "run"))
    return stumbling_folder(Moods())


def test_a_line_holds_all_numbers_of_its_steps(folder: RunFolder) -> None:
    uploads = Uploads()
    journal = journal_from(folder, uploads, 0)
    journal.write_steps(
        replace(RECORD, skipped=2, skipped_keys=("a", "b"), counters={"retries": 3})
    )
    journal.write_evaluation(20, {"eval/ap": 0.25})
    journal.write_bad_step(BadStep(21, float("inf"), (1.5, float("nan")), (("a",), ("b", "c"))))
    journal.close()
    lines = folder.read("metrics.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "kind": "train",
            "step": 20,
            "epoch": 0.4,
            "loss": 3.5,
            "loss/boxes": 0.5,
            "lr/backbone": 1e-5,
            "lr/rest": 1e-4,
            "grad_norm": 12.0,
            "pictures": 640,
            "pictures_per_s": 171.2,
            "wait_share": 0.034,
            "memory_gib": 10.26,
            "skipped": 2,
            "bad_steps": 0,
            "retries": 3,
            "skipped_keys": ["a", "b"],
        },
        {"kind": "evaluation", "step": 20, "eval/ap": 0.25},
        {
            "kind": "bad_step",
            "step": 21,
            "grad_norm": "inf",
            "losses": [1.5, "nan"],
            "keys": [["a"], ["b", "c"]],
        },
    ]
    assert uploads.failures == 0


def recorded_steps(folder: RunFolder) -> list[object]:
    return [(line["kind"], line["step"]) for line in read_metrics(folder)]


def test_a_resumed_record_is_one_continuous_story(folder: RunFolder) -> None:
    uploads = Uploads()
    first = journal_from(folder, uploads, 0)
    for step in (10, 20, 30):
        first.write_steps(replace(RECORD, step=step))
        first.write_evaluation(step, {"eval/ap": 0.1})
    first.close()
    second = journal_from(folder, uploads, 20)
    second.write_steps(replace(RECORD, step=25))
    second.close()
    assert recorded_steps(folder) == [
        ("train", 10),
        ("evaluation", 10),
        ("train", 20),
        ("evaluation", 20),
        ("train", 25),
    ]
    third = journal_from(folder, uploads, 0)  # no checkpoint was whole: from the start
    third.close()
    assert recorded_steps(folder) == []


def test_tensorboard_shows_one_curve_over_both_starts(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    uploads = Uploads()
    for start, steps in ((0, (10, 20, 30)), (20, (25, 35))):
        journal = journal_from(folder, uploads, start)
        for step in steps:
            journal.write_steps(replace(RECORD, step=step))
        journal.close()
    curves = EventAccumulator(str(tmp_path / "events"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("loss")] == [10, 20, 25, 35]
    assert "lr/rest" in curves.Tags()["scalars"]


def test_a_line_that_was_cut_by_a_kill_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_run_folder(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 5}\n{"kind": "tra')
    journal_from(folder, Uploads(), 5).close()
    assert recorded_steps(folder) == [("train", 5)]
    assert 'metrics.jsonl: leaving out a line that was cut: {"kind": "tra' in caplog.text


def test_a_store_gets_the_record_at_checkpoints_and_once_a_minute() -> None:
    folder = stumbling_folder(Moods())
    uploads = Uploads()
    now = [0.0]
    journal = Journal(folder, uploads, 0, clock=lambda: now[0])
    journal.write_evaluation(1, {})
    uploads.flush()
    assert recorded_steps(folder) == []
    journal.publish()
    uploads.flush()
    assert len(recorded_steps(folder)) == 1
    now[0] = 59.0
    journal.write_evaluation(2, {})
    uploads.flush()
    assert len(recorded_steps(folder)) == 1
    now[0] = 60.0
    journal.write_evaluation(3, {})
    uploads.flush()
    assert len(recorded_steps(folder)) == 3
    journal.close()
    assert len(folder.names("events")) == 1


def test_a_store_that_is_down_costs_the_record_nothing(caplog: pytest.LogCaptureFixture) -> None:
    moods = Moods(fail_puts=3)
    folder = stumbling_folder(moods)
    uploads = Uploads()
    journal = journal_from(folder, uploads, 0)
    journal.write_evaluation(1, {})
    journal.publish()
    uploads.flush()
    assert (uploads.failures, recorded_steps(folder)) == (1, [])
    assert "the record of the run was not stored" in caplog.text
    journal.close()
    assert len(recorded_steps(folder)) == 1


def test_away_from_a_terminal_a_record_is_one_plain_line() -> None:
    out = io.StringIO()
    console = Console(file=out, width=40)
    display = open_display(console, 0, 5004)
    assert isinstance(display, PlainLines)
    with display:
        display.advance(7)
        display.show(RECORD)
        display.show(replace(RECORD, skipped=2, bad_steps=1, seconds_left=7.4))
        display.note("evaluation at step 20: ap 0.3 [bold]")
    assert out.getvalue().splitlines() == [
        "step 20/5004  epoch 0.40  loss 3.5  lr 0.0001  171.2 pictures/s  waiting 3%  10.3 GiB  "
        "left 1d 02:03:04",
        "step 20/5004  epoch 0.40  loss 3.5  lr 0.0001  171.2 pictures/s  waiting 3%  10.3 GiB  "
        "left 00:00:07  skipped 2  bad steps 1",
        "evaluation at step 20: ap 0.3 [bold]",
    ]


def test_on_a_terminal_a_bar_stands_below_the_notes() -> None:
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True, color_system=None)
    display = open_display(console, 10, 40)
    assert isinstance(display, Bar)
    with display:
        display.advance(20)
        display.show(RECORD)
        display.note("a note")
    text = out.getvalue()
    assert "a note" in text
    assert "20/40" in text
    assert "waiting 3%" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "00:00:00"), (59.6, "00:01:00"), (360000.0, "4d 04:00:00")]
)
def test_durations_are_days_and_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_nothing_below_the_front_door_logs_at_warning_in_a_good_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        journal_from(open_run_folder(str(tmp_path)), Uploads(), 0).close()
    assert caplog.records == []
