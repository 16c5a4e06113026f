"""The model of a pretraining run before its first step: random, with a backbone, or from `init`."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from models.interop.backbones import load_backbone
from models.interop.checkpoint_files import WeightsError, read_tensors
from models.interop.conditional import from_conditional, is_conditional, load_conditional
from models.interop.deformable import from_deformable, is_deformable, load_deformable
from models.interop.detr import detr_name, load_detr, our_name
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
    if is_deformable(tensors):
        named, _ = from_deformable(tensors, source=source)
        if "queries.weight" not in named and "detector.queries.weight" not in named:
            raise WeightsError(
                f"{source} is of a two-stage detector, whose queries are proposals: no patch can "
                "be given to them; start from a one-stage file, or finetune with this one"
            )
        report = load_deformable(model, tensors, source=source, new=_absent_parts(model, named))
    elif is_conditional(tensors):
        named, _ = from_conditional(tensors, source=source)
        report = load_conditional(model, tensors, source=source, new=_absent_parts(model, named))
    elif detr_name("detector.queries.weight") in tensors:
        named = {our_name(theirs): tensor for theirs, tensor in tensors.items()}
        report = load_detr(model, tensors, source=source, new=_absent_parts(model, named))
    else:
        load_weights(model, tensors, source)
        logger.info("init=%s: %d tensors loaded", source, len(tensors))
        return
    logger.info("init=%s: %s", source, report.summary())


def _absent_parts(model: PatchDetector, named: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Patterns of our names that a public file, its tensors by our names, cannot fill."""
    absent = [
        f"{part}.*"
        for part in ("patch_projection", "reconstruction")
        if not any(name.startswith(f"{part}.") for name in named)
    ]
    other_classes = any(
        name in named and named[name].shape != tensor.shape
        for name, tensor in model.detector.state_dict().items()
        if name.startswith("class_head.")
    )
    if other_classes:
        absent.append("detector.class_head.*")
    return tuple(absent)
