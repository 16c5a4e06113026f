"""The model of a pretraining run before its first step: random, with a backbone, or from `init`."""

import logging
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.batches import IMAGENET_MEAN, IMAGENET_STD
from data.pictures import decode_picture, resize
from data.synthetic import draw_scene
from models.interop.backbones import RANDOM_WEIGHTS, load_backbone
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.detr import detr_name, load_detr
from models.patch_queries import PatchDetector
from pretrain.recipe import PretrainRecipe
from training.checkpoint import load_newest
from training.run_folder import open_run_folder
from training.snapshot import load_weights

logger = logging.getLogger(__name__)

CENTRED_GAIN = 1 / math.sqrt(1 - 1 / math.pi)
"""Makes up for what centring takes: of a rectified normal's mean square, 1 / pi is its mean."""


def initial_model(recipe: PretrainRecipe) -> PatchDetector:
    """The model with the weights of its recipe, on the CPU, the same on every worker.

    Raises WeightsError or CheckpointError where a file does not fit; the message names tensors.
    """
    model = blank_model(recipe)
    load_backbone(model.detector.backbone)
    if recipe.init is not None:
        take_weights(model, recipe.init)
    elif recipe.model.backbone.weights == RANDOM_WEIGHTS and not recipe.model.backbone.train:
        fit_random_features(model)
    return model


@torch.no_grad()
def fit_random_features(model: PatchDetector) -> None:
    """Makes the most of a random frozen CNN, for demos and tests: its patches can be told apart.

    ReLU's outputs share a positive mean, which random filters amplify layer by layer until all
    patches look alike: 77 % of the variance of a ResNet-18's patch features lies in one direction,
    28 % with centred filters (measured). The two projections then begin with features of mean 0
    and deviation 1 by channel, as eight drawn pictures have them. Trained weights need none of it.
    """
    backbone = model.detector.backbone
    for name, part in backbone.body.named_modules():
        if isinstance(part, nn.Conv2d) and name != "conv1":
            part.weight.sub_(part.weight.mean(dim=(1, 2, 3), keepdim=True)).mul_(CENTRED_GAIN)
    features = backbone(_drawn_pictures()).float()
    by_channel = features.transpose(0, 1).flatten(1)
    centre, spread = by_channel.mean(1), by_channel.std(1).clamp(min=1e-6)
    for projection in (model.detector.input_projection, model.patch_projection):
        projection.weight.div_(spread)
        projection.bias.sub_(projection.weight @ centre)


def _drawn_pictures() -> Float[Tensor, "8 3 height width"]:
    """Eight drawn pictures, normalised."""
    side = 160
    scenes = [decode_picture(draw_scene(0, number).jpeg) for number in range(8)]
    levels = torch.from_numpy(np.stack([resize(scene, side, side) for scene in scenes]))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((levels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def blank_model(recipe: PretrainRecipe) -> PatchDetector:
    """The model with random weights alone, decided by the seed of the recipe."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return PatchDetector(recipe.model, recipe.queries, generator)


def take_weights(model: PatchDetector, source: str) -> None:
    """Fills the whole model from a run's folder, a checkpoint of ours, or one of the public code.

    What a public checkpoint does not have, the parts that only pretraining uses and a class head
    of other classes, keeps its random values and is logged as new.
    """
    tensors = _run_tensors(source) or read_tensors(source)
    if detr_name("detector.queries.weight") not in tensors:
        load_weights(model, tensors, source)
        logger.info("init=%s: %d tensors loaded", source, len(tensors))
        return
    report = load_detr(model, tensors, source=source, new=_absent_parts(model, tensors))
    logger.info("init=%s: %s", source, report.summary())


def _run_tensors(source: str) -> dict[str, Tensor] | None:
    """The newest whole checkpoint where `source` is the folder of a run."""
    folder = open_run_folder(source)
    if not folder.names("checkpoints"):
        return None
    snapshot = load_newest(folder)
    if snapshot is None:
        raise WeightsError(f"init={source}: the run has no whole checkpoint; give another one")
    return dict(snapshot.model)


def _absent_parts(model: PatchDetector, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """Patterns of our names that the file cannot fill."""
    parts = {"patch_projection": "weight", "reconstruction": "layers.0.weight"}
    absent = [
        f"{part}.*" for part, probe in parts.items() if detr_name(f"{part}.{probe}") not in tensors
    ]
    classes = tensors[detr_name("detector.class_head.weight")]
    if classes.shape != model.detector.class_head.weight.shape:
        absent.append("detector.class_head.*")
    return tuple(absent)
