"""A detector that is shown what to look for: `load_one_shot(weights, ["mug.png"]).predict(...)`.

Every query crop is a class of its own, called by its file. Crops are turned into features once; a
picture is encoded once, however many there are. Several crops compete for nothing: each has all
object queries to itself.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.pictures import BrokenPicture, resize
from data.query_crops import CropSettings
from finetune.artefacts import open_weights
from finetune.one_shot_shares import normalised_crops
from finetune.one_shot_weights import finished_one_shot
from finetune.picture_sources import ImageInput, decoded, described
from finetune.predict import Device, LoadedDetector, device_of, for_inference
from models.backbone import frozen_dtype
from models.one_shot import matches_only, search
from models.patch_queries import PatchDetector
from models.structures import Classes, Images, LayerOutput


def load_one_shot(
    source: str,
    queries: Sequence[ImageInput],
    names: Sequence[str] | None = None,
    device: Device = "auto",
) -> LoadedDetector:
    """A one-shot detector that looks for what the crops show; label n is that of crop n.

    `source` is as for `load_detector`, or weights of pretraining, which find the crop itself. Crops
    are squashed to squares, of the size of those in training; `names` are those of the files.
    Raises ValueError, naming it, where a crop cannot be used, WeightsError where weights are of
    another kind.
    """
    classes = _classes(queries, names)
    artefact = open_weights(source)
    target = device_of(device)
    is_mixed = target.type == "cuda" and frozen_dtype("auto", target) is torch.bfloat16
    model = finished_one_shot(for_inference(artefact, is_mixed)).requires_grad_(False).to(target)
    side = artefact.input.query_side or CropSettings().side
    crops = np.stack([_crop(query, side) for query in queries])
    with torch.no_grad(), torch.autocast(target.type, torch.bfloat16, enabled=is_mixed):
        features = model.patch_features(normalised_crops(crops, target)[None])

    def find(images: Images) -> LayerOutput:
        with torch.autocast(target.type, torch.bfloat16, enabled=is_mixed):
            return find_all(model, images, features)

    return LoadedDetector(find, classes, artefact.input, target)


def find_all(
    model: PatchDetector, images: Images, features: Float[Tensor, "1 crops channels"]
) -> LayerOutput:
    """What is found for all crops, their object queries one after the other.

    Its logits are those of the crops and of anything else; a query says nothing of other crops.
    """
    batch, num_crops = len(images.sizes), features.shape[1]
    memory = model.detector.encode(images)
    scores = model.detector.settings.class_scores
    layers = search(model, memory, features.expand(batch, -1, -1))
    found = [matches_only(layer, scores) for layer in layers]
    logits = torch.cat([_spread(layer.logits, n, num_crops) for n, layer in enumerate(found)], 1)
    return LayerOutput(
        hidden=torch.cat([layer.hidden for layer in found], 1),
        logits=logits,
        boxes=torch.cat([layer.boxes for layer in found], 1),
    )


def _spread(
    logits: Float[Tensor, "batch queries 2"], number: int, num_crops: int
) -> Float[Tensor, "batch queries labels"]:
    """The logit of a match at the label of its crop; others have no probability."""
    spread = logits.new_full((*logits.shape[:2], num_crops + 1), -torch.inf)
    spread[..., number] = logits[..., 0]
    spread[..., -1] = logits[..., 1]
    return spread


def _classes(queries: Sequence[ImageInput], names: Sequence[str] | None) -> Classes:
    """Numbered from 1, in the order of the crops; ValueError where there are none."""
    if not queries:
        raise ValueError("no query crop: give one picture at least that shows what to look for")
    chosen = [_name(n, query) for n, query in enumerate(queries)] if names is None else list(names)
    if len(chosen) != len(queries):
        raise ValueError(f"{len(queries)} query crops and {len(chosen)} names: give as many")
    return Classes(tuple(chosen), tuple(range(1, len(chosen) + 1)))


def _name(number: int, query: ImageInput) -> str:
    if isinstance(query, str | Path):
        return PurePosixPath(str(query).partition("?")[0]).stem
    return f"query {number + 1}"


def _crop(query: ImageInput, side: int) -> np.ndarray:
    try:
        return resize(decoded(query), side, side)
    except BrokenPicture as error:
        raise ValueError(f"query crop {described(query)}: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"query crop {described(query)}: no such file") from error
