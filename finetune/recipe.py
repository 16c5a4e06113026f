"""The recipe of a finetuning run: detector, weights, labelled pictures, schedule."""

from collections.abc import Mapping
from typing import Literal, Self, assert_never

from pydantic import Field, model_validator

from data.detection_set import SetKind
from data.detection_transforms import AugmentSettings
from data.loader import StreamSettings
from data.order import OrderSettings
from data.subsets import SubsetSettings
from finetune.classify import ClassifySettings
from finetune.distill import DistillSettings
from finetune.evaluation import EvaluationSettings
from finetune.metric_names import (
    ACCURACY_NAMES,
    MASK_NAMES,
    QUALITY_NAMES,
    number_names,
    one_shot_names,
)
from finetune.one_shot import OneShotSettings
from finetune.panoptic import PanopticSettings
from models.detector_settings import DetectorSettings
from models.interop.backbones import RANDOM_WEIGHTS
from models.losses import LossWeights
from models.matching import MatchingCosts
from models.settings import Settings
from training import run_recipe
from training.early_stop import EarlyStopSettings
from training.run_recipe import RunRecipe, absolute

FREE_KEYS = (*run_recipe.FREE_KEYS, "evaluation.batch_size", "evaluation.processes")
"""Keys, and sections with a dot, that a resumed run may change: they change nothing it learns."""

RECIPES = "finetune.recipes"
"""The package of the recipes that come with querypatch."""

USERS_KEYS = ("run", "data.train", "model.backbone.weights")
"""Keys that no recipe can know; see `users_keys`."""

SAME = "same"
"""For `data.validation`: judge on the pictures that are learned from."""


class DetectionData(Settings):
    """The labelled pictures."""

    train: str
    """What to learn from: a COCO json, a VOC root, a YOLO data.yaml or annotated shards, by path or
    any fsspec URL; `#SPLIT` names a split, e.g. VOCdevkit#07+12-trainval or data.yaml#train.
    """
    validation: str | None = None
    """What to evaluate on, in the same words; null evaluates nothing. `same` takes the pictures
    that are learned from, to see whether they can be overfit.
    """
    kind: SetKind | None = None
    """What `train` and `validation` are; null finds it out."""
    train_pictures: str | None = None
    """Folder of the pictures of a COCO json that does not lie beside them."""
    validation_pictures: str | None = None
    """The same for `validation`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in order, for shards that do not name them; null takes the data's."""
    difficult: Literal["keep", "drop"] = "keep"
    """Whether objects marked difficult (VOC) are learned; how they count is `evaluation.difficult`.
    """
    subset: SubsetSettings | None = None
    """Learn from a seeded part of `train` alone; null takes all."""
    augment: AugmentSettings = AugmentSettings()
    """How pictures change; `kind: none` shows always the same pixels."""
    order: OrderSettings = OrderSettings()
    """The order of the pictures."""
    stream: StreamSettings = StreamSettings()
    """How the pictures are brought in; nothing here changes what is learned."""


