"""The assembly of a pretraining run: recipe to model, objective, stream and stage."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict

import torch
from torch import nn

from data.batches import PackedPatchBatch, to_device
from data.index import ShardIndex, read_index
from data.loader import StreamSource
from data.patch_content import PatchContent
from data.patches import ColourOn
from data.stream import ExactStream
from models.artefact import PictureInput, Provenance, artefact_metadata
from models.structures import PatchBatch
from pretrain.evaluation import evaluate_held_out
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe
from pretrain.weights import blank_model, initial_model
from training.checkpoint import newest_checkpoint
from training.job import Evaluate, Scoring
from training.snapshot import Position
from training.stage import Host, Stage, train_stage
from training.world import World


def pretrain(recipe: PretrainRecipe, host: Host) -> Position:
    """Trains from the run's newest whole checkpoint to its end; returns how far it came.

    Called on every worker. Raises what `read_index`, `initial_model` and `train_stage` raise.
    """
    world = host.world
    # With a checkpoint, the weights that the run began with may be gone: nobody needs them.
    is_fresh = newest_checkpoint(host.folder) is None
    model = initial_model(recipe) if is_fresh else blank_model(recipe)
    stream = ExactStream(
        stream_source(recipe, read_index(recipe.data.shards), world.device),
        recipe.data.stream,
        world.rank,
        world.size,
        pin=world.device.type == "cuda",
    )

    def batches_from(first: int) -> Generator[PatchBatch, None, None]:
        with closing(stream.from_step(first)) as batches:
            yield from on_device(batches, world.device)

    stage = Stage(
        recipe=recipe,
        model=model,
        backbone=model.detector.backbone,
        objective=PatchObjective(recipe),
        batches_per_epoch=stream.batches_per_epoch,
        batches_from=batches_from,
        counters=lambda: _counters(stream),
        evaluate=_evaluation(recipe, world),
        metadata=_metadata(recipe),
    )
    return train_stage(stage, host)


def stream_source(
    recipe: PretrainRecipe, index: ShardIndex, device: torch.device
) -> StreamSource[PackedPatchBatch]:
    """What decides the pixels of every batch."""
    return StreamSource(
        index=index,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        content=patch_content(recipe, device),
        order=recipe.data.order,
    )


def patch_content(recipe: PretrainRecipe, device: torch.device) -> PatchContent:
    """What is made of every picture."""
    return PatchContent(
        recipe.queries.num_patches, recipe.data.patches, colour_place(recipe, device)
    )


def colour_place(recipe: PretrainRecipe, device: torch.device) -> ColourOn:
    """Where the patches' colours change on this device."""
    if recipe.data.colour_on != "auto":
        return recipe.data.colour_on
    return "device" if device.type == "cuda" else "cpu"


def on_device(batches: Iterator[PackedPatchBatch], device: torch.device) -> Iterator[PatchBatch]:
    """The batches on the training device, normalised there."""
    for packed in batches:
        yield to_device(packed, device)


def _evaluation(recipe: PretrainRecipe, world: World) -> Evaluate | None:
    if recipe.data.held_out is None:
        return None
    index = read_index(recipe.data.held_out)
    content = patch_content(recipe, world.device)

    def evaluate(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        numbers = evaluate_held_out(model, recipe, index, content, world, alive)
        return lambda: numbers

    return evaluate


def _counters(stream: ExactStream[PackedPatchBatch]) -> dict[str, float]:
    reading = asdict(stream.counters.reading)
    return {f"reading/{name}": float(value) for name, value in reading.items()}


def _metadata(recipe: PretrainRecipe) -> dict[str, str]:
    patches = recipe.data.patches
    return artefact_metadata(
        "patch_detector",
        recipe.model,
        None,
        PictureInput(short_side=patches.held_out_short_side, max_size=patches.max_size),
        Provenance(
            run=recipe.run,
            init=(recipe.init,) if recipe.init else (),
            data=recipe.data.shards,
        ),
    )
