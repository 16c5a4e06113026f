"""The panoptic task: a mask head on a finished detector of things and stuff (DETR, section 4.4).

The first stage is ordinary detection on COCO panoptic, whose boxes are those of the segments. This
is the second: the detector stays as it is, the mask head is trained on its matched queries.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_set import DetectionSet
from data.panoptic_content import PanopticContent
from finetune.artefacts import open_weights
from finetune.evaluation import Progress
from finetune.panoptic_evaluation import evaluate_panoptic
from finetune.panoptic_weights import load_mask_head
from finetune.recipe import FinetuneRecipe
from finetune.task import Scoring, Task, TaskSets, judging
from finetune.transfer import initial_detector
from models.artefact import Artefact
from models.detector import Detector
from models.interop.checkpoint_files import WeightsError
from models.interop.class_names import match_names
from models.interop.placing import LoadReport
from models.mask_head import MatchedMasks, PanopticDetector
from models.mask_losses import MaskLossWeights, mask_losses, true_masks
from models.matching import MatchingCosts, UnmatchableError
from models.shares import Share, counts_of
from models.structures import Classes, DetectionBatch, Losses, Targets
from training.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PanopticObjective:
    """The losses of a batch; a value, so that the loop can call it with any model."""

    costs: MatchingCosts
    weights: MaskLossWeights
    num_queries: int
    """Of the detector."""

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
        assert batch.segments is not None
        try:
            found: MatchedMasks = model(batch.images, batch.targets, self.costs)
        except UnmatchableError as error:
            logger.warning("the step is left out: %s", error)
            return self._unmatched(model, batch)
        return mask_losses(
            found,
            true_masks(found.matching, batch.segments),
            sum(len(labels) for labels in batch.targets.labels),
            self.weights,
            share=share,
            blank=batch.blank,
        )

    def _unmatched(self, model: nn.Module, batch: DetectionBatch) -> Losses:
        """NaN that reaches every parameter."""
        found: MatchedMasks = model(batch.images, _no_targets(batch.targets), self.costs)
        return Losses(found.logits.float().sum() * torch.nan)


def panoptic_task(
    recipe: FinetuneRecipe, sets: TaskSets, world: World, is_fresh: bool
) -> Task[PackedDetectionBatch]:
    """A mask head for the detector of `recipe.init`, which must know all classes of the data.

    Its first weights are made where the run `is_fresh`; else a checkpoint fills it. Raises
    WeightsError, in one line, where the detector does not know them, and where weights do not fit.
    """
    classes = sets.train.classes
    if classes.things is None:
        raise WeightsError(
            f"{sets.train.url} says of no class whether it is thing or stuff: a mask head learns "
            "from a COCO panoptic json (data.kind=coco_panoptic)"
        )
    model, report = _model(recipe, classes, is_fresh)
    return Task(
        model=model,
        backbone=None,
        load_report=report,
        kind="panoptic",
        content=PanopticContent(classes=classes, augment=recipe.data.augment),
        to_device=detection_to_device,
        objective=PanopticObjective(recipe.costs, recipe.panoptic.losses, recipe.model.num_queries),
        evaluate=_evaluation(recipe, classes, sets.validation, world),
    )


def _model(
    recipe: FinetuneRecipe, classes: Classes, is_fresh: bool
) -> tuple[PanopticDetector, LoadReport | None]:
    """The detector with a mask head; both are drawn from the seed and then filled."""
    frozen = recipe.model.backbone.model_copy(update={"train": False})
    settings = recipe.model.model_copy(update={"backbone": frozen})
    generator = torch.Generator().manual_seed(recipe.seed)
    if not is_fresh:
        return PanopticDetector(
            Detector(settings, generator), recipe.panoptic.head, generator
        ), None
    assert recipe.init is not None, "the recipe asks for it"
    artefact = open_weights(recipe.init)
    _check_classes(artefact, classes)
    detector, report = initial_detector(settings, recipe.init, classes, recipe.seed)
    model = PanopticDetector(detector, recipe.panoptic.head, generator)
    return model, _with_head(report, model, artefact)


def _check_classes(artefact: Artefact, classes: Classes) -> None:
    """A frozen detector cannot learn a class."""
    if artefact.classes is None:
        raise WeightsError(
            f"init={artefact.source} does not name its classes, so that a mask head cannot be put "
            "on it; finetune it for boxes on this set first (task=detect)"
        )
    found = match_names(classes, artefact.classes)
    unknown = [name for name, label in zip(classes.names, found, strict=True) if label is None]
    if unknown:
        raise WeightsError(
            f"init={artefact.source} does not know {len(unknown)} of the classes, e.g. "
            f"{unknown[0]}, and a frozen detector cannot learn them; finetune it for boxes on this "
            "set first (task=detect)"
        )


def _with_head(report: LoadReport, model: PanopticDetector, artefact: Artefact) -> LoadReport:
    """The report with the detector's names as they are in the model, and with the mask head."""
    loaded, new = load_mask_head(model, artefact)
    return replace(
        report,
        loaded=(*(f"detector.{name}" for name in report.loaded), *loaded),
        reshaped=tuple(f"detector.{name}" for name in report.reshaped),
        new=(*(f"detector.{name}" for name in report.new), *new),
        left_out=tuple(name for name in report.left_out if name not in loaded),
    )


def _no_targets(targets: Targets) -> Targets:
    return Targets(
        tuple(boxes[:0] for boxes in targets.boxes_cxcywh),
        tuple(labels[:0] for labels in targets.labels),
    )


def _evaluation(
    recipe: FinetuneRecipe, classes: Classes, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module, Progress], Scoring] | None:
    if validation is None:
        return None

    def evaluate(model: nn.Module, progress: Progress) -> Scoring:
        assert isinstance(model, PanopticDetector)
        scoring = evaluate_panoptic(
            model,
            validation,
            classes,
            recipe.evaluation,
            recipe.panoptic.segments,
            world,
            recipe.loop.precision,
            recipe.data.stream.reading,
            progress,
        )
        return judging(scoring)

    return evaluate
