"""`querypatch data check`: what is printed, and whether the job may start."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from cluster.commands.labelled_sets import check_data
from tests.data.labelled_files import box, image, write_json


def _console() -> Console:
    return Console(file=StringIO(), width=60)


def _text(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_whole_set_is_described_and_passes(tmp_path: Path) -> None:
    images = [image(1, "a.jpg"), image(2, "b.jpg")]
    path = write_json(tmp_path / "a.json", images, [box(1, 2, 4, (1, 1, 2, 2))], {4: "bee"})
    console = _console()
    assert check_data(str(path), None, None, console)
    text = _text(console)
    assert f"{path}: 2 pictures, read as coco" in text
    assert "1 boxes of 1 classes: 1 small, 0 medium, 0 large; 0 crowds, 0 difficult" in text
    assert "1 pictures without boxes; at most 1 objects in one (b.jpg)" in text
    assert f"{path}: no fault" in text


def test_faults_are_told_by_kind_and_all_written_down(tmp_path: Path) -> None:
    entries = [box(n, 1, 4, (1, 1, 2, -2)) for n in range(12)] + [box(20, 1, 4, (1, 1, 9, 2))]
    path = write_json(tmp_path / "a.json", [image(1, "a.jpg")], entries, {4: "bee"})
    console = _console()
    assert not check_data(str(path), "coco", None, console, out=tmp_path / "faults.txt")
    text = _text(console)
    assert "error, negative size: 12\n  a.jpg, annotation 0 (bee): box (1, 1, 3, -1)" in text
    assert "  ... and 2 more" in text
    assert "warning, box outside: 1" in text
    assert f"{path}: 12 errors, 1 warnings" in text
    assert len((tmp_path / "faults.txt").read_text().splitlines()) == 13


def test_a_warning_alone_lets_the_job_start(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "a.json", [image(1, "a.jpg")], [box(1, 1, 4, (1, 1, 9, 2))], {4: "bee"}
    )
    assert check_data(str(path), None, None, _console())


def test_labels_that_a_foreign_head_would_learn_as_background_are_errors(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "a.json", [image(1, "a.jpg")], [box(1, 1, 4, (1, 1, 9, 2))], {4: "bee", 9: "ant"}
    )
    console = _console()
    assert check_data(str(path), None, None, console, num_classes=2)
    assert not check_data(str(path), None, None, console, num_classes=1)
    assert "class ant (label 1)" in _text(console)
