"""The detection task: boxes of all classes, by the set criterion (DETR, section 3)."""

from collections.abc import Callable

import torch
from torch import nn

from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_content import DetectionContent
from data.detection_set import DetectionSet
from finetune.distillation import distilled_task
from finetune.evaluation import Progress, evaluate_detector
from finetune.evaluation_report import evaluation_json
from finetune.objective import DetectionObjective
from finetune.recipe import FinetuneRecipe
from finetune.task import Judgement, Scoring, Task, TaskSets
from finetune.teacher import open_teacher
from finetune.transfer import initial_detector
from models.detection_losses import supervision_of
from models.detector import Detector
from models.interop.placing import LoadReport
from models.structures import Classes
from training.world import World


def detection_task(
    recipe: FinetuneRecipe, sets: TaskSets, world: World, is_fresh: bool
) -> Task[PackedDetectionBatch]:
    """A detector for the classes of the training set.

    Its first weights are those of the recipe where the run `is_fresh`; else a checkpoint fills it.
    Raises WeightsError where weights do not fit.
    """
    classes = sets.train.classes
    detector, report = _detector(recipe, classes, is_fresh)
    objective = DetectionObjective(
        recipe.costs,
        recipe.losses,
        detector.settings.total_queries,
        supervision_of(detector.settings),
    )
    task = Task(
        model=detector,
        backbone=detector.backbone,
        load_report=report,
        kind="detector",
        content=DetectionContent(
            classes=classes,
            difficult=recipe.data.difficult,
            augment=recipe.data.augment,
        ),
        to_device=detection_to_device,
        objective=objective,
        evaluate=_evaluation(recipe, classes, sets.validation, world),
    )
    if recipe.distill is None:
        return task
    teacher = open_teacher(recipe.distill, detector.settings, classes)
    return distilled_task(task, objective, teacher, recipe.seed, world)


def _detector(
    recipe: FinetuneRecipe, classes: Classes, is_fresh: bool
) -> tuple[Detector, LoadReport | None]:
    if is_fresh:
        return initial_detector(recipe.model, recipe.init, classes, recipe.seed)
    return Detector(recipe.model, torch.Generator().manual_seed(recipe.seed)), None


def _evaluation(
    recipe: FinetuneRecipe, classes: Classes, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module, Progress], Scoring] | None:
    if validation is None:
        return None

    def evaluate(model: nn.Module, progress: Progress) -> Scoring:
        scoring = evaluate_detector(
            model,
            validation,
            classes,
            recipe.evaluation,
            world,
            recipe.loop.precision,
            recipe.data.stream.reading,
            progress,
            recipe.model.class_scores,
        )

        def score() -> Judgement:
            evaluation = scoring()
            return Judgement(evaluation.metrics(), evaluation_json(evaluation))

        return score

    return evaluate
