"""Numbers of the steps since the last record: left on the device, read in one copy."""

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from models.structures import Losses
from training.world import World, all_reduce_sum

_GIB = 2.0**30


@dataclass(frozen=True)
class WindowMeans:
    """Means over the good steps of a window and over the workers."""

    losses: Mapping[str, float]
    """`total` first; NaN where no step was good."""
    grad_norm: float


@dataclass
class Window:
    """The steps since the last record."""

    clock: Callable[[], float]
    began: float = field(init=False)
    steps: int = 0
    pictures: int = 0
    """Of all workers."""
    skipped: int = 0
    """Of all workers."""
    waited_s: float = 0.0
    """Seconds in which this worker waited for data."""
    skipped_keys: list[str] = field(default_factory=list)
    """Of this worker."""
    _names: tuple[str, ...] = ("total",)
    _rows: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()

    def add_losses(self, losses: Losses, grad_norm: Float[Tensor, ""]) -> None:
        """Keeps the numbers of one good step on their device.

        Raises:
            ValueError: the terms are not those of the step before.
        """
        names = ("total", *losses.terms)
        if self._rows and names != self._names:
            raise ValueError(f"the loss terms changed from {self._names} to {names}; name them all")
        self._names = names
        values = [losses.total, *losses.terms.values(), grad_norm]
        self._rows.append(torch.stack([value.detach().float() for value in values]))

    def means(self, world: World) -> WindowMeans:
        """Called on every worker: one sum over the workers and one copy to the host."""
        numbers = [float("nan")] * (len(self._names) + 1)
        if self._rows:
            numbers = all_reduce_sum(torch.stack(self._rows).mean(0) / world.size).tolist()
        return WindowMeans(dict(zip(self._names, numbers, strict=False)), numbers[-1])


def memory_gib(device: torch.device) -> float:
    """Most memory that this process ever used, in GiB: of its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes.
    return peak / _GIB if sys.platform == "darwin" else peak * 1024 / _GIB
