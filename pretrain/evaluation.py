"""An evaluation of patch detection on held-out shards, shared out between the workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from data.batches import to_device
from data.held_out import held_out_batches
from data.index import ShardIndex
from data.patch_content import PatchContent
from models.matching import match
from models.patch_queries import PatchOutput
from models.structures import PatchBatch
from pretrain.held_out import PictureResult, picture_results, summarise
from pretrain.objective import patch_losses
from pretrain.recipe import PretrainRecipe
from training.world import World, gather_objects

SHOWN = ("loss_ce", "loss_bbox", "loss_giou", "loss_feature")
"""Loss terms of the last decoder layer."""


@dataclass(frozen=True)
class _Share:
    """What one worker found on its share of the held-out pictures."""

    results: tuple[PictureResult, ...]
    loss_sums: Mapping[str, float]
    """Each loss term times the pictures that it is a mean of."""


@torch.no_grad()
def evaluate_held_out(
    model: nn.Module,
    recipe: PretrainRecipe,
    index: ShardIndex,
    content: PatchContent,
    world: World,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The numbers of `pretrain.held_out` and the loss terms; called on every worker.

    `alive` is called with every batch.

    Every picture is used once, with the same patches in every evaluation, without colour changes.
    """
    count = min(recipe.data.held_out_pictures, index.num_samples)
    ids = range(world.rank, count, world.size)
    part = max(1, recipe.global_batch // world.size)
    batch_size = min(part, recipe.pictures_per_pass or part)
    results: list[PictureResult] = []
    sums: dict[str, float] = {}
    reading = recipe.data.stream.reading
    for packed in held_out_batches(index, content, recipe.seed, ids, batch_size, reading):
        alive()
        if packed.blank:
            continue
        batch = to_device(packed, world.device)
        found, losses = _evaluate_batch(model, recipe, batch)
        results += found
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value * len(found)
    shares = gather_objects(_Share(tuple(results), sums))
    return _together(shares)


def _evaluate_batch(
    model: nn.Module, recipe: PretrainRecipe, batch: PatchBatch
) -> tuple[list[PictureResult], dict[str, float]]:
    device = batch.images.pixels.device.type
    with torch.autocast(device, torch.bfloat16, enabled=recipe.loop.precision == "bf16"):
        output: PatchOutput = model(batch.images, batch.patches)
    losses = patch_losses(recipe, output, batch)
    last = output.detection.groups[0].layers[-1]
    class_scores = recipe.model.class_scores
    matching = match(last.logits[None], last.boxes[None], batch.targets, recipe.costs, class_scores)
    by_patch = matching.query[
        torch.argsort(matching.picture * last.boxes.shape[1] + matching.target)
    ]
    matched = by_patch.view(len(batch.keys), -1).unbind()
    terms = {
        "loss": losses.total,
        **{name: losses.terms[name] for name in SHOWN if name in losses.terms},
    }
    values = torch.stack([value.float() for value in terms.values()]).tolist()
    judged = picture_results(last, batch.targets, matched, class_scores)
    return judged, dict(zip(terms, values, strict=True))


def _together(shares: tuple[_Share, ...]) -> dict[str, float]:
    results = [result for share in shares for result in share.results]
    names = dict.fromkeys(name for share in shares for name in share.loss_sums)
    losses = {
        name: sum(share.loss_sums.get(name, 0.0) for share in shares) / len(results)
        for name in names
    }
    return {**summarise(results), **losses}