class FinetuneRecipe(RunRecipe):
    """One finetuning run."""

    stage: Literal["finetune"] = "finetune"
    """The kind of run that this recipe is of."""
    task: Literal["detect", "one_shot", "panoptic", "classify", "retinanet", "mask_rcnn"] = "detect"
    """Boxes of all classes; boxes of the class of a query crop; a mask head on a finished detector;
    one class for a whole picture, by the backbone alone; boxes, or boxes and masks, by
    torchvision's heads on the backbone.
    """
    from_scratch: bool = False
    """Start with random weights in all but the backbone: to be said where `init` is not."""
    global_batch: int = Field(default=16, ge=1)
    """Pictures in one batch of all workers together."""
    model: DetectorSettings
    """The detector. What `init` tells of it need not be said; what is said must agree with it."""
    costs: MatchingCosts = MatchingCosts()
    """What the matching weighs."""
    losses: LossWeights = LossWeights()
    """What the loss weighs."""
    data: DetectionData
    """The pictures."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """How the detector is judged."""
    one_shot: OneShotSettings = OneShotSettings()
    """Of task one_shot."""
    panoptic: PanopticSettings = PanopticSettings()
    """Of task panoptic."""
    classify: ClassifySettings = ClassifySettings()
    """Of task classify."""
    distill: DistillSettings | None = None
    """Learn from a trained detector as well (D3ETR); of task detect. Null has no teacher."""
    best_metric: str = "eval/ap"
    """Metric of the evaluation by which the best weights are kept in `best/`."""
    early_stop: EarlyStopSettings | None = None
    """End the run when evaluations no longer improve; null never does."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.check_workers()
        if (self.init is None) != self.from_scratch:
            raise ValueError(
                f"init={self.init or 'null'} and from_scratch={str(self.from_scratch).lower()}: "
                "name the weights to start from with init=, or say from_scratch=true"
            )
        if self.from_scratch and self.model.backbone.weights is None:
            raise ValueError(
                "model.backbone.weights is not said; give the path or URL of a checkpoint, or "
                "random"
            )
        waits = self.early_stop is not None or self.checkpoints.best_metric is not None
        if waits and self.loop.score_in_background:
            raise ValueError(
                "early_stop and checkpoints.best_metric wait for every evaluation; use them with "
                "loop.score_in_background=false"
            )
        if self.task == "panoptic" and self.from_scratch:
            raise ValueError(
                "task=panoptic trains a mask head on a finished detector; name it with init=, a "
                "run of task=detect on the same classes"
            )
        if self.distill is not None and self.task != "detect":
            raise ValueError(
                f"distill.teacher is given with task={self.task}: only detectors of all classes "
                "learn from a teacher; use task=detect, or leave distill out"
            )
        self._check_metric("best_metric", self.best_metric)
        if self.early_stop is not None:
            self._check_metric("early_stop.metric", self.early_stop.metric)
        if self.checkpoints.best_metric is not None:
            self._check_metric("checkpoints.best_metric", self.checkpoints.best_metric)
        return self

    def _check_metric(self, key: str, metric: str) -> None:
        """A metric that no evaluation gives would keep and stop nothing, without a word."""
        given = [f"eval/{name}" for name in self._numbers()]
        if metric not in given:
            asked = f"evaluation.protocols={list(self.evaluation.protocols)}"
            raise ValueError(
                f"{key}={metric} is no number of task={self.task} with {asked}; use one of "
                f"{', '.join(given)}"
            )

    def _numbers(self) -> tuple[str, ...]:
        """What the evaluations of this recipe may tell, by name."""
        settings = self.evaluation
        match self.task:
            case "detect":
                return number_names(settings.protocols, settings.max_detections)
            case "one_shot":
                return one_shot_names(settings.protocols)
            case "panoptic":
                return QUALITY_NAMES
            case "classify":
                return ACCURACY_NAMES
            case "retinanet":
                return number_names(settings.protocols, settings.max_detections)
            case "mask_rcnn":
                numbers = number_names(settings.protocols, settings.max_detections)
                return (*numbers, *MASK_NAMES)
            case _:
                assert_never(self.task)


def users_keys(values: Mapping[str, object]) -> tuple[str, ...]:
    """Keys that a recipe of these plain values leaves to its user.

    From scratch without `init`; with a section `distill` a teacher.
    """
    init = () if values.get("from_scratch") else ("init",)
    teacher = () if values.get("distill") is None else ("distill.teacher",)
    return (*USERS_KEYS, *init, *teacher)


def with_absolute_paths(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The same recipe for processes with other working directories; URLs stay as they are."""
    backbone = recipe.model.backbone
    if backbone.weights != RANDOM_WEIGHTS:
        backbone = backbone.model_copy(update={"weights": absolute(backbone.weights)})
    distill = recipe.distill
    if distill is not None:
        distill = distill.model_copy(update={"teacher": absolute(distill.teacher)})
    return recipe.model_copy(
        update={
            "run": absolute(recipe.run),
            "init": absolute(recipe.init),
            "distill": distill,
            "data": _with_absolute_places(recipe.data),
            "model": recipe.model.model_copy(update={"backbone": backbone}),
        }
    )


def _with_absolute_places(data: DetectionData) -> DetectionData:
    subset = data.subset
    if subset is not None:
        subset = subset.model_copy(update={"manifest": absolute(subset.manifest)})
    return data.model_copy(
        update={
            "train": absolute(data.train),
            "validation": data.validation if data.validation == SAME else absolute(data.validation),
            "train_pictures": absolute(data.train_pictures),
            "validation_pictures": absolute(data.validation_pictures),
            "subset": subset,
        }
    )
