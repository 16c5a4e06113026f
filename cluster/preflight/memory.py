"""Does a step fit into memory, and how many pictures would?

On a GPU steps are tried, with the largest padded pictures that the recipe can have, and the largest
number that fits is found by trying. On a CPU a step that does not fit ends the process, or others:
there the memory that a step with few pictures takes is measured, and grows with the pictures.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from cluster.preflight.batches import AnyBatch, largest_shape, padded, repeated
from cluster.preflight.checks import Check, plural
from cluster.preflight.trial import Bench, pictures_of_worker
from training.memory import return_free_memory
from training.optimiser import trainable_parameters

NAME = "memory"
MOST_PICTURES = 1024
"""Pictures of one pass beyond which nobody asks."""
HEADROOM = 0.92
"""Share of a GPU's memory that a step may fill: libraries and the exchange of gradients take some,
and batches differ. A guess, to be measured.
"""
_GIB = 2.0**30
_CPU_TRIED = 2
"""Pictures by which the memory of a step is measured on a CPU."""


@dataclass(frozen=True)
class Seat:
    """What one worker finds on its machine."""

    device: torch.device
    workers: int = 1
    """That share the machine's memory and cores."""
    free_bytes: float = float("inf")
    """Of the machine's memory, for all of them."""


def memory_checks(bench: Bench, seat: Seat) -> Iterator[Check]:
    """Whether the step of the fullest worker fits, and the largest pass that would.

    Raises NonFiniteLoss and the errors of the data.
    """
    recipe = bench.kit.recipe
    share = pictures_of_worker(recipe.global_batch, recipe.resources.min_workers)
    count = min(share, recipe.pictures_per_pass or share)
    batch = bench.kit.batch(min(count, _CPU_TRIED) if seat.device.type == "cpu" else count)
    largest = padded(batch, largest_shape(recipe))
    if seat.device.type == "cuda":
        yield _on_gpu(bench, largest, count)
    else:
        yield _on_cpu(bench, largest, count, seat)


def largest_fitting(fits: Callable[[int], bool], count: int, most: int) -> int:
    """The largest number from 1 to `most` that fits, to a tenth; 0 where not even 1 does.

    Asks for `count`, then for twice as many until one does not fit, then between.
    """
    good, bad, asked = 0, most + 1, max(1, min(count, most))
    while good + max(1, good // 10) < bad:
        if fits(asked):
            good = asked
        else:
            bad = asked
        asked = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def free_memory() -> float:
    """Bytes of memory that are free on this machine, or in this container where that is less."""
    free = float("inf")
    if sys.platform.startswith("linux"):
        free = 1024.0 * _linux_number("/proc/meminfo", "MemAvailable")
    for limit, used in _CONTAINERS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            # There is no such control group, or it has no limit ("max").
            continue
    return max(0.0, free)


_CONTAINERS = tuple(
    (f"/sys/fs/cgroup/{limit}", f"/sys/fs/cgroup/{used}")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
)
"""Where the limit of a container stands, and what it uses: control groups of both versions."""


def _on_gpu(bench: Bench, largest: AnyBatch, count: int) -> Check:
    device = bench.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(HEADROOM, device)
    try:
        # The optimiser's moments exist from its first update on.
        is_possible = _fits(bench, largest, 1)
        peak = 0.0
        if is_possible and _fits(bench, largest, count):
            peak = float(torch.cuda.max_memory_reserved(device))
        most = largest_fitting(lambda n: _fits(bench, largest, n), count, MOST_PICTURES)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    said = f"of {total / _GIB:.0f} GiB of {torch.cuda.get_device_name(device)}"
    taken = f"{peak / _GIB:.1f} GiB {said}" if peak else f"more than there is {said}"
    return _judged(bench, largest, count, most, taken)


def _fits(bench: Bench, largest: AnyBatch, count: int) -> bool:
    """Whether an update of so many pictures fits; with gradients that are there already, as they
    are in all passes but the first, and always where several workers average them.
    """
    torch.cuda.reset_peak_memory_stats(bench.device)
    batch = repeated(largest, 2 * count)
    try:
        bench.steps(repeat(batch), 1, per_pass=count)
    except torch.OutOfMemoryError:
        return False
    finally:
        bench.state.optimiser.zero_grad(set_to_none=True)
        del batch
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _on_cpu(bench: Bench, largest: AnyBatch, count: int, seat: Seat) -> Check:
    if not sys.platform.startswith("linux"):
        return Check(NAME, "unchecked", "only Linux tells how much memory a step takes")
    tried = len(largest.keys)
    bench.steps(repeat(largest), 1, per_pass=tried)
    own, peak = _peak_of(lambda: bench.steps(repeat(largest), 1, per_pass=tried))
    gradients = float(sum(p.nbytes for p in trainable_parameters(bench.state.optimiser)))
    each = max(peak - own - gradients, float(largest.images.pixels.nbytes)) / tried
    room = (seat.free_bytes + own) / seat.workers - own - gradients
    most = max(0, min(MOST_PICTURES, int(room / each)))
    needed = own + gradients + each * count
    taken = (
        f"about {needed / _GIB:.1f} GiB for each of {plural(seat.workers, 'worker')} of a machine, "
        f"beside the loader processes; {(seat.free_bytes + own) / _GIB:.1f} GiB are free"
    )
    return _judged(bench, largest, count, most, taken)


def _peak_of(act: Callable[[], None]) -> tuple[float, float]:
    """Bytes that were resident before, and the most while it acted."""
    return_free_memory()
    before = 1024.0 * _linux_number("/proc/self/status", "VmRSS")
    # 5 sets the peak back to what is resident now (proc(5)); where that is not allowed, the peak of
    # the whole process stands for that of the step: never too little.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    act()
    return before, 1024.0 * _linux_number("/proc/self/status", "VmHWM")


def _linux_number(path: str, key: str) -> int:
    """In KiB, as /proc says it."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"{path} has no {key}; is /proc mounted whole?")


def _judged(bench: Bench, largest: AnyBatch, count: int, most: int, taken: str) -> Check:
    recipe = bench.kit.recipe
    height, width = largest.images.pixels.shape[-2:]
    said = f"a pass of {plural(count, 'picture')} of {width} x {height} takes {taken}"
    facts = {"pictures_of_a_pass": count, "largest_pass": most}
    more = " or more" if most >= MOST_PICTURES else ""
    if most >= count:
        return Check(NAME, "well", f"{said}; the largest that fits has {most}{more}", facts)
    if most == 0:
        way_out = "not even one fits: use smaller pictures (max_size), or machines with more memory"
    else:
        way_out = (
            f"the largest that fits has {most}: say resources.max_pictures_per_pass={most}, whose "
            "update is the same, or use more workers"
        )
    if recipe.loop.precision == "float32" and bench.device.type == "cuda":
        way_out += "; loop.precision=bf16 takes less"
    return Check(NAME, "fault", f"{said}; {way_out}", facts)
