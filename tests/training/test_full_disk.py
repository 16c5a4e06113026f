"""A disk that is full for a while: the record, the curves, small files, checkpoints."""

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.small import CPU, small_state
from training.appending import LineFile
from training.checkpoint import list_checkpoints
from training.checkpoint_writer import CheckpointWriter
from training.metrics import Journal, read_metrics
from training.retention import RetentionSettings
from training.run_folder import Patience, RunFolder, StoreError, open_run_folder
from training.snapshot import Position
from training.uploads import Uploads
from training.world import World

MIB = 1 << 20


@dataclass(frozen=True)
class Disk:
    """A small disk of its own."""

    place: Path

    def fill(self) -> None:
        """Leaves nothing."""
        with (self.place / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return

    def make_room(self) -> None:
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """8 MiB; the test skips where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no small disk here: only root may mount one")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def run_on(disk: Disk) -> RunFolder:
    return open_run_folder(str(disk.place / "run"), patience=Patience(2, backoff_s=0.0))


def test_lines_wait_in_memory_for_room(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    lines = LineFile(disk.place / "lines")
    lines.add("before")
    disk.fill()
    # What fits into the last page is taken, the rest of a line included.
    for number in range(30):
        lines.add(f"{number} " + "." * 500)
    assert len([r for r in caplog.records if "lines wait in memory" in r.getMessage()]) == 1
    disk.make_room()
    lines.add("after")
    lines.close()
    text = (disk.place / "lines").read_text().splitlines()
    assert [line.split()[0] for line in text] == ["before", *map(str, range(30)), "after"]


def test_lines_that_are_lost_at_the_end_are_told(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    lines = LineFile(disk.place / "lines")
    disk.fill()
    lines.add("." * 9000)
    lines.close()
    assert caplog.records[-1].levelno == logging.ERROR
    assert "the disk did not take the last" in caplog.text


def points_in(file: Path) -> list[int]:
    """Steps of one file of curves: those of one second have no order that their names tell."""
    curves = EventAccumulator(str(file))
    curves.Reload()
    known = curves.Tags()["scalars"]
    return [e.step for e in curves.Scalars("eval/metric7")] if "eval/metric7" in known else []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_on_a_full_disk_goes_on_and_stores_when_there_is_room(disk: Disk) -> None:
    folder = run_on(disk)
    uploads = Uploads()
    journal = Journal(folder, uploads, 0, clock=lambda: 0.0)
    settings = RetentionSettings(keep_last=2)
    writer = CheckpointWriter(folder, uploads, settings, World.alone(CPU), "digest")
    state = small_state()

    def step(number: int) -> None:
        journal.write_evaluation(number, {f"eval/metric{i}": 0.1 for i in range(100)})
        journal.publish()
        writer.save(state, Position(step=number), {})
        writer.flush()

    step(1)
    disk.fill()
    for number in (2, 3, 4):
        step(number)
    with pytest.raises(StoreError, match="No space left on device"):
        folder.write("control/x", b"1" * 9000)
    assert uploads.failures == 3
    assert [manifest.step for manifest in list_checkpoints(folder)] == [1]
    assert not list((disk.place / "run").rglob(".writing-*"))
    disk.make_room()
    for number in (5, 6):
        step(number)
    writer.finish()
    journal.close()
    uploads.close()
    assert [manifest.step for manifest in list_checkpoints(folder)] == [6, 5]
    assert [line["step"] for line in read_metrics(folder)] == [1, 2, 3, 4, 5, 6]
    points = [step for file in (disk.place / "run/events").iterdir() for step in points_in(file)]
    assert (min(points), max(points)) == (1, 6)
    for line in (disk.place / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line)
