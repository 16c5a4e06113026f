"""RetinaNet and Mask R-CNN as tasks: torchvision's heads on our backbones, in the same run.

Losses are torchvision's, means over the pictures that are computed together, weighted by how many
these are; RetinaNet's are means over pictures to the letter, so that parts add up to the whole
batch. Mask R-CNN draws which proposals it learns from (from dropout's state) and counts them
together: other workers learn from others. Its masks are the segments of COCO panoptic's things.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data.detection_batches import PackedDetectionBatch, detection_to_device
from data.detection_content import DetectionContent
from data.detection_set import DetectionSet
from data.panoptic_content import PanopticContent
from finetune.artefacts import open_weights
from finetune.evaluation import Progress
from finetune.headed_evaluation import evaluate_headed
from finetune.recipe import FinetuneRecipe
from finetune.task import Scoring, Task, TaskSets, judging
from models.artefact import Artefact
from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError
from models.interop.placing import LoadReport, place_tensors
from models.other_heads import HeadedDetector, HeadName, torchvision_targets
from models.shares import Share, counts_of
from models.structures import Classes, DetectionBatch, Losses
from models.urls import public_url
from training.world import World


@dataclass(frozen=True)
class HeadedObjective:
    """torchvision's losses of a batch; a value, so that the loop can call it with any model."""

    head: HeadName
    things: tuple[bool, ...] | None
    """Which classes have masks to learn; None where there are none."""

    def counts(self, batch: DetectionBatch) -> Float[Tensor, "3"]:
        """Its pictures."""
        return counts_of(batch.targets, 1, blank=batch.blank)

    def __call__(
        self,
        model: nn.Module,
        batch: DetectionBatch,
        share: Share,
        generator: torch.Generator,  # noqa: ARG002  (what is drawn is torchvision's)
    ) -> Losses:
        """The losses of one part of a batch, as its share of those of the whole."""
        found: dict[str, Tensor] = model(batch.images, self.targets(batch))
        count = 0.0 if batch.blank else float(len(batch.targets.labels))
        terms = {name: share.of_pictures(count * loss.float()) for name, loss in found.items()}
        total = torch.stack(list(terms.values())).sum()
        return Losses(total, {name: term.detach() for name, term in terms.items()})

    def targets(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """Of torchvision's form; with masks of things alone."""
        boxes, labels = batch.targets.boxes_cxcywh, batch.targets.labels
        if self.things is None:
            return torchvision_targets(batch.images, boxes, labels, self.head)
        are_things = torch.tensor(self.things, device=labels[0].device)
        kept = [are_things[each] for each in labels]
        masks = tuple(self._masks(batch, number)[keep] for number, keep in enumerate(kept))
        return torchvision_targets(
            batch.images,
            tuple(each[keep] for each, keep in zip(boxes, kept, strict=True)),
            tuple(each[keep] for each, keep in zip(labels, kept, strict=True)),
            self.head,
            masks,
        )

    def _masks(self, batch: DetectionBatch, number: int) -> Bool[Tensor, "targets height width"]:
        """Of each target of a picture; segments are numbered like targets, from 1."""
        assert batch.segments is not None
        height, width = batch.images.sizes[number].tolist()
        segments = batch.segments[number, :height, :width]
        numbers = torch.arange(1, len(batch.targets.labels[number]) + 1, device=segments.device)
        return segments[None] == numbers[:, None, None]


def headed_task(
    recipe: FinetuneRecipe, head: HeadName, sets: TaskSets, world: World, is_fresh: bool
) -> Task[PackedDetectionBatch]:
    """RetinaNet or Mask R-CNN for the classes of the training set.

    Its first weights are those of the recipe where the run `is_fresh`; else a checkpoint fills it.
    Raises WeightsError where weights do not fit, ValueError where the data have no masks.
    """
    classes = sets.train.classes
    if head == "mask_rcnn" and classes.things is None:
        raise ValueError(
            f"{sets.train.url} has no segments, from which task=mask_rcnn learns its masks; give a "
            "COCO panoptic json (data.kind=coco_panoptic), or use task=retinanet"
        )
    model, report = _model(recipe, head, classes, is_fresh)
    content: DetectionContent | PanopticContent
    if head == "mask_rcnn":
        content = PanopticContent(classes=classes, augment=recipe.data.augment)
    else:
        content = DetectionContent(classes, recipe.data.difficult, recipe.data.augment)
    return Task(
        model=model,
        backbone=model.backbone,
        load_report=report,
        kind=head,
        content=content,
        to_device=detection_to_device,
        objective=HeadedObjective(head, classes.things if head == "mask_rcnn" else None),
        evaluate=_evaluation(recipe, classes, sets.validation, world),
    )


def build_headed(artefact: Artefact, max_detections: int = 100) -> HeadedDetector:
    """The detector of an artefact with its weights, in evaluation mode, on the CPU.

    Raises:
        WeightsError: it is of another kind, or its tensors do not fit.
    """
    match artefact.kind:
        case "retinanet" | "mask_rcnn" as head:
            assert artefact.detector.num_classes is not None
            model = HeadedDetector(
                artefact.detector.backbone,
                head,
                artefact.detector.num_classes,
                torch.Generator(),
                max_detections,
            )
        case _:
            raise WeightsError(
                f"{artefact.source} is a {artefact.kind}; train one of torchvision's heads with "
                "task=retinanet or task=mask_rcnn"
            )
    _fill(model, artefact)
    return model.eval()


def _model(
    recipe: FinetuneRecipe, head: HeadName, classes: Classes, is_fresh: bool
) -> tuple[HeadedDetector, LoadReport | None]:
    model = HeadedDetector(
        recipe.model.backbone,
        head,
        len(classes.names),
        torch.Generator().manual_seed(recipe.seed),
        recipe.evaluation.max_detections,
    )
    if not is_fresh:
        return model, None
    if recipe.init is None:
        return model, _from_backbone(model)
    artefact = open_weights(recipe.init)
    if artefact.kind != head or artefact.classes is None or artefact.classes.names != classes.names:
        raise WeightsError(
            f"init={artefact.source} is no {head} of these classes; take a backbone with "
            "model.backbone.weights= and from_scratch=true"
        )
    return model, _fill(model, artefact)


def _fill(model: HeadedDetector, artefact: Artefact) -> LoadReport:
    return place_tensors(
        model,
        artefact.tensors,
        file_name=lambda name: name,
        left_out=(),
        new=(),
        source=artefact.source,
    )


def _from_backbone(model: HeadedDetector) -> LoadReport:
    found = load_backbone(model.backbone)
    loaded = tuple(f"model.backbone.own.body.{name}" for name in found.loaded)
    weights = model.backbone.settings.weights
    shown = weights and public_url(weights)
    return LoadReport(
        loaded=loaded,
        reshaped=(),
        new=tuple(name for name in model.state_dict() if name not in set(loaded)),
        left_out=found.left_out,
        notes=("from scratch: no init", f"backbone: that of model.backbone.weights={shown}"),
        chain=(shown,) if loaded and shown else (),
    )


def _evaluation(
    recipe: FinetuneRecipe, classes: Classes, validation: DetectionSet | None, world: World
) -> Callable[[nn.Module, Progress], Scoring] | None:
    if validation is None:
        return None

    def evaluate(model: nn.Module, progress: Progress) -> Scoring:
        assert isinstance(model, HeadedDetector)
        scoring = evaluate_headed(
            model,
            validation,
            classes,
            recipe.evaluation,
            world,
            recipe.loop.precision,
            recipe.data.stream.reading,
            progress,
        )
        return judging(scoring)

    return evaluate
