"""What a run asks of the machines: how many workers, on what device, how often they may fail."""

from typing import Literal

from pydantic import Field

from models.settings import Settings


class Resources(Settings):
    """Workers of a run. They may change from one start of a run to the next; the data do not."""

    workers: int = Field(default=1, ge=1)
    """Training processes; each holds the whole model and takes its part of every global batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where each worker trains; `auto` takes a GPU where the machines have one."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores reserved for each worker and its loader processes."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that lost workers start again, from the newest checkpoint, before the job fails."""
