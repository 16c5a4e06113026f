"""Evaluation of a classifier: how often its first, or one of its first five, answers is right.

Every worker predicts each of its own pictures once; what leaves the device of a picture is the rank
of its true class. Classes of the data and of the classifier meet by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.classification_content import ClassSizes
from data.detection_set import DetectionSet
from data.evaluation_batches import EvaluationBatch, evaluation_batches
from data.reading import ReadingSettings
from finetune.evaluation import EvaluationSettings, Progress, evaluated_ids
from finetune.shares import map_classes
from models.structures import Classes
from models.urls import public_url
from training.world import World, gather_objects

FEW = 5
"""Answers of which one has to be right for top-5; all where there are fewer classes."""


@dataclass(frozen=True)
class JudgedPicture:
    """The answer for one picture."""

    sample_id: int
    name: str
    """Of its class, in the data."""
    rank: int
    """Classes that the classifier holds for likelier than the true one."""


@dataclass(frozen=True)
class ClassifierEvaluation:
    """What a classifier gets right."""

    data: str
    pictures: tuple[JudgedPicture, ...]
    skipped: tuple[str, ...]
    missing: tuple[str, ...]
    """Classes of the data that the classifier does not know: it is never right about them."""

    def metrics(self) -> dict[str, float]:
        """`top1` and `top5`, 0..1, and the pictures that could not be read."""
        return {**accuracies(self.pictures), "skipped": float(len(self.skipped))}

    def content(self) -> dict[str, object]:
        """Everything, as values of JSON; with a table by class."""
        return {
            "data": self.data,
            "pictures": len(self.pictures),
            **accuracies(self.pictures),
            "classes": {
                name: {"pictures": len(found), **accuracies(found)}
                for name, found in self._by_class()
            },
            "missing": list(self.missing),
            "skipped": list(self.skipped),
        }

    def text(self) -> str:
        """A few lines for a terminal: the numbers, and the classes that are missed most."""
        numbers = accuracies(self.pictures)
        lines = [
            f"{len(self.pictures)} pictures of {self.data}",
            f"  top-1 {100 * numbers['top1']:6.2f} %   top-5 {100 * numbers['top5']:6.2f} %",
        ]
        worst = sorted(self._by_class(), key=lambda each: accuracies(each[1])["top1"])[:FEW]
        lines += [
            f"  {name:24} top-1 {100 * accuracies(found)['top1']:6.2f} %, {len(found)} pictures"
            for name, found in worst
        ]
        lines += [f"  not known to the classifier: {name}" for name in self.missing]
        lines += [f"  left out: {each}" for each in self.skipped]
        return "\n".join(lines)

    def _by_class(self) -> Iterator[tuple[str, list[JudgedPicture]]]:
        for name in sorted({picture.name for picture in self.pictures}):
            yield name, [picture for picture in self.pictures if picture.name == name]


def accuracies(pictures: Sequence[JudgedPicture]) -> dict[str, float]:
    """Share of pictures whose class is the first answer, or among the first five; 0 of none."""
    count = max(1, len(pictures))
    return {
        "top1": sum(picture.rank < 1 for picture in pictures) / count,
        "top5": sum(picture.rank < FEW for picture in pictures) / count,
    }


def evaluate_classifier(
    model: nn.Module,
    data: DetectionSet,
    model_classes: Classes,
    settings: EvaluationSettings,
    sizes: ClassSizes,
    world: World,
    precision: Literal["float32", "bf16"] = "float32",
    reading: ReadingSettings | None = None,
    progress: Progress | None = None,
) -> Callable[[], ClassifierEvaluation]:
    """Predicts on every worker, each its own pictures; what comes back puts them together.

    Of the settings sizes and protocols are of detectors. The model is in evaluation mode and on
    `world.device`. Raises ValueError where model and data have no class in common, and what reading
    the data raises.
    """
    class_map = map_classes(model_classes, data.classes)
    theirs = {
        data.classes.names[label]: number
        for number, label in enumerate(class_map.labels.tolist())
        if label >= 0
    }
    ids = evaluated_ids(data.index.num_samples, settings.max_pictures)[world.rank :: world.size]
    batches = evaluation_batches(
        data,
        ids,
        sizes,
        settings.batch_size,
        settings.processes,
        world.device,
        reading or ReadingSettings(),
    )
    pictures: list[JudgedPicture] = []
    skipped: list[str] = []
    with closing(batches) as opened:
        for batch in opened:
            skipped += map(str, batch.skipped)
            if batch.keys:
                pictures += _judged(model, batch, theirs, precision)
            if progress is not None:
                progress(len(pictures) + len(skipped), len(ids))
    shares = gather_objects((tuple(pictures), tuple(skipped)))
    return lambda: ClassifierEvaluation(
        data=public_url(data.url),
        pictures=tuple(
            sorted((each for share, _ in shares for each in share), key=lambda one: one.sample_id)
        ),
        skipped=tuple(sorted(each for _, share in shares for each in share)),
        missing=class_map.missing,
    )


def ranks(
    logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Classes before the true one by falling logit; of equal ones the lower label comes first.

    A logit that is not a number is never right.
    """
    true = logits.gather(1, labels[:, None])
    numbers = torch.arange(logits.shape[1], device=logits.device)
    before = (logits > true) | ((logits == true) & (numbers < labels[:, None]))
    found = before.sum(1)
    return torch.where(true[:, 0].isnan(), max(FEW, logits.shape[1]), found)


@torch.no_grad()
def _judged(
    model: nn.Module,
    batch: EvaluationBatch,
    theirs: Mapping[str, int],
    precision: Literal["float32", "bf16"],
) -> Iterator[JudgedPicture]:
    pixels = batch.images.pixels
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(pixels)
    names = [annotation.names[0] for annotation in batch.annotations]
    labels = torch.tensor([theirs.get(name, -1) for name in names], device=logits.device)
    found = ranks(logits.float(), labels.clamp(min=0))
    found = torch.where(labels < 0, max(FEW, logits.shape[1]), found)
    for sample_id, name, rank in zip(batch.sample_ids.tolist(), names, found.tolist(), strict=True):
        yield JudgedPicture(sample_id, name, rank)
