"""One-shot detection: the same detector, told by one crop which class to find (UP-DETR, 4.4).

A detector of query patches with one patch: its pooled CNN feature, projected, goes to all object
queries of its picture, so no queries are hidden from each other. The names and shapes of the
tensors are those of pretraining, hence `patch2query` of UP-DETR's public file loads like the rest.
What is asked is asked of a finished memory: several crops cost one run of CNN and encoder.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from models.detector_settings import DetectorSettings
from models.matching import ClassScores
from models.patch_queries import PatchDetector, QueryPatches
from models.structures import LayerOutput, Memory

MATCHES = 1
"""Label of an object of the class that is asked for, as of a patch's own box in pretraining.

Label 0 is dead and 2 is "no object": so the public class head has its three rows.
"""

NUM_CLASSES = 2

ONE_CROP = QueryPatches(num_patches=1, attention_mask=False, mask_ratio=0.0, reconstruction=False)
"""One crop for all queries, never hidden: a query without it could not know what to look for."""


def one_shot_settings(settings: DetectorSettings) -> DetectorSettings:
    """The settings with the labels of one-shot detection; ValueError for another class count."""
    if settings.num_classes not in (None, NUM_CLASSES):
        raise ValueError(
            f"num_classes={settings.num_classes}: one-shot detection has {NUM_CLASSES} labels, a "
            'dead one and "matches", whatever the classes of the data; leave num_classes out'
        )
    return settings.model_copy(update={"num_classes": NUM_CLASSES})


def one_shot_detector(settings: DetectorSettings, generator: torch.Generator) -> PatchDetector:
    """A one-shot detector with weights drawn from `generator`; forward takes one crop a picture."""
    return PatchDetector(one_shot_settings(settings), ONE_CROP, generator)


def search(
    model: PatchDetector,
    memory: Memory,
    features: Float[Tensor, "batch crops channels"],
) -> tuple[LayerOutput, ...]:
    """What the last decoder layer finds for each crop, from one memory of the pictures.

    `features` are `model.patch_features` of the crops. The answer to a crop does not depend on the
    other crops: it is what forward says for that crop alone.
    """
    groups = tuple(model.query_group(one, None) for one in torch.split(features, 1, dim=1))
    return tuple(group.layers[-1] for group in model.detector.decode(memory, groups).groups)


def matches_only(layer: LayerOutput, class_scores: ClassScores) -> LayerOutput:
    """The same answer with two logits of a softmax, "matches" (label 0) and everything else.

    The probability of "matches" stays what it is: that of the softmax over all three, or its own
    sigmoid.
    """
    if class_scores == "sigmoid":
        match = layer.logits[..., MATCHES]
        return replace(layer, logits=torch.stack((match, torch.zeros_like(match)), dim=-1))
    others = [label for label in range(NUM_CLASSES + 1) if label != MATCHES]
    rest = layer.logits[..., others].logsumexp(-1)
    logits = torch.stack((layer.logits[..., MATCHES], rest), dim=-1)
    return replace(layer, logits=logits)
