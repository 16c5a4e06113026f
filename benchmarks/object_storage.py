"""What an object store costs a run: the stall of a checkpoint, and the stream's rate from it.

    python -m benchmarks.object_storage --pictures DIR --store s3://bucket/bench

Credentials and endpoint the standard ways (AWS_ENDPOINT_URL, ...). Beside the store the same is
done on a local disk. The checkpoint is of --million parameters with AdamW's state and an average;
steps of a fixed work on the CPU go on while it is uploaded. The stream is the whole path of
pretraining (decoding, ten patches), one epoch after a first block, wall time and CPU time of all
processes; the reads alone are one thread that reads every shard's bytes.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from benchmarks.loader import _tree_seconds
from data.index import read_index
from data.loader import StreamSettings, StreamSource
from data.patch_content import PatchContent
from data.reading import RangeReader, ReadingSettings
from data.shards import write_shards
from data.sources import list_source
from data.stream import ExactStream
from training.checkpoint_writer import CheckpointWriter
from training.ema import Ema, EmaSettings
from training.retention import RetentionSettings
from training.run_folder import open_run_folder
from training.snapshot import Position, TrainingState
from training.uploads import Uploads
from training.world import World

BATCH = 32
WIDTH = 2048


@dataclass(frozen=True)
class Stall:
    """What one checkpoint took."""

    save_s: float
    """For which the training thread stood still."""
    stored_s: float
    """Until the store had it whole, verified, with its manifest."""
    step_ms: float
    """A step while nothing is uploaded, median."""
    step_during_ms: float
    """A step while the checkpoint is on its way, median."""


def main() -> None:
    """Reads the arguments and prints the tables, or measures one stream."""
    if sys.argv[1:2] == ["--stream"]:
        url, processes = json.loads(sys.argv[2])
        print(json.dumps(stream_rate(url, processes)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--store", required=True, help="an empty place in a store, s3://bucket/a")
    parser.add_argument("--million", type=int, default=41, help="parameters; DETR-R50 has 41")
    parser.add_argument("--checkpoints", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as disk:
        places = {"disk": disk, "store": arguments.store}
        for name, place in places.items():
            for stall in stalls(f"{place}/run", arguments.million, arguments.checkpoints):
                print(
                    f"{name:6s} checkpoint: training stood {stall.save_s:.2f} s, stored after "
                    f"{stall.stored_s:.1f} s; a step {stall.step_ms:.0f} ms, "
                    f"{stall.step_during_ms:.0f} ms meanwhile",
                    flush=True,
                )
        for name, place in places.items():
            source = list_source(str(arguments.pictures.resolve()))
            report = write_shards(source, f"{place}/shards")
            megabytes, seconds = read_rate(f"{place}/shards")
            print(
                f"{name:6s} reads alone: {megabytes / seconds:.0f} MB/s, "
                f"{report.num_samples / seconds:.0f} pictures/s",
                flush=True,
            )
        for processes in (1, 2, 4):
            for name, place in places.items():
                command = [sys.executable, "-m", "benchmarks.object_storage", "--stream"]
                job = json.dumps([f"{place}/shards", processes])
                done = subprocess.run([*command, job], check=True, capture_output=True, text=True)
                rate, cpu_ms = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{name:6s} stream, {processes} loader processes: {rate:.0f} pictures/s, "
                    f"{cpu_ms:.1f} ms CPU a picture",
                    flush=True,
                )


def stalls(run: str, million: int, checkpoints: int) -> Iterator[Stall]:
    """Saves checkpoints one after the other, steps going on meanwhile."""
    rows = million * 10**6 // WIDTH // 20
    model = nn.ModuleList(nn.Linear(rows, WIDTH, bias=False) for _ in range(20))
    optimiser = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    state = TrainingState(model, optimiser, Ema(model, EmaSettings()))
    uploads = Uploads()
    world = World.alone(torch.device("cpu"))
    writer = CheckpointWriter(open_run_folder(run), uploads, RetentionSettings(), world, "none")
    work = torch.randn(512, 512)
    quiet = [_step_s(work) for _ in range(50)]
    for number in range(checkpoints):
        began = time.perf_counter()
        writer.save(state, Position(step=number + 1), {})
        saved = time.perf_counter()
        during: list[float] = []
        while uploads._pending and not uploads._pending[-1].done():
            during.append(_step_s(work))
        stored = time.perf_counter()
        if uploads.failures:
            raise SystemExit("a checkpoint was not stored")
        yield Stall(
            saved - began,
            stored - began,
            1e3 * statistics.median(quiet),
            1e3 * statistics.median(during or [float("nan")]),
        )
    uploads.close()


def _step_s(work: torch.Tensor) -> float:
    began = time.perf_counter()
    for _ in range(10):
        work @ work
    return time.perf_counter() - began


def read_rate(url: str) -> tuple[float, float]:
    """(megabytes, seconds) of reading every shard once, in ranges of 16 MB."""
    reader = RangeReader(url, {}, ReadingSettings())
    began, total = time.perf_counter(), 0
    for shard in read_index(url).shards:
        for begin in range(0, shard.size, 16_000_000):
            total += len(reader.read(shard, begin, min(begin + 16_000_000, shard.size)))
    return total / 1e6, time.perf_counter() - began


def stream_rate(url: str, processes: int) -> tuple[float, float]:
    """(pictures a second, ms of CPU a picture) of an epoch of the stream, once it flows."""
    torch.set_num_threads(1)
    index = read_index(url)
    source = StreamSource(index=index, seed=0, global_batch=BATCH, content=PatchContent(10))
    batches = index.num_samples // BATCH
    stream = ExactStream(source, StreamSettings(processes=processes))
    with contextlib.closing(stream.from_step(0)) as packed:
        for _ in islice(packed, batches):
            pass
        cpu, began = _tree_seconds(), time.perf_counter()
        for _ in islice(packed, 2 * batches):
            pass
        cpu, seconds = _tree_seconds() - cpu, time.perf_counter() - began
    pictures = 2 * batches * BATCH
    return pictures / seconds, 1e3 * cpu / pictures


if __name__ == "__main__":
    main()
