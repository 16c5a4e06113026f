"""What shards cost: `python -m benchmarks.shards --pictures DIR`.

Prints, in CPU milliseconds a picture (which other work on the machine hardly changes) and pictures
a second of wall time: listing, writing with 1 and with --workers threads, indexing, checking. Then
the time to read an index of --samples samples, as large as ImageNet's unless said otherwise.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.index import Shard, ShardIndex, read_index, write_index
from data.indexing import index_shards
from data.shard_check import check_shards
from data.shards import ShardSettings, write_shards
from data.sources import list_source


def main() -> None:
    """Reads the arguments and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", required=True, help="folder of pictures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1_281_167)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print_shards(arguments.pictures, Path(scratch), arguments.workers, arguments.repeats)
        print_index(Path(scratch), arguments.samples)


def print_shards(pictures: str, scratch: Path, workers: int, repeats: int) -> None:
    """The figures of listing, writing, indexing and checking; the best of the repeats."""
    source = list_source(pictures)
    settings = ShardSettings(samples_per_shard=100)
    targets = iter(range(1000))

    def write(threads: int) -> None:
        write_shards(source, str(scratch / f"{next(targets)}"), settings, workers=threads)

    write(1)
    steps: dict[str, Callable[[], object]] = {
        "list": lambda: list_source(pictures),
        "write, 1 thread": lambda: write(1),
        f"write, {workers} threads": lambda: write(workers),
        "index": lambda: index_shards(str(scratch / "0"), workers=1),
        "check": lambda: check_shards(str(scratch / "0"), workers=1),
    }
    for name, step in steps.items():
        cpu_s, wall_s = np.min([_seconds(step) for _ in range(repeats)], axis=0)
        count = len(source.items)
        print(
            f"{name}: {1e3 * cpu_s / count:.3f} ms CPU a picture, {count / wall_s:.0f} pictures/s"
        )


def print_index(scratch: Path, samples: int) -> None:
    """The figures of an index of that many samples in shards of 1000."""
    offsets = np.arange(1001, dtype=np.int64) * 111_104
    sizes = np.arange(300, 1300, dtype=np.int32)
    shards = tuple(
        Shard(f"shard-{number:06d}.tar", "0" * 64, offsets, sizes, sizes, int(offsets[-1]) + 10240)
        for number in range(-(-samples // 1000))
    )
    write_index(ShardIndex(str(scratch / "index"), shards))
    _, wall_s = min(_seconds(lambda: read_index(str(scratch / "index"))) for _ in range(3))
    size = (scratch / "index" / "index.json").stat().st_size
    print(f"read an index of {1000 * len(shards)} samples, {size / 1e6:.1f} MB: {wall_s:.2f} s")


def _seconds(step: Callable[[], object]) -> tuple[float, float]:
    """(CPU, wall) seconds of one run."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
