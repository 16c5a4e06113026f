"""What a finetuning task gives to the run: one interface of detection, one-shot and panoptic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, runtime_checkable

import torch
from torch import nn

from data.detection_set import DetectionSet
from data.loader import BatchContent, P
from finetune.evaluation import Progress
from models.artefact import ArtefactKind
from models.interop.placing import LoadReport
from models.structures import DetectionBatch
from training.job import Objective


@dataclass(frozen=True)
class Judgement:
    """What an evaluation found."""

    metrics: Mapping[str, float]
    """Numbers by name, e.g. `ap50`; only those that exist."""
    content: Mapping[str, object] = field(default_factory=dict)
    """Everything, as JSON: tables by class, skipped pictures."""


Scoring = Callable[[], Judgement]
"""What is left to do when everything is predicted; may be called in another thread."""


@runtime_checkable
class Told(Protocol):
    """An evaluation that tells of itself."""

    def metrics(self) -> dict[str, float]:
        """Numbers by name; only those that exist."""
        ...

    def content(self) -> dict[str, object]:
        """Everything, as values of JSON."""
        ...


def judging(scoring: Callable[[], Told]) -> Scoring:
    """What is left to do of an evaluation, as the run wants it."""

    def score() -> Judgement:
        found = scoring()
        return Judgement(found.metrics(), found.content())

    return score


@dataclass(frozen=True)
class TaskSets:
    """The labelled pictures of a run."""

    train: DetectionSet
    validation: DetectionSet | None


@dataclass(frozen=True)
class Task(Generic[P]):
    """A model with its first weights, what it learns from, and how it is judged."""

    model: nn.Module
    """On the CPU; equal on every worker."""
    backbone: nn.Module | None
    """The part of `model` with a learning rate of its own; None where it has none."""
    load_report: LoadReport | None
    """Where the first weights come from; None for a run that has a checkpoint already."""
    kind: ArtefactKind
    """What the weights are, for their header."""
    content: BatchContent[P]
    """What the stream makes of the samples."""
    to_device: Callable[[P, torch.device], DetectionBatch]
    """A packed batch on its device, normalised there."""
    objective: Objective[DetectionBatch]
    """The losses of a part of a batch; not finite where nothing matches."""
    evaluate: Callable[[nn.Module, Progress], Scoring] | None
    """Predicts on this worker's share (on every worker) and returns the scoring that is left to
    do, on the first worker alone. None where there is nothing to evaluate on.
    """
    pictures: DetectionSet | None = None
    """What the stream reads where that is not the whole training set."""
