"""The model of a pretraining run before its first step: random, with a backbone, or from `init`."""

import logging

import torch
from torch import Tensor

from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import read_tensors
from models.interop.detr import detr_name, load_detr
from models.patch_queries import PatchDetector
from pretrain.recipe import PretrainRecipe
from training.run_weights import run_weights, weights_file
from training.snapshot import load_weights

logger = logging.getLogger(__name__)


def initial_model(recipe: PretrainRecipe) -> PatchDetector:
    """The model with the weights of its recipe, on the CPU, the same on every worker.

    Raises WeightsError or CheckpointError where a file does not fit; the message names tensors.
    """
    model = blank_model(recipe)
    load_backbone(model.detector.backbone)
    if recipe.init is not None:
        take_weights(model, recipe.init)
    return model


def blank_model(recipe: PretrainRecipe) -> PatchDetector:
    """The model with random weights alone, decided by the seed of the recipe."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return PatchDetector(recipe.model, recipe.queries, generator)


def take_weights(model: PatchDetector, source: str) -> None:
    """Fills the whole model from a run, a checkpoint or an export of ours, or a public file.

    What a public checkpoint does not have, the parts that only pretraining uses and a class head
    of other classes, keeps its random values and is logged as new.
    """
    found = run_weights(source, best=False)
    tensors = read_tensors(weights_file(source)) if found is None else dict(found.tensors)
    if detr_name("detector.queries.weight") not in tensors:
        load_weights(model, tensors, source)
        logger.info("init=%s: %d tensors loaded", source, len(tensors))
        return
    report = load_detr(model, tensors, source=source, new=_absent_parts(model, tensors))
    logger.info("init=%s: %s", source, report.summary())


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
