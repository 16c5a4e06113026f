"""How a run ended."""

import json
from pathlib import Path

import pytest

from training.outcome import Outcome, read_outcome, write_outcome
from training.run_folder import open_run_folder

LINES = (
    {"kind": "train", "step": 3, "loss": 2.5},
    {"kind": "evaluation", "step": 3, "eval/ap": 0.25, "eval/ap_small": "nan"},
    {"kind": "train", "step": 4, "loss": 1.5},
    {"kind": "bad_step", "step": 5, "grad_norm": 3.0},
)


@pytest.mark.parametrize(("total", "reason"), [(5, "done"), (9, "stopped_early")])
def test_an_end_is_told_with_the_last_numbers(tmp_path: Path, total: int, reason: str) -> None:
    folder = open_run_folder(str(tmp_path))
    assert read_outcome(folder) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    write_outcome(folder, 5, total, now=lambda: "2026-11-26T04:00:00.000Z")
    expected = Outcome(5, "2026-11-26T04:00:00.000Z", reason, {"eval/ap": 0.25, "loss": 1.5})
    assert read_outcome(folder) == expected


def test_an_end_on_record_stays_as_it_is(tmp_path: Path) -> None:
    folder = open_run_folder(str(tmp_path))
    write_outcome(folder, 5, 5, now=lambda: "first")
    write_outcome(folder, 5, 5, now=lambda: "second")
    assert read_outcome(folder) == Outcome(5, "first", "done")
    write_outcome(folder, 6, 6, now=lambda: "third")
    assert read_outcome(folder) == Outcome(6, "third", "done")


def test_a_foreign_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "finished.json").write_text('{"at": "now"}')
    with pytest.raises(ValueError, match=r"finished\.json is not one of ours .* delete it"):
        read_outcome(open_run_folder(str(tmp_path)))
