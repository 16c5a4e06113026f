"""The detection task: boxes of all classes, by the set criterion (DETR, section 3)."""

from collections.abc import Callable

from data.detection_batches import PackedDetectionBatch
from data.detection_content import DetectionContent, detection_to_device
from torch import nn

from data.detection_set import DetectionSet
from finetune.evaluation import evaluate_detector
from finetune.evaluation_report import evaluation_content
from finetune.objective import DetectionObjective
from finetune.recipe import FinetuneRecipe
from finetune.task import Judgement, Scoring, Task
from finetune.transfer import initial_detector
from models.structures import Classes
from training.world import World


def detection_task(
    recipe: FinetuneRecipe, train: DetectionSet, validation: DetectionSet | None, world: World
) -> Task[PackedDetectionBatch]:
    """A detector for the classes of `train`. Raises WeightsError where weights do not fit."""
    detector, report = initial_detector(recipe.model, recipe.init, train.classes, recipe.seed)
    return Task(
        model=detector,
        backbone=detector.backbone,
        load_report=report,
        kind="detector",
        content=DetectionContent(
            classes=train.classes,
            difficult=recipe.data.difficult,
            augment=recipe.data.augment,
        ),
        to_device=detection_to_device,
        objective=DetectionObjective(recipe.costs, recipe.losses, world),
        evaluate=_evaluation(recipe, train.classes, validation, world),
    )


def _evaluation(
    recipe: FinetuneRecipe, classes: Classes, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module], Scoring] | None:
    if validation is None:
        return None

    def evaluate(model: nn.Module) -> Scoring:
        scoring = evaluate_detector(
            model,
            validation,
            classes,
            recipe.evaluation,
            world,
            recipe.loop.precision,
            recipe.data.stream.reading,
        )

        def score() -> Judgement:
            evaluation = scoring()
            return Judgement(evaluation.metrics(), evaluation_content(evaluation))

        return score

    return evaluate
