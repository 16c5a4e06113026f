"""`querypatch evaluate WEIGHTS DATA`: a detector from any file, judged on any labelled set."""

import logging

import torch

from data.detection_set import DetectionSet, SetKind, open_detection_set
from data.evaluation_batches import EvaluationSizes
from finetune.artefacts import build_detector, open_weights
from finetune.evaluation import Evaluation, EvaluationSettings, Progress, evaluate_detector
from models.artefact import Artefact
from models.structures import Classes
from training.world import World

logger = logging.getLogger(__name__)


def evaluate_weights(
    source: str,
    data_url: str,
    settings: EvaluationSettings,
    device: torch.device,
    progress: Progress | None = None,
    *,
    kind: SetKind | None = None,
    pictures: str | None = None,
) -> Evaluation:
    """The numbers of the detector in a file, folder or run on the labelled pictures at `data_url`.

    `kind` and `pictures` say what the data are and where their pictures lie, as for
    `open_detection_set`. Pictures have the size that the weights were made for, where `settings`
    does not set `sizes`. Computes in float32, as papers do; a run in bfloat16 may have told a
    slightly other number.

    Raises:
        WeightsError: there are no weights, or they are no detector's.
        SourceError: the data are not what they are said to be.
        ValueError: no class in common, or classes that cannot be told.
    """
    artefact = open_weights(source)
    detector = build_detector(artefact).to(device)
    data = open_detection_set(data_url, kind=kind, pictures=pictures)
    fitting = settings.model_copy(update={"sizes": _sizes(artefact, settings)})
    score = evaluate_detector(
        detector,
        data,
        _classes(artefact, data),
        fitting,
        World.alone(device),
        progress=progress,
    )
    return score()


def _sizes(artefact: Artefact, settings: EvaluationSettings) -> EvaluationSizes:
    if "sizes" in settings.model_fields_set:
        return settings.sizes
    return EvaluationSizes(short_side=artefact.input.short_side, max_size=artefact.input.max_size)


def _classes(artefact: Artefact, data: DetectionSet) -> Classes:
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
