"""What `loop.pad_to` changes: the gradient of a batch, by the padding of its parts.

    python -m benchmarks.pad_to RECIPE data.shards=URL model.backbone.weights=FILE [a.b=c]

Prints how far the gradient of the first batches, computed in the parts of --workers workers, is
from that of the whole batch in one pass, with the parts padded to the whole batch and to their own
largest picture. All in this process, in float32, without dropout.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from data.batches import to_device
from data.index import read_index
from data.order import rank_streams
from data.stream import ExactStream
from models.patch_queries import PatchDetector
from models.shares import Share
from models.structures import Images, PatchBatch, Targets
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe, recipe_of
from pretrain.run import stream_source
from pretrain.weights import initial_model

CPU = torch.device("cpu")
FIXED = ("run=unused", "model.dropout=0", "model.backbone.frozen_precision=float32")


def main() -> None:
    """Reads the arguments and prints a line per batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=2)
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.recipe, [*FIXED, *arguments.overrides])
    source = stream_source(recipe, read_index(recipe.data.shards), CPU)
    model = initial_model(recipe).train()
    with closing(ExactStream(source, recipe.data.stream).from_step(0)) as stream:
        for number in range(arguments.batches):
            print_batch(recipe, model, to_device(next(stream), CPU), number, arguments.workers)


def print_batch(
    recipe: PretrainRecipe, model: PatchDetector, batch: PatchBatch, number: int, workers: int
) -> None:
    """The figures of one batch."""
    objective = PatchObjective(recipe)
    share = Share(objective.counts(batch))
    ranks = [list(rank_streams(len(batch.keys), rank, workers)) for rank in range(workers)]
    alike = [rows_of(batch, rows) for rows in ranks]
    whole, loss = gradient(objective, model, [batch], share)
    for name, parts in (("batch", alike), ("part", [cropped(part) for part in alike])):
        found, of_parts = gradient(objective, model, parts, share)
        print(
            f"batch {number} ({len(batch.keys)} pictures, {workers} workers), pad_to={name}: "
            f"gradient off by {float((found - whole).norm() / whole.norm()):.2g} of its norm, "
            f"loss {of_parts:.5f} for {loss:.5f}",
            flush=True,
        )


def gradient(
    objective: PatchObjective, model: PatchDetector, parts: Sequence[PatchBatch], share: Share
) -> tuple[Float[Tensor, " numbers"], float]:
    """The sum over the parts, of all parameters side by side, and the loss."""
    model.zero_grad()
    total = 0.0
    for part in parts:
        losses = objective(model, part, share, torch.Generator().manual_seed(0))
        torch.autograd.backward(losses.total)
        total += losses.total.item()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.cat(found), total


def rows_of(batch: PatchBatch, rows: Sequence[int]) -> PatchBatch:
    """Some of the pictures, padded as they are."""
    images, places = batch.images, batch.places or ()
    return replace(
        batch,
        images=Images(images.pixels[rows], images.padding[rows], images.sizes[rows]),
        patches=batch.patches[rows],
        targets=Targets(
            tuple(batch.targets.boxes_cxcywh[row] for row in rows),
            tuple(batch.targets.labels[row] for row in rows),
        ),
        keys=tuple(batch.keys[row] for row in rows),
        sample_ids=batch.sample_ids[rows],
        places=tuple(places[row] for row in rows),
    )


def cropped(batch: PatchBatch) -> PatchBatch:
    """The same pictures, padded to the largest of them."""
    images = batch.images
    height, width = images.sizes.amax(0).tolist()
    pixels = images.pixels[:, :, :height, :width]
    padding = images.padding[:, :height, :width]
    return replace(batch, images=Images(pixels, padding, images.sizes))


if __name__ == "__main__":
    main()
