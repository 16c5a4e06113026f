"""Weights of classifiers as others publish them: a backbone with its head.

torchvision and timm name a ResNet's head `fc`; that of a Swin is `head` (its authors, torchvision)
or `head.fc` (timm), after a norm of the last map, which is the output norm of our backbone.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Literal, assert_never

from torch import Tensor

from models.classifier import Classifier
from models.interop.backbones import backbone_tensors, file_names
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.placing import FileNames, LoadReport, place_tensors

Head = Literal["file", "new"]
"""Where a classifier's head comes from: of the file, or random, for classes of one's own."""

_BODY = "backbone.body."
_HEAD = "head."

_log = logging.getLogger(__name__)


def load_classifier(classifier: Classifier, source: str, head: Head = "file") -> LoadReport:
    """Fill a classifier from a path or URL, and log what became of every tensor.

    WeightsError, naming the tensors, unless the file brings all of them (but the head, where that
    is to be new), and every other one of the file is known to be of no use.
    """
    report = place_classifier(classifier, read_tensors(source), source, head)
    _log.info("classifier from %s: %s", source, report.summary())
    return report


def place_classifier(
    classifier: Classifier, tensors: Mapping[str, Tensor], source: str, head: Head
) -> LoadReport:
    """As `load_classifier`, from tensors that were read."""
    body = backbone_tensors(tensors)
    names = file_names(classifier.backbone, body, source)
    new = [_BODY + pattern for pattern in _new_of_the_body(names, classifier, body)]
    match head:
        case "new":
            new.append(f"{_HEAD}*")
        case "file":
            _check_head(classifier, names, body, source)
        case _:
            assert_never(head)
    return place_tensors(
        classifier,
        body,
        file_name=classifier_name(classifier, names),
        left_out=names.left_out,
        new=new,
        source=source,
    )


def classifier_name(classifier: Classifier, names: FileNames) -> Callable[[str], str]:
    """From our name of a classifier's tensor to the file's."""
    norm = _last_norm(classifier)

    def name(ours: str) -> str:
        if ours.startswith(_HEAD):
            return names.head + ours.removeprefix(_HEAD)
        inner = ours.removeprefix(_BODY)
        if names.norm is not None and inner.startswith(norm):
            return names.norm + inner.removeprefix(norm)
        return names.name(inner)

    return name


def _new_of_the_body(
    names: FileNames, classifier: Classifier, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Norms of other maps, which classifiers' files lack, and of the last in detectors' files."""
    if names.norm is None:
        return list(names.new)
    last = classifier.backbone.body.num_stages - 1
    new = [f"norms.{stage}.*" for stage in range(last)]
    return new if f"{names.norm}weight" in tensors else [*new, f"{_last_norm(classifier)}*"]


def _last_norm(classifier: Classifier) -> str:
    return f"norms.{classifier.backbone.body.num_stages - 1}."


def _check_head(
    classifier: Classifier, names: FileNames, tensors: Mapping[str, Tensor], source: str
) -> None:
    """The commonest misfit has an answer of its own."""
    weight = tensors.get(f"{names.head}weight")
    if weight is None:
        raise WeightsError(
            f"{source} has no {names.head}weight: it is no classifier's; give one's file, or begin "
            "with a new head"
        )
    if len(weight) != classifier.head.out_features:
        raise WeightsError(
            f"{source} tells {len(weight)} classes apart and the model "
            f"{classifier.head.out_features}; say num_classes={len(weight)}, or begin with a new "
            "head"
        )
