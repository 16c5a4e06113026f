"""`querypatch evaluate WEIGHTS DATA`: weights of any kind, judged on any labelled set.

A detector by its boxes, one with a mask head by its segments where the data have some, a one-shot
detector by the classes that it is asked for. In float32, as papers do, but for a backbone that was
frozen in training: it keeps the precision that it had there. A run in bfloat16 may have told
slightly other numbers.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch

from data.classification_content import ClassSizes
from data.detection_set import DetectionSet, SetKind, open_detection_set
from data.evaluation_batches import EvaluationSizes
from finetune.artefacts import build_detector, open_weights
from finetune.classifier_evaluation import ClassifierEvaluation, evaluate_classifier
from finetune.classifier_weights import build_classifier, sizes_of
from finetune.evaluation import Evaluation, EvaluationSettings, Progress, evaluate_detector
from finetune.evaluation_report import evaluation_json, evaluation_text
from finetune.headed import build_headed
from finetune.headed_evaluation import HeadedEvaluation, evaluate_headed
from finetune.one_shot import OneShotSettings, shown_as_trained
from finetune.one_shot_evaluation import evaluate_one_shot, one_shot_test
from finetune.one_shot_report import OneShotEvaluation, one_shot_json, one_shot_text
from finetune.one_shot_weights import finished_one_shot
from finetune.panoptic_evaluation import PanopticEvaluation, evaluate_panoptic
from finetune.panoptic_postprocess import SegmentSettings
from finetune.panoptic_weights import build_panoptic
from finetune.use_overrides import is_of_model, used_with
from models.artefact import Artefact
from models.structures import Classes
from training.recipe import load_recipe
from training.world import World

logger = logging.getLogger(__name__)


class JudgeSettings(EvaluationSettings):
    """How weights are judged, with what only some kinds of weights ask for."""

    one_shot: OneShotSettings = OneShotSettings()
    """Of a one-shot detector: which classes are unseen, how many crops are asked with."""
    segments: SegmentSettings = SegmentSettings()
    """Of a detector with a mask head."""
    classify: ClassSizes | None = None
    """Of a classifier: the size of pictures; null takes that of the weights."""


@dataclass(frozen=True)
class Judged:
    """An evaluation, told."""

    text: str
    """Tables for a terminal."""
    content: Mapping[str, object]
    """Everything, as values of JSON."""


def judge_weights(
    source: str,
    data_url: str,
    overrides: Sequence[str],
    device: torch.device,
    progress: Progress | None = None,
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
) -> Judged:
    """The evaluation of the weights in a file, folder or run on the labelled set at `data_url`.

    `overrides` are `key=value` of `JudgeSettings`, or `model.key=value` as for `used_with`; `kind`
    and `pictures` are those of `open_detection_set`. Pictures have the size that the weights were
    made for, where `sizes` is not among them.

    Raises:
        RecipeError: an override that is none.
        WeightsError: there are no weights, or they find nothing by themselves.
        SourceError: the data are not what they are said to be.
        ValueError: no class in common, or classes that cannot be told.
    """
    of_model = [text for text in overrides if is_of_model(text)]
    settings = load_recipe(JudgeSettings, {}, [text for text in overrides if text not in of_model])
    artefact = used_with(open_weights(source), of_model)
    if artefact.kind == "classifier" and kind is None:
        kind = "classes"
    data = open_detection_set(data_url, kind=kind, pictures=pictures)
    fitting = settings.model_copy(update={"sizes": picture_sizes(artefact, settings)})
    return _told(_judged(artefact, data, fitting, device, progress))


def evaluate_weights(
    source: str,
    data_url: str,
    settings: EvaluationSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """The numbers of a detector's boxes alone; sizes and errors as for `judge_weights`."""
    artefact = open_weights(source)
    data = open_detection_set(data_url)
    fitting = settings.model_copy(update={"sizes": picture_sizes(artefact, settings)})
    return judged_boxes(artefact, data, fitting, device, progress)


def _judged(
    artefact: Artefact,
    data: DetectionSet,
    settings: JudgeSettings,
    device: torch.device,
    progress: Progress | None,
) -> Evaluation | PanopticEvaluation | OneShotEvaluation | ClassifierEvaluation | HeadedEvaluation:
    world = World.alone(device)
    match artefact.kind:
        case "panoptic" if data.kind == "coco_panoptic":
            return evaluate_panoptic(
                build_panoptic(artefact).to(device),
                data,
                classes_of(artefact, data),
                settings,
                settings.segments,
                world,
                progress=progress,
            )()
        case "one_shot":
            one_shot = shown_as_trained(settings.one_shot, artefact.input)
            test = one_shot_test(data, one_shot, settings)
            model = finished_one_shot(artefact).to(device)
            return evaluate_one_shot(model, test, world, progress=progress)()
        case "retinanet" | "mask_rcnn":
            return evaluate_headed(
                build_headed(artefact, settings.max_detections).to(device),
                data,
                classes_of(artefact, data),
                settings,
                world,
                progress=progress,
            )()
        case "classifier":
            return evaluate_classifier(
                build_classifier(artefact).to(device),
                data,
                classes_of(artefact, data),
                settings,
                settings.classify or sizes_of(artefact.input),
                world,
                progress=progress,
            )()
        case "detector" | "panoptic" | "patch_detector":
            return judged_boxes(artefact, data, settings, device, progress)
        case _:
            assert_never(artefact.kind)


def judged_boxes(
    artefact: Artefact,
    data: DetectionSet,
    settings: EvaluationSettings,
    device: torch.device,
    progress: Progress | None = None,
) -> Evaluation:
    """The numbers of the boxes that opened weights find; errors as for `judge_weights`."""
    detector = build_detector(artefact).to(device)
    classes = classes_of(artefact, data)
    world = World.alone(device)
    return evaluate_detector(
        detector,
        data,
        classes,
        settings,
        world,
        progress=progress,
        class_scores=artefact.detector.class_scores,
    )()


def _told(
    evaluation: Evaluation
    | PanopticEvaluation
    | OneShotEvaluation
    | ClassifierEvaluation
    | HeadedEvaluation,
) -> Judged:
    match evaluation:
        case Evaluation():
            return Judged(evaluation_text(evaluation), evaluation_json(evaluation))
        case PanopticEvaluation() | ClassifierEvaluation() | HeadedEvaluation():
            return Judged(evaluation.text(), evaluation.content())
        case OneShotEvaluation():
            return Judged(one_shot_text(evaluation), one_shot_json(evaluation))
        case _:
            assert_never(evaluation)


def picture_sizes(artefact: Artefact, settings: EvaluationSettings) -> EvaluationSizes:
    """Those that the settings say, else those that the weights were made for."""
    if "sizes" in settings.model_fields_set:
        return settings.sizes
    return EvaluationSizes(short_side=artefact.input.short_side, max_size=artefact.input.max_size)


def classes_of(artefact: Artefact, data: DetectionSet) -> Classes:
    """Those that the file names; where it names none, the data's if they are equally many."""
    if artefact.classes is not None:
        return artefact.classes
    if artefact.detector.num_classes != len(data.classes.names):
        raise ValueError(
            f"{artefact.source} names none of its {artefact.detector.num_classes} classes, and "
            f"{data.url} has {len(data.classes.names)}: evaluate on data with the classes that it "
            "learned"
        )
    logger.warning(
        "%s names none of its classes: taking them for those of %s, in their order",
        artefact.source,
        data.url,
    )
    return data.classes
