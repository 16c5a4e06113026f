"""What the numbers of evaluations are called, known before anything is evaluated.

A recipe that waits for a number that no evaluation gives is refused; tests hold these names to
those of the evaluations.
"""

from collections.abc import Sequence
from itertools import product

from finetune.evaluation import EvaluationProtocol

QUALITY_NAMES = tuple(
    f"{name}{part}" for part, name in product(("", "_things", "_stuff"), ("pq", "sq", "rq"))
)
"""Of a mask head."""

ACCURACY_NAMES = ("top1", "top5")
"""Of a classifier."""

MASK_NAMES = ("mask_ap", "mask_ap50", "mask_ap75")
"""Of Mask R-CNN's masks, where the data have some."""

_PRECISIONS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_RECALLS_BY_SIZE = ("ar_small", "ar_medium", "ar_large")


def number_names(protocols: Sequence[EvaluationProtocol], max_detections: int) -> tuple[str, ...]:
    """Of a detector's boxes."""
    names: list[str] = []
    for protocol in protocols:
        if protocol == "coco":
            recalls = dict.fromkeys(("ar1", "ar10", f"ar{max_detections}"))
            names += [*_PRECISIONS, *recalls, *_RECALLS_BY_SIZE]
        else:
            names += [f"{protocol}_{name}" for name in ("ap", "ap50", "ap75")]
    return tuple(names)


def one_shot_names(protocols: Sequence[EvaluationProtocol]) -> tuple[str, ...]:
    """Of a one-shot detector."""
    prefixes = ["" if protocol == "coco" else f"{protocol}_" for protocol in protocols]
    return tuple(f"{prefix}{name}_ap50" for prefix in prefixes for name in ("seen", "unseen"))
