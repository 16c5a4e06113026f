"""A checkpoint written and read back, and room for all that a run keeps: disks, shared memory.

The checkpoint is that of the trial step, optimiser and all, so its size is the run's. It goes the
way that every one will go, into a folder of its own inside the run's, which is gone afterwards.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cluster.preflight.batches import AnyBatch, largest_shape, padded
from cluster.preflight.checks import Check
from cluster.preflight.forecast import duration
from cluster.preflight.memory import Seat
from cluster.preflight.store import QUICK, probe_name, remove_probe
from cluster.preflight.trial import Bench, Pace, pictures_of_worker
from cluster.stages import Recipe
from models.structures import PatchBatch
from training.checkpoint import load_checkpoint, save_checkpoint
from training.run_folder import RunFolder, open_run_folder
from training.snapshot import Position, Snapshot, TrainingState, take_snapshot

NAME = "checkpoint"
MOST_STALL = 0.01
"""Share of the time between two checkpoints that the loop may stand still for one."""
_SHARED = Path("/dev/shm")
_GB = 1e9


def checkpoint_checks(recipe: Recipe, state: TrainingState, pace: Pace | None) -> Iterator[Check]:
    """Writes a checkpoint of this state beside the run, reads it back and compares.

    Raises StoreError or CheckpointError: it did not arrive, or not as it was.
    """
    run = open_run_folder(recipe.run, patience=QUICK)
    name = probe_name()
    place = open_run_folder(f"{run.url}/{name}", patience=QUICK)
    try:
        began = time.monotonic()
        snapshot = take_snapshot(state, Position(step=1), world_size=1)
        stall_s = time.monotonic() - began
        manifest = save_checkpoint(place, snapshot, {}, "")
        write_s = time.monotonic() - began - stall_s
        back = load_checkpoint(place, manifest)
        read_s = time.monotonic() - began - stall_s - write_s
    finally:
        remove_probe(run, name)
    size = sum(record.size for record in manifest.files.values())
    facts = {"bytes": size, "write_s": write_s, "read_s": read_s, "stall_s": stall_s}
    said = (
        f"{size / 1e6:.0f} MB written in {write_s:.1f} s and read back in {read_s:.1f} s; the loop "
        f"stands still for {stall_s:.2f} s"
    )
    if not _is_same(snapshot, back):
        way_out = "use another store, or look for the proxy or cache that changed it"
        yield Check(NAME, "fault", f"{said}, and it came back as another; {way_out}", facts)
        return
    yield _in_time(recipe, pace, Check(NAME, "well", said, facts), write_s, stall_s)
    yield from _disk_checks(recipe, run, size)


def shared_memory_checks(bench: Bench, seat: Seat) -> Iterator[Check]:
    """Whether the batches that are made ahead have room in /dev/shm, where containers have little.

    Raises what the data raise.
    """
    recipe = bench.kit.recipe
    settings = recipe.data.stream
    if settings.processes == 0 or not (sys.platform.startswith("linux") and _SHARED.is_dir()):
        return
    share = pictures_of_worker(recipe.global_batch, recipe.resources.min_workers)
    # A number is a byte there; the device makes floats of them.
    each = _numbers_of_a_picture(padded(bench.kit.batch(1), largest_shape(recipe)))
    needed = seat.workers * (settings.parts_ahead + 1) * share * each
    free = shutil.disk_usage(_SHARED).free
    facts = {"needed_bytes": needed, "free_bytes": free}
    said = (
        f"/dev/shm: batches made ahead take about {needed / _GB:.2f} GB, {free / _GB:.2f} GB free"
    )
    if needed <= free:
        yield Check("shared memory", "well", said, facts)
        return
    way_out = (
        "give the container more (docker --shm-size, an emptyDir of medium Memory), or use fewer "
        "data.stream.parts_ahead"
    )
    yield Check("shared memory", "fault", f"{said}; {way_out}", facts)


def free_bytes(place: Path) -> int:
    """Of the disk that a folder is on, or will be on."""
    there = next(parent for parent in (place, *place.parents) if parent.exists())
    return shutil.disk_usage(there).free


def cache_checks(recipe: Recipe) -> Iterator[Check]:
    """Whether the local cache of shards has the room that the recipe grants it."""
    cache = recipe.data.stream.reading.cache
    if cache is None:
        return
    free = free_bytes(Path(cache.folder).expanduser().absolute())
    limit = cache.limit_gb * _GB
    facts = {"limit_bytes": limit, "free_bytes": free}
    said = f"{cache.folder} may grow to {cache.limit_gb:g} GB, {free / _GB:.1f} GB are free"
    if limit <= free:
        yield Check("cache", "well", said, facts)
        return
    way_out = f"say data.stream.reading.cache.limit_gb={free / _GB * 0.8:.1f} or less"
    yield Check("cache", "warning", f"{said}; {way_out}, or another folder", facts)


def _in_time(
    recipe: Recipe, pace: Pace | None, well: Check, write_s: float, stall_s: float
) -> Check:
    """Whether one is written before the next is due, and how much of the time the loop stands."""
    between = _between(recipe, pace)
    if between is None:
        return well
    key, every_s = between
    said = f"{well.said}, one every {duration(every_s)}"
    if write_s > every_s:
        problem = "the next is due before it is written, and they queue up"
    elif stall_s > MOST_STALL * every_s:
        problem = f"that is {100 * stall_s / every_s:.0f} % of the time"
    else:
        return replace(well, said=said)
    times = max(write_s, stall_s / MOST_STALL) / every_s
    return replace(well, state="warning", said=f"{said}: {problem}; raise {key} {times:.1f}-fold")


def _between(recipe: Recipe, pace: Pace | None) -> tuple[str, float] | None:
    """The key that decides when the next checkpoint is due, and the seconds until then."""
    loop, rhythms = recipe.loop, dict[str, float]()
    if loop.checkpoint_every_minutes is not None:
        rhythms["loop.checkpoint_every_minutes"] = 60 * loop.checkpoint_every_minutes
    if loop.checkpoint_every_steps is not None and pace is not None:
        rhythms["loop.checkpoint_every_steps"] = loop.checkpoint_every_steps * pace.update_s
    return min(rhythms.items(), key=lambda rhythm: rhythm[1], default=None)


def _disk_checks(recipe: Recipe, run: RunFolder, size: int) -> Iterator[Check]:
    """Room for all checkpoints that stay, and for the one that is being written."""
    settings = recipe.checkpoints
    kept = settings.keep_last + 1 + (settings.best_metric is not None)
    if run.is_local:
        place, what = Path(run.root), f"{kept} checkpoints of {size / 1e6:.0f} MB"
        needed = kept * size
    else:
        # One is written while another waits for its upload.
        place, what = Path(tempfile.gettempdir()), "two checkpoints on their way to the store"
        needed = 2 * size
    free = free_bytes(place)
    facts = {"needed_bytes": needed, "free_bytes": free}
    said = f"{place}: {what} need {needed / _GB:.2f} GB, {free / _GB:.1f} GB are free"
    if needed <= free:
        yield Check("disk", "well", said, facts)
        return
    way_out = (
        "make room, or keep fewer (checkpoints.keep_last)"
        if run.is_local
        else ("make room, or name a folder on a larger disk by TMPDIR")
    )
    yield Check("disk", "fault", f"{said}; {way_out}", facts)


def _numbers_of_a_picture(batch: AnyBatch) -> int:
    beside = batch.patches if isinstance(batch, PatchBatch) else batch.query_patches
    return batch.images.pixels[0].numel() + (0 if beside is None else beside[0].numel())


def _is_same(one: Snapshot, other: Snapshot) -> bool:
    return one.position == other.position and all(
        name in other.model and torch.equal(tensor, other.model[name])
        for name, tensor in one.model.items()
    )
