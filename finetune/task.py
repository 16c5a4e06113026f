"""What a finetuning task gives to the run: the one interface of detection, one-shot and panoptic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from data.loader import BatchContent
from models.structures import DetectionBatch, Losses

P = TypeVar("P")

Metrics = Mapping[str, float]
"""Numbers of an evaluation by name, e.g. `ap50`."""


@dataclass(frozen=True)
class Task(Generic[P]):
    """A model with its first weights, what it learns from, and how it is judged."""

    model: nn.Module
    """On the CPU; equal on every worker."""
    backbone: nn.Module | None
    """The part of `model` with a learning rate of its own; None where it has none."""
    content: BatchContent[P]
    """What the stream makes of the samples."""
    to_device: Callable[[P, torch.device], DetectionBatch]
    """A packed batch on its device, normalised there."""
    objective: Callable[[nn.Module, DetectionBatch, torch.Generator], Losses]
    """The losses of a batch, with divisors over all workers; not finite where nothing matches."""
    evaluate: Callable[[nn.Module], Callable[[], Metrics]]
    """Predicts on this worker's share (on every worker) and returns the scoring that is left to
    do: it may be called in another thread, and gives the numbers on the first worker alone.
    """
