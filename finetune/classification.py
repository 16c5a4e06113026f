"""The classification task: one class for a whole picture (DAT, section 4.1; Swin, section 4.1).

Cross-entropy with soft targets: smoothed, and mixed like the pictures. What is trained is a
backbone with its head; a detector takes the backbone by `model.backbone.weights=`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.classification_content import ClassificationContent
from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_set import DetectionSet
from finetune.classifier_evaluation import evaluate_classifier
from finetune.classifier_weights import initial_classifier
from finetune.classify import MixSettings
from finetune.evaluation import Progress
from finetune.recipe import FinetuneRecipe
from finetune.task import Scoring, Task, TaskSets, judging
from models.classifier import Classifier
from models.interop.placing import LoadReport
from models.shares import Share, counts_of
from models.structures import Classes, DetectionBatch, Losses
from training.world import World


def classification_task(
    recipe: FinetuneRecipe, sets: TaskSets, world: World, is_fresh: bool
) -> Task[PackedDetectionBatch]:
    """A classifier of the classes of the training set.

    Its first weights are those of the recipe where the run `is_fresh`; else a checkpoint fills it.
    Raises WeightsError where weights do not fit.
    """
    classes = sets.train.classes
    model, report = _model(recipe, classes, is_fresh)
    return Task(
        model=model,
        backbone=None,
        load_report=report,
        kind="classifier",
        content=ClassificationContent(classes, recipe.classify.augment),
        to_device=detection_to_device,
        objective=ClassificationObjective(recipe.classify.mix, len(classes.names)),
        evaluate=_evaluation(recipe, classes, sets.validation, world),
    )


@dataclass(frozen=True)
class ClassificationObjective:
    """The cross-entropy of a batch; a value, so that the loop can call it with any model."""

    mix: MixSettings
    num_classes: int

    def counts(self, batch: DetectionBatch) -> Float[Tensor, "3"]:
        """Its pictures."""
        return counts_of(batch.targets, 1, blank=batch.blank)

    def __call__(
        self, model: nn.Module, batch: DetectionBatch, share: Share, generator: torch.Generator
    ) -> Losses:
        """The losses of one part of a batch, as its share of those of the whole."""
        pixels = batch.images.pixels
        if batch.blank:
            wanted = pixels.new_zeros((len(pixels), self.num_classes))
        else:
            labels = torch.cat(batch.targets.labels)
            wanted = smoothed(labels, self.num_classes, self.mix.smoothing)
            pixels, wanted = mixed(pixels, wanted, self.mix, generator)
        logits: Tensor = model(pixels)
        with torch.autocast(logits.device.type, enabled=False):
            entropy = -(wanted * logits.float().log_softmax(-1)).sum()
            total = share.of_pictures(entropy)
        return Losses(total, {"loss_ce": total.detach()})


def smoothed(
    labels: Int64[Tensor, " batch"], num_classes: int, smoothing: float
) -> Float[Tensor, "batch classes"]:
    """The class of each picture with a share of it spread evenly (Szegedy et al., CVPR 2016, 7)."""
    certain = F.one_hot(labels, num_classes).float()
    return (1 - smoothing) * certain + smoothing / num_classes


def mixed(
    pixels: Float[Tensor, "batch 3 height width"],
    wanted: Float[Tensor, "batch classes"],
    settings: MixSettings,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch classes"]]:
    """Each picture mixed with that at the opposite place, and their targets in the same shares.

    Mixup where both are on in half of the batches, else a rectangle of the other picture.
    """
    both = settings.mixup > 0 and settings.cutmix > 0
    if not (settings.mixup or settings.cutmix):
        return pixels, wanted
    draws = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    mixes = bool(draws.random() < 0.5) if both else settings.mixup > 0
    alpha = settings.mixup if mixes else settings.cutmix
    kept = float(draws.beta(alpha, alpha))
    others = pixels.flip(0)
    if mixes:
        pixels = kept * pixels + (1 - kept) * others
    else:
        rows, columns = _rectangle(pixels.shape[2], pixels.shape[3], 1 - kept, draws)
        pixels = pixels.clone()
        pixels[:, :, rows, columns] = others[:, :, rows, columns]
        taken = (rows.stop - rows.start) * (columns.stop - columns.start)
        kept = 1 - taken / (pixels.shape[2] * pixels.shape[3])
    return pixels, kept * wanted + (1 - kept) * wanted.flip(0)


def _rectangle(
    height: int, width: int, share: float, draws: np.random.Generator
) -> tuple[slice, slice]:
    """Rows and columns of a rectangle of that share of the area, cut off where it is outside."""
    found = []
    for side in (height, width):
        length, centre = round(side * math.sqrt(share)), int(draws.integers(side))
        start = centre - length // 2
        found.append(slice(max(0, start), min(side, start + length)))
    return found[0], found[1]


def _model(
    recipe: FinetuneRecipe, classes: Classes, is_fresh: bool
) -> tuple[Classifier, LoadReport | None]:
    if is_fresh:
        return initial_classifier(recipe.model.backbone, recipe.init, classes, recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    return Classifier(recipe.model.backbone, len(classes.names), generator), None


def _evaluation(
    recipe: FinetuneRecipe, classes: Classes, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module, Progress], Scoring] | None:
    if validation is None:
        return None

    def evaluate(model: nn.Module, progress: Progress) -> Scoring:
        scoring = evaluate_classifier(
            model,
            validation,
            classes,
            recipe.evaluation,
            recipe.classify.sizes,
            world,
            recipe.loop.precision,
            recipe.data.stream.reading,
            progress,
        )
        return judging(scoring)

    return evaluate
