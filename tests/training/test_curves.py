"""Learning curves of runs side by side."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training.curves import Curve, draw_runs, read_curve
from training.run_folder import open_run_folder


def run_with(place: Path, *lines: dict[str, object]) -> str:
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(place)


def test_a_curve_is_a_number_of_the_record_in_order(tmp_path: Path) -> None:
    url = run_with(
        tmp_path / "a",
        {"kind": "evaluation", "step": 0, "eval/ap": 0.0},
        {"kind": "train", "step": 2, "loss": 3.5},
        {"kind": "evaluation", "step": 4, "eval/ap": 0.25},
    )
    assert read_curve(open_run_folder(url), "eval/ap") == Curve((0.0, 4.0), (0.0, 0.25))


def test_runs_are_drawn_in_one_panel_for_each_number(tmp_path: Path) -> None:
    line = {"kind": "evaluation", "step": 4, "eval/ap": 0.25, "eval/ap50": 0.5}
    urls = [run_with(tmp_path / name / "run", line) for name in ("with", "without")]
    draw_runs(urls, ["eval/ap", "eval/ap50"], tmp_path / "one" / "curves.png")
    with Image.open(tmp_path / "one" / "curves.png") as picture:
        assert picture.width > picture.height > 200


def test_a_number_that_no_run_has_is_named_with_those_there_are(tmp_path: Path) -> None:
    url = run_with(tmp_path / "a", {"kind": "evaluation", "step": 4, "eval/ap": 0.25})
    with pytest.raises(ValueError, match=r"no run has the number 'eval/app'; they have eval/ap"):
        draw_runs([url], ["eval/app"], tmp_path / "curves.png")


def test_a_folder_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing has no record of a run"):
        draw_runs([str(tmp_path / "nothing")], ["loss"], tmp_path / "curves.png")
