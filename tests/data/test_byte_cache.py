"""The cache of a node: shared by its processes, bounded, emptied by age."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

from data.byte_cache import ByteCache

PIECE = 50_000
LIMIT = 20 * PIECE


def piece(number: int) -> bytes:
    """What belongs under a key: another byte for each."""
    return bytes([number % 251]) * PIECE


def key(number: int) -> str:
    """Fit to be a file name."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def use(folder: str, seed: int, answers: "multiprocessing.Queue[int]") -> None:
    """Gets and puts more pieces than fit, in an order of its own; answers with the wrong ones."""
    cache = ByteCache(Path(folder), LIMIT)
    wrong = 0
    for turn in range(300):
        number = (turn * (2 * seed + 3)) % 41
        found = cache.get(key(number))
        wrong += found is not None and found != piece(number)
        if found is None:
            cache.put(key(number), piece(number))
    answers.put(wrong)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_processes_that_read_write_and_trim_at_once_see_whole_pieces_or_none(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("forkserver")
    answers: multiprocessing.Queue[int] = context.Queue()
    jobs = [context.Process(target=use, args=(str(tmp_path), seed, answers)) for seed in range(3)]
    for job in jobs:
        job.start()
    assert [answers.get(timeout=60) for _ in jobs] == [0, 0, 0]
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    total = sum(path.stat().st_size for path in files(tmp_path))
    # As the module says: by 1/32 of the limit for each process, and the piece that it puts.
    assert 0.5 * LIMIT < total <= LIMIT * (1 + 3 / 32) + 3 * PIECE
    assert not [path for path in files(tmp_path) if path.name.startswith(".part-")]


def test_what_nobody_used_for_long_goes_though_there_is_room(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, LIMIT, max_age_s=3600.0)
    for number in range(3):
        cache.put(key(number), piece(number))
    old = time.time() - 7200
    for path in files(tmp_path):
        os.utime(path, (old, old))
    assert cache.get(key(1)) == piece(1)  # is of use again
    ByteCache(tmp_path, LIMIT, max_age_s=3600.0).put(key(3), piece(3))
    assert [cache.get(key(number)) is not None for number in range(4)] == [False, True, False, True]


def test_without_an_age_only_the_limit_counts(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, LIMIT)
    cache.put(key(0), piece(0))
    (path,) = files(tmp_path)
    os.utime(path, (0, 0))
    ByteCache(tmp_path, LIMIT).put(key(1), piece(1))
    assert cache.get(key(0)) == piece(0)
