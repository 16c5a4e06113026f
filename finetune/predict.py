"""A detector in Python: `load_detector(weights).predict(pictures)`.

Pictures that come out of the resize with the same size share a batch, others never do: nothing is
padded, so an answer does not depend on the pictures that went with it. (Padding masks alone do not
give that: the CNN has constants in its folded BatchNorms and carries them from the padding into the
picture, in DETR as here.) EXIF orientation is ignored, as in training: boxes are in pixels of the
picture as it is stored.
"""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8

from data.normalise import normalised_images
from data.pictures import BrokenPicture, resize, resized_size
from finetune.artefacts import build_detector, open_weights
from finetune.picture_sources import ImageInput, decoded, described
from models.artefact import Artefact, PictureInput
from models.backbone import frozen_dtype
from models.matching import ClassScores
from models.postprocess import MAX_PAIRS, detections
from models.structures import Classes, Images, LayerOutput

Device = Literal["auto", "cpu", "cuda"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class CocoResult(TypedDict):
    """One box in COCO's results format."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float


@dataclass(frozen=True)
class Predictions:
    """What was found in one picture, the surest first."""

    labels: Int64[np.ndarray, " boxes"]
    """The detector's own classes, 0 first."""
    ids: Int64[np.ndarray, " boxes"]
    """The numbers of the classes in the data that it learned from, e.g. COCO's 1..90."""
    names: tuple[str, ...]
    scores: Float32[np.ndarray, " boxes"]
    boxes_xyxy: Float32[np.ndarray, "boxes 4"]
    """In pixels of the given picture, as the detector says them: not clipped to it."""
    height: int
    """Of the given picture, in pixels."""
    width: int

    def to_coco(self, image_id: int) -> list[CocoResult]:
        """The boxes in COCO's results format: (left, top, width, height), the data's class ids."""
        return [
            CocoResult(
                image_id=image_id,
                category_id=int(id),
                bbox=[box[0], box[1], box[2] - box[0], box[3] - box[1]],
                score=float(score),
            )
            for id, score, box in zip(self.ids, self.scores, self.boxes_xyxy.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class PreparedPicture:
    """A picture at the size at which the detector sees it, and its own size."""

    resized: UInt8[np.ndarray, "_ _ 3"]
    height: int
    """Before it was resized, in pixels."""
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as the detector sees it."""
        return self.resized.shape[0], self.resized.shape[1]


@dataclass(frozen=True)
class LoadedDetector:
    """A detector that is ready to be asked."""

    find: Callable[[Images], LayerOutput]
    """The last decoder layer's answer; its logits are those of `classes`, and with softmax scores
    of "no object".
    """
    classes: Classes
    input: PictureInput
    device: torch.device
    class_scores: ClassScores = "softmax"
    max_pairs: int = MAX_PAIRS

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        threshold: float = 0.5,
        batch_size: int = 8,
    ) -> list[Predictions]:
        """What is found in each picture with a score of at least `threshold`, in their order.

        A picture is a path, a URL, a file's bytes, a PIL picture or a uint8 array of height x width
        x 3 (RGB); one alone gives a list of one. Raises ValueError, naming the picture, where one
        cannot be used, OSError where it cannot be read.
        """
        check_request(threshold, batch_size)
        pictures = [images] if isinstance(images, ImageInput) else list(images)
        found: list[Predictions | None] = [None] * len(pictures)
        prepared = ((n, self._prepared(n, picture)) for n, picture in enumerate(pictures))
        for batch in same_size_batches(prepared, lambda entry: entry[1].size, batch_size):
            answers = predict_batch(self, [picture for _, picture in batch], threshold)
            for (number, _), answer in zip(batch, answers, strict=True):
                found[number] = answer
        return [answer for answer in found if answer is not None]

    def _prepared(self, number: int, image: ImageInput) -> PreparedPicture:
        try:
            return prepare(decoded(image), self.input)
        except BrokenPicture as error:
            raise ValueError(f"images[{number}] ({described(image)}): {error}") from error


def load_detector(source: str, device: Device = "auto") -> LoadedDetector:
    """The detector in a file of weights, an exported folder or a run's folder (path or URL).

    `auto` is a GPU where there is one. On a GPU that computes in bfloat16 it does so; boxes and
    scores are float32. Raises ValueError where the weights are of another kind of model.
    """
    artefact = open_weights(source)
    _check_kind(artefact)
    target = device_of(device)
    is_mixed = target.type == "cuda" and frozen_dtype("auto", target) is torch.bfloat16
    model = (
        build_detector(for_inference(artefact, is_mixed)).eval().requires_grad_(False).to(target)
    )

    def find(images: Images) -> LayerOutput:
        with torch.autocast(target.type, torch.bfloat16, enabled=is_mixed):
            layer: LayerOutput = model(images).groups[0].layers[-1]
        return layer

    settings = artefact.detector
    return LoadedDetector(
        find,
        classes_of(artefact),
        artefact.input,
        target,
        settings.class_scores,
        settings.max_pairs,
    )


def prepare(picture: UInt8[np.ndarray, "_ _ 3"], size: PictureInput) -> PreparedPicture:
    """The picture resized by DETR's rule, as in evaluation."""
    height, width = picture.shape[:2]
    resized = resize(picture, *resized_size(height, width, size.short_side, size.max_size))
    return PreparedPicture(resized, height, width)


@torch.inference_mode()
def predict_batch(
    detector: LoadedDetector, pictures: Sequence[PreparedPicture], threshold: float
) -> list[Predictions]:
    """What is found in pictures that have one size when prepared, in one run of the detector."""
    layer = detector.find(prepared_images(pictures, detector.device))
    sizes = torch.tensor([[one.height, one.width] for one in pictures], device=detector.device)
    found = detections(layer, sizes, detector.class_scores, detector.max_pairs)
    scores, labels, boxes = found.scores.cpu(), found.labels.cpu(), found.boxes_xyxy.cpu()
    return [
        _predictions(
            detector.classes, scores[n].numpy(), labels[n].numpy(), boxes[n].numpy(), one, threshold
        )
        for n, one in enumerate(pictures)
    ]


def same_size_batches(
    items: Iterable[T], size_of: Callable[[T], Hashable], batch_size: int, max_waiting: int = 64
) -> Iterator[list[T]]:
    """The items in batches of one size each, at most `batch_size` in a batch.

    At most `max_waiting` items wait for others of their size: beyond that, the size for which most
    have come goes first. Within a size the order holds.
    """
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        size = size_of(item)
        waiting.setdefault(size, []).append(item)
        if len(waiting[size]) == batch_size:
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) > max_waiting:
            fullest = max(waiting, key=lambda size: len(waiting[size]))
            yield waiting.pop(fullest)
    yield from waiting.values()


def check_request(threshold: float, batch_size: int) -> None:
    """Raises ValueError where the threshold is no probability or the batch is empty."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is no probability; use 0 to 1, e.g. 0.5")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds no picture; use 1 or more")


def device_of(device: Device) -> torch.device:
    """The device of that name; ValueError for a GPU where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; use device=cpu or auto")
    return torch.device(device)


def _check_kind(artefact: Artefact) -> None:
    match artefact.kind:
        case "detector" | "panoptic":
            return
        case "patch_detector":
            raise ValueError(
                f"{artefact.source} is of pretraining: it finds patches and knows no classes; "
                "finetune it first (init=...)"
            )
        case "retinanet" | "mask_rcnn":
            raise ValueError(
                f"{artefact.source} is a {artefact.kind}: it is trained, evaluated and exported "
                "here, and not drawn; load its weights with torchvision, or use a detector"
            )
        case "classifier":
            raise ValueError(
                f"{artefact.source} is a classifier: it says what a picture shows and finds no "
                "boxes; take its backbone for a detector with model.backbone.weights="
            )
        case "one_shot":
            raise ValueError(
                f"{artefact.source} is a one-shot detector: it needs a crop of what to look for "
                "(--query crop.png)"
            )


def for_inference(artefact: Artefact, is_mixed: bool) -> Artefact:
    """With a backbone that is folded once; one that was frozen keeps the precision it had."""
    backbone = artefact.detector.backbone
    if not backbone.train:
        return artefact
    frozen = backbone.model_copy(
        update={"train": False, "frozen_precision": "bfloat16" if is_mixed else "float32"}
    )
    return replace(artefact, detector=artefact.detector.model_copy(update={"backbone": frozen}))


def classes_of(artefact: Artefact) -> Classes:
    """The classes of a detector; called by their numbers where its file does not name them."""
    if artefact.classes is not None:
        return artefact.classes
    assert artefact.detector.num_classes is not None
    numbers = tuple(range(artefact.detector.num_classes))
    _log.warning("%s names no classes; they are called by their numbers", artefact.source)
    return Classes(tuple(f"class {number}" for number in numbers), numbers)


def prepared_images(pictures: Sequence[PreparedPicture], device: torch.device) -> Images:
    """The pictures normalised on the device; of one size, so without padding."""
    levels = torch.from_numpy(np.stack([one.resized for one in pictures])).to(device)
    sizes = torch.tensor([one.size for one in pictures], device=device)
    return normalised_images(levels, sizes)


def _predictions(
    classes: Classes,
    scores: Float32[np.ndarray, " queries"],
    labels: Int64[np.ndarray, " queries"],
    boxes_xyxy: Float32[np.ndarray, "queries 4"],
    picture: PreparedPicture,
    threshold: float,
) -> Predictions:
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= threshold]
    return Predictions(
        labels=labels[order],
        ids=np.array(classes.ids, np.int64)[labels[order]],
        names=tuple(classes.names[label] for label in labels[order]),
        scores=scores[order],
        boxes_xyxy=boxes_xyxy[order],
        height=picture.height,
        width=picture.width,
    )
