"""Pictures of the pretext task: query patches, and what a run's newest weights find for them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.batches import PackedPatchBatch, to_device, views_of
from data.held_out import held_out_batches
from data.index import ShardIndex, read_index
from data.patch_content import PatchContent
from data.reading import ReadingSettings
from models.boxes import cxcywh_to_xyxy
from models.patch_queries import PatchDetector, PatchOutput
from models.postprocess import query_scores
from pretrain.drawing import Tile, draw_grid
from pretrain.held_out import own_answers
from pretrain.recipe import PretrainRecipe
from pretrain.run import patch_content
from pretrain.weights import blank_model, take_weights
from training.recipe import load_recipe
from training.record import read_recipe_values
from training.run_folder import open_run_folder

SHARDS_SEED = 0
SHARDS_PATCHES = 10
"""Seed and number of the patches drawn for shards that are looked at without a run."""


def draw_patches(url: str, out: Path, count: int) -> None:
    """Writes a PNG of `count` pictures of a run (its held-out ones, if any) or of shards.

    For a run the boxes that its newest checkpoint finds are dashed. Raises ShardIndexError where
    `url` is neither, CheckpointError where a run has no whole checkpoint.
    """
    values = read_recipe_values(open_run_folder(url))
    if values is None:
        plain = PatchContent(SHARDS_PATCHES)
        tiles = list(_tiles(read_index(url), plain, SHARDS_SEED, count, None))
    else:
        recipe = load_recipe(PretrainRecipe, values)
        index = read_index(recipe.data.held_out or recipe.data.shards)
        content = patch_content(recipe, torch.device("cpu"))
        model = blank_model(recipe).eval()
        take_weights(model, url)
        tiles = list(_tiles(index, content, recipe.seed, count, model))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(tiles).save(out)


def _tiles(
    index: ShardIndex, content: PatchContent, seed: int, count: int, model: PatchDetector | None
) -> Iterator[Tile]:
    ids = range(min(count, index.num_samples))
    for packed in held_out_batches(index, content, seed, ids, 4, ReadingSettings()):
        if not packed.blank:
            yield from _batch_tiles(packed, model)


def _batch_tiles(packed: PackedPatchBatch, model: PatchDetector | None) -> Iterator[Tile]:
    views = views_of(packed)
    found = None if model is None else _found(model, packed)
    for row, key in enumerate(packed.keys):
        height, width = views.sizes[row].tolist()
        yield Tile(
            title=key,
            picture=views.pictures[row, :height, :width].numpy(),
            patches=views.patches[row].numpy(),
            boxes_xyxy=_in_pixels(views.boxes_cxcywh[row], height, width),
            found_xyxy=None if found is None else _in_pixels(found[row], height, width),
        )


@torch.no_grad()
def _found(model: PatchDetector, packed: PackedPatchBatch) -> Tensor:
    """The answer of each patch's own query group, boxes_cxcywh."""
    batch = to_device(packed, torch.device("cpu"))
    output: PatchOutput = model(batch.images, batch.patches)
    last = output.detection.groups[0].layers[-1]
    scores = query_scores(last.logits, model.detector.settings.class_scores)
    answers = own_answers(scores, batch.patches.shape[1])
    return last.boxes.gather(1, answers[..., None].expand(-1, -1, 4))


def _in_pixels(boxes_cxcywh: Tensor, height: int, width: int) -> Float[np.ndarray, "boxes 4"]:
    scale = torch.tensor([width, height, width, height])
    return (cxcywh_to_xyxy(boxes_cxcywh) * scale).double().numpy()
