"""Who this process is among the workers of a run, and the few words that the workers exchange.

Everything is the identity without a process group, so that one process needs none. Costs one
collective a call. Under NCCL objects travel over a process's current device, which must be its own
(Ray Train sees to it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from jaxtyping import Shaped
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One worker's place: `rank` of `size` workers, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(
                f"rank={self.rank} is not one of the {self.size} workers; use 0..{self.size - 1}"
            )

    @staticmethod
    def alone(device: torch.device) -> "World":
        """The world of a single process."""
        return World(rank=0, size=1, device=device)

    @property
    def is_first(self) -> bool:
        """True on the one worker that writes the record and the checkpoints."""
        return self.rank == 0


def all_reduce_sum(tensor: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """The sum over the workers, the same on each; the argument is left as it was."""
    if not _connected():
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def all_reduce_max(numbers: Sequence[int], world: World) -> tuple[int, ...]:
    """The largest of each number over the workers, on every worker; reads the device."""
    if not _connected():
        return tuple(numbers)
    largest = torch.tensor(numbers, device=world.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return tuple(largest.tolist())


def barrier() -> None:
    """Returns when every worker has come here."""
    if _connected():
        torch.distributed.barrier()


def broadcast_object(value: T, world: World) -> T:
    """The first worker's `value`, on every worker; pickled, so between our own workers only."""
    if not _connected():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0, device=world.device)
    return held[0]


def gather_objects(value: T) -> tuple[T, ...]:
    """Every worker's `value` in the order of the ranks, on every worker; pickled on the way."""
    if not _connected():
        return (value,)
    held: list[T | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(held, value)
    return tuple(held)  # type: ignore[arg-type]


def _connected() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
