"""Loader processes: dying, being left alone, ending with the training process, memory."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from data.index import ShardIndex
from data.loader import StreamSettings
from data.loader_processes import LoaderDied
from data.patch_content import PatchContent
from data.stream import ExactStream
from tests.data.streams import SMALL_PATCHES, source_of
from tests.data.tars import write_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("shards"), (17, 3, 21))


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def test_a_loader_process_that_dies_is_one_clear_error(index: ShardIndex) -> None:
    stream = ExactStream(source_of(index), StreamSettings(processes=2))
    with closing(stream.from_step(0)) as batches:
        next(batches)
        victim = multiprocessing.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LoaderDied, match=r"a loader process died .* then resume"):
            list(islice(batches, 100))


def test_loader_processes_outlive_the_ctrl_c_that_asks_a_run_to_stop(index: ShardIndex) -> None:
    stream = ExactStream(source_of(index), StreamSettings(processes=2))
    with closing(stream.from_step(0)) as batches:
        next(batches)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGINT)
        assert [batch.step for batch in islice(batches, 20)] == list(range(1, 21))


def test_an_interrupted_loop_leaves_no_process(index: ShardIndex) -> None:
    stream = ExactStream(source_of(index), StreamSettings(processes=2))

    def train() -> None:
        for batch in stream.from_step(0):
            assert multiprocessing.active_children()
            if batch.step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    # The last reference to the iterator went with the frame of `train`.


def test_loader_processes_end_when_the_training_process_is_killed(
    index: ShardIndex, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(KILLED_SCRIPT.format(url=index.url))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    training = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert training.stdout is not None
    loaders = [int(pid) for pid in training.stdout.readline().split()]
    assert len(loaders) == 2
    training.kill()
    training.wait()
    training.stdout.close()
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(is_alive(pid) for pid in loaders)


@pytest.mark.slow
def test_the_memory_of_a_loader_process_is_flat_over_5000_samples(tmp_path: Path) -> None:
    index = write_shards(tmp_path, (250, 250))
    source = source_of(index, content=PatchContent(10, SMALL_PATCHES), global_batch=20)
    stream = ExactStream(source, StreamSettings(processes=1))
    resident = []
    with closing(stream.from_step(0)) as batches:
        for step, _ in enumerate(islice(batches, 250)):
            if step % 25 == 24:
                resident.append(resident_mb(multiprocessing.active_children()[0].pid))
    assert max(resident[5:]) < max(resident[1:5]) + 5


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def resident_mb(pid: int | None) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


KILLED_SCRIPT = """
import multiprocessing, time
from pathlib import Path
from data.loader import StreamSettings
from data.stream import ExactStream
from tests.data.streams import source_of
from tests.data.tars import write_shards

if __name__ == "__main__":
    index = write_shards(Path({url!r}).parent / "killed", (30,))
    batches = ExactStream(source_of(index), StreamSettings(processes=2)).from_step(0)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(60)
"""
