"""What a trial step takes: the run's model with its first weights, its pictures, its objective.

Built by the same functions as the run itself, in a world of one worker: the exchange of gradients
is the one thing that a trial does not see.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import torch
from torch import nn

from cluster.preflight.batches import AnyBatch
from cluster.preflight.pictures import quick_reading
from cluster.stages import Recipe
from data.batches import to_device
from data.held_out import read_samples
from data.index import read_index
from data.loader import P, Place, StreamSource
from data.order import batch_ids, plan_epoch
from data.picture_files import open_reader, read_one
from data.stream import ExactStream
from finetune.classification import classification_task
from finetune.detection import detection_task
from finetune.headed import headed_task
from finetune.one_shot_task import one_shot_task
from finetune.panoptic_task import panoptic_task
from finetune.recipe import FinetuneRecipe
from finetune.run import checked_recipe
from finetune.sets import open_sets
from finetune.task import Task, TaskSets
from models.interop.backbones import RANDOM_WEIGHTS
from models.urls import public_url
from pretrain.objective import PatchObjective
from pretrain.recipe import PretrainRecipe
from pretrain.run import stream_source
from pretrain.weights import initial_model
from training.job import Objective
from training.world import World


@dataclass(frozen=True)
class Kit:
    """Everything that one worker computes with."""

    recipe: Recipe
    """Complete, with what weights and data tell of the detector."""
    model: nn.Module
    """On the CPU, with its first weights."""
    backbone: nn.Module | None
    """The part of the model with a learning rate of its own."""
    objective: Objective[Any]
    batches_per_epoch: int
    batch: Callable[[int], AnyBatch]
    """So many pictures of the run's first batch, on the device; fewer where they are broken."""
    stream: Callable[[], Generator[AnyBatch, None, None]]
    """The batches of the first of all workers, on the device, without end."""
    weights: str
    """Where the first weights came from, in a line."""


def open_kit(recipe: Recipe, device: torch.device, sets: TaskSets | None = None) -> Kit:
    """The kit of a run's recipe; `sets` where they are open already.

    Raises WeightsError or CheckpointError where weights do not fit, and what the data raise.
    """
    match recipe:
        case PretrainRecipe():
            return _pretraining(recipe, device)
        case FinetuneRecipe():
            return _finetuning(checked_recipe(recipe)[0], device, sets or open_sets(recipe))
        case _:
            assert_never(recipe)


def _pretraining(recipe: PretrainRecipe, device: torch.device) -> Kit:
    model = initial_model(recipe)
    source = stream_source(recipe, read_index(recipe.data.shards), device)
    stream = _stream(recipe, source, device)
    backbone = model.detector.backbone
    return Kit(
        recipe=recipe,
        model=model,
        backbone=backbone,
        objective=PatchObjective(recipe),
        batches_per_epoch=stream.batches_per_epoch,
        batch=partial(_batch, recipe, source, to_device, device),
        stream=partial(_batches, stream, to_device, device),
        weights=_told(recipe),
    )


def _finetuning(recipe: FinetuneRecipe, device: torch.device, sets: TaskSets) -> Kit:
    world = World.alone(device)
    match recipe.task:
        case "detect":
            return _of_task(recipe, device, sets, detection_task(recipe, sets, world, True))
        case "one_shot":
            return _of_task(recipe, device, sets, one_shot_task(recipe, sets, world, True))
        case "panoptic":
            return _of_task(recipe, device, sets, panoptic_task(recipe, sets, world, True))
        case "retinanet" | "mask_rcnn" as head:
            return _of_task(recipe, device, sets, headed_task(recipe, head, sets, world, True))
        case "classify":
            return _of_task(recipe, device, sets, classification_task(recipe, sets, world, True))
        case _:
            assert_never(recipe.task)


def _of_task(recipe: FinetuneRecipe, device: torch.device, sets: TaskSets, task: Task[P]) -> Kit:
    pictures = task.pictures or sets.train
    source = StreamSource(
        index=pictures.index,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        content=task.content,
        order=recipe.data.order,
        files=pictures.files,
        storage_options=pictures.storage_options,
    )
    stream = _stream(recipe, source, device)
    report = "" if task.load_report is None else f"; {task.load_report.summary()}"
    return Kit(
        recipe=recipe,
        model=task.model,
        backbone=task.backbone,
        objective=task.objective,
        batches_per_epoch=stream.batches_per_epoch,
        batch=partial(_batch, recipe, source, task.to_device, device),
        stream=partial(_batches, stream, task.to_device, device),
        weights=f"{_told(recipe)}{report}",
    )


def _stream(recipe: Recipe, source: StreamSource[P], device: torch.device) -> ExactStream[P]:
    """The pictures of the first of all workers."""
    workers = recipe.resources.max_workers
    return ExactStream(source, recipe.data.stream, 0, workers, pin=device.type == "cuda")


def _batches(
    stream: ExactStream[P],
    moved: Callable[[P, torch.device], AnyBatch],
    device: torch.device,
) -> Generator[AnyBatch, None, None]:
    with closing(stream.from_step(0)) as batches:
        for packed in batches:
            yield moved(packed, device)


def _batch(
    recipe: Recipe,
    source: StreamSource[P],
    moved: Callable[[P, torch.device], AnyBatch],
    device: torch.device,
    count: int,
) -> AnyBatch:
    plan = plan_epoch(source.index, source.seed, 0, source.global_batch, source.order)
    ids = batch_ids(plan, 0)[:count].tolist()
    reading = quick_reading(recipe)
    options = source.storage_options
    samples = list(read_samples(source.index, ids, options, reading, source.files))
    read = partial(
        read_one, source.index, open_reader(source.index, source.files, options, reading)
    )
    place = Place(source.seed, 0, 0, 0, source.order.scale_per)
    part = source.content.part(place, range(len(ids)), samples, read, shared=False)
    return moved(source.content.join([part], pin=False), device)


def _told(recipe: Recipe) -> str:
    backbone = recipe.model.backbone.weights
    said = f"backbone from {public_url(backbone)}" if backbone else "backbone from init"
    if recipe.init is not None:
        said = f"init from {public_url(recipe.init)}" + ("" if not backbone else f", {said}")
    if backbone == RANDOM_WEIGHTS and recipe.init is None:
        said = "the backbone is random: its features mean nothing, but for a test"
    return said
