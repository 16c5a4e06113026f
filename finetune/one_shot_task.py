"""The one-shot task: all boxes of the class of one query crop (UP-DETR, section 4.4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_set import DetectionSet
from data.one_shot_content import one_shot_set, seen_labels
from data.query_crops import list_objects
from data.set_annotations import set_annotations
from finetune.evaluation import Progress
from finetune.objective import AS_DETR, DetectionObjective
from finetune.one_shot_evaluation import evaluate_one_shot, one_shot_test
from finetune.one_shot_report import one_shot_json
from finetune.one_shot_weights import initial_one_shot
from finetune.recipe import FinetuneRecipe
from finetune.task import Judgement, Scoring, Task, TaskSets
from models.detection_losses import Supervision, supervision_of
from models.interop.placing import LoadReport
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.one_shot import one_shot_detector
from models.patch_queries import PatchDetector, PatchOutput
from models.shares import Share, counts_of
from models.structures import DetectionBatch, Losses
from training.world import World


def one_shot_task(
    recipe: FinetuneRecipe, sets: TaskSets, world: World, is_fresh: bool
) -> Task[PackedDetectionBatch]:
    """A detector that finds what a crop shows, trained on the seen classes alone.

    Its first weights are those of the recipe where the run `is_fresh`; else a checkpoint fills it.
    Raises WeightsError where weights do not fit, ValueError where nothing can be asked for.
    """
    model, report = _model(recipe, is_fresh)
    reading = recipe.data.stream.reading
    objects = list_objects(set_annotations(sets.train, reading), sets.train.classes)
    pictures, content = one_shot_set(
        sets.train,
        objects,
        recipe.one_shot.unseen,
        recipe.data.difficult,
        recipe.one_shot.crops,
        recipe.data.augment,
    )
    return Task(
        model=model,
        backbone=model.detector.backbone,
        load_report=report,
        kind="one_shot",
        content=content,
        to_device=detection_to_device,
        objective=OneShotObjective(
            recipe.costs,
            recipe.losses,
            model.detector.settings.total_queries,
            supervision_of(model.detector.settings),
        ),
        evaluate=_evaluation(recipe, sets.validation, world),
        pictures=pictures,
    )


def check_unseen(
    unseen: Sequence[str], train: DetectionSet, validation: DetectionSet | None
) -> None:
    """Raises ValueError where an unseen class is none of a set's; reads no picture."""
    for data in (train, validation):
        if data is not None:
            seen_labels(data.classes, unseen, data.url)


@dataclass(frozen=True)
class OneShotObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    costs: MatchingCosts
    weights: LossWeights
    num_queries: int
    """Of the detector."""
    supervision: Supervision = AS_DETR

    def counts(self, batch: DetectionBatch) -> Float[Tensor, "3"]:
        """What the losses of a batch are divided by; those of its parts add up."""
        return counts_of(batch.targets, self.num_queries, blank=batch.blank)

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        share: Share,
        generator: torch.Generator,  # noqa: ARG002  (nothing is drawn)
    ) -> Losses:
        """The losses of one part; predictions that are not finite give a total of NaN."""
        output: PatchOutput = model(batch.images, batch.query_patches)
        detection = DetectionObjective(self.costs, self.weights, self.num_queries, self.supervision)
        return detection.losses(output.detection, batch, share)


def _model(recipe: FinetuneRecipe, is_fresh: bool) -> tuple[PatchDetector, LoadReport | None]:
    if is_fresh:
        return initial_one_shot(recipe.model, recipe.init, recipe.seed)
    return one_shot_detector(recipe.model, torch.Generator().manual_seed(recipe.seed)), None


def _evaluation(
    recipe: FinetuneRecipe, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module, Progress], Scoring] | None:
    if validation is None:
        return None
    reading = recipe.data.stream.reading
    test = one_shot_test(validation, recipe.one_shot, recipe.evaluation, reading)

    def evaluate(model: nn.Module, progress: Progress) -> Scoring:
        assert isinstance(model, PatchDetector)
        scoring = evaluate_one_shot(model, test, world, recipe.loop.precision, reading, progress)

        def score() -> Judgement:
            evaluation = scoring()
            return Judgement(evaluation.metrics(), one_shot_json(evaluation))

        return score

    return evaluate
