"""What a run asks of the machines: how many workers, on what device, how often they may fail."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from models.settings import Settings

_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


def _checked(workers: int | str) -> int | str:
    fewest, most = _bounds(workers)
    if fewest < 1:
        raise ValueError(f"{workers}: a run needs 1 worker or more")
    if most < fewest:
        raise ValueError(f"{workers}: the fewest come first, say {most}..{fewest}")
    return workers


def _bounds(workers: int | str) -> tuple[int, int]:
    """The fewest and the most workers."""
    if isinstance(workers, int):
        return workers, workers
    found = _RANGE.fullmatch(workers)
    if found is None:
        raise ValueError(f"{workers!r} is neither a number nor a range; say e.g. 4 or 2..8")
    return int(found[1]), int(found[2])


class Resources(Settings):
    """Workers of a run. They may change from one start of a run to the next; the data do not."""

    workers: Annotated[int | str, AfterValidator(_checked)] = 1
    """Training processes, a number or a range such as 2..8; each holds the whole model and takes
    its part of every global batch. With a range a run goes on with those that there are.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where each worker trains; `auto` takes a GPU where the machines have one."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores reserved for each worker and its loader processes."""
    max_pictures_per_pass: int | None = Field(default=None, ge=1)
    """Pictures that a worker computes at once; where its part of a batch is larger it makes several
    passes, whose update is the same. Null computes its whole part at once; with a range of workers
    as many as each has when all are there, so that fewer workers need no more memory.
    """
    max_restarts: int = Field(default=3, ge=0)
    """Times in a row that lost workers start again without getting to a new checkpoint, before the
    job fails; machines that had announced their end do not count.
    """
    resize_every_s: float = Field(default=60.0, gt=0)
    """Seconds between two looks for more machines, where workers is a range."""
    hang_minutes: float | None = Field(default=15.0, gt=0)
    """Minutes without any progress after which a worker is taken for hung and ends, so that the
    group starts again; four times as many before its first step; null waits for ever.
    """
    preemption_grace_s: float = Field(default=0.0, ge=0)
    """Seconds that the other workers go on after a machine's announced end, for a checkpoint that
    takes longer to store than the notice was long.
    """

    @property
    def min_workers(self) -> int:
        """The fewest workers that the run goes on with."""
        return _bounds(self.workers)[0]

    @property
    def max_workers(self) -> int:
        """The most workers that the run makes use of."""
        return _bounds(self.workers)[1]

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the job runs."""
        return self.min_workers < self.max_workers
