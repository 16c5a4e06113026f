"""The assembly of a finetuning run: recipe to sets, task, stream and stage."""

import json
import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import assert_never

from torch import nn

from data.detection_set import aligned
from data.index import index_digest
from data.loader import P, StreamSource
from data.order import batches_per_epoch
from data.stream import ExactStream
from finetune.classification import classification_task
from finetune.classifier_weights import classifier_input, resolve_classifier
from finetune.detection import detection_task
from finetune.headed import headed_task
from finetune.keeping import Keeper, Metadata, history_of
from finetune.one_shot_task import check_unseen, one_shot_task
from finetune.one_shot_weights import resolve_one_shot_model
from finetune.panoptic_task import panoptic_task
from finetune.panoptic_weights import check_dense
from finetune.recipe import FinetuneRecipe
from finetune.sets import SUBSET, open_sets
from finetune.task import Task, TaskSets
from finetune.teacher import open_teacher
from finetune.transfer import resolve_model
from models.artefact import ArtefactKind, PictureInput, Provenance, artefact_metadata
from models.detector_settings import DetectorSettings
from models.structures import Classes, DetectionBatch
from training.checkpoint import newest_checkpoint
from training.early_stop import stopped_at
from training.job import Evaluate, Evaluated, Scoring
from training.snapshot import Position
from training.stage import Host, Stage, train_stage

logger = logging.getLogger(__name__)

LOAD_REPORT = "load_report.json"


def finetune(recipe: FinetuneRecipe, host: Host) -> Position:
    """Trains from the run's newest whole checkpoint to its end; returns how far it came.

    Called on every worker. Raises what the sets, the weights and `train_stage` raise.
    """
    over = _stopped_early(recipe, host)
    if over is not None:
        return over
    is_fresh = newest_checkpoint(host.folder) is None
    leaves_manifest = is_fresh and host.world.is_first
    sets = open_sets(recipe, f"{recipe.run}/{SUBSET}" if leaves_manifest else None)
    match recipe.task:
        case "detect":
            return _run(recipe, host, sets, detection_task(recipe, sets, host.world, is_fresh))
        case "one_shot":
            return _run(recipe, host, sets, one_shot_task(recipe, sets, host.world, is_fresh))
        case "panoptic":
            return _run(recipe, host, sets, panoptic_task(recipe, sets, host.world, is_fresh))
        case "retinanet" | "mask_rcnn" as head:
            return _run(recipe, host, sets, headed_task(recipe, head, sets, host.world, is_fresh))
        case "classify":
            return _run(recipe, host, sets, classification_task(recipe, sets, host.world, is_fresh))
        case _:
            assert_never(recipe.task)


def checked_recipe(
    recipe: FinetuneRecipe, is_fresh: bool = True
) -> tuple[FinetuneRecipe, dict[str, str]]:
    """The recipe with what data and weights tell of the detector, and the digests of the data.

    Where a run is not fresh its recipe is complete, and the weights it began with may be gone.

    Raises SourceError, WeightsError or ValueError, in one line, for what would not work.
    """
    sets = open_sets(recipe)
    train, validation = sets.train, sets.validation
    digests = {"data.train": index_digest(train.index)}
    batches_per_epoch(train.index, recipe.global_batch, recipe.data.order)
    if validation is not None:
        aligned(validation.classes, train.classes)
        digests["data.validation"] = index_digest(validation.index)
        if digests["data.validation"] == digests["data.train"]:
            logger.warning("data.validation holds what is learned from: no fair measure")
    elif recipe.loop.evaluate_every is not None or recipe.loop.evaluate_every_epochs is not None:
        logger.warning("data.validation is not given: nothing is evaluated during the run")
    if recipe.task == "one_shot":
        check_unseen(recipe.one_shot.unseen, train, validation)
    if is_fresh:
        recipe = recipe.model_copy(update={"model": _resolved(recipe, train.classes)})
    if recipe.distill is not None:
        open_teacher(recipe.distill, recipe.model, train.classes)
    return recipe, digests


def _resolved(recipe: FinetuneRecipe, classes: Classes) -> DetectorSettings:
    if recipe.task == "one_shot":
        return resolve_one_shot_model(recipe.model, recipe.init)
    if recipe.task in ("classify", "retinanet", "mask_rcnn"):
        return resolve_classifier(recipe.model, recipe.init, classes)
    model = resolve_model(recipe.model, recipe.init, classes)
    if recipe.task == "panoptic":
        check_dense(model)
    return model


def _run(recipe: FinetuneRecipe, host: Host, sets: TaskSets, task: Task[P]) -> Position:
    world, train = host.world, task.pictures or sets.train
    stream = ExactStream(
        StreamSource(
            index=train.index,
            seed=recipe.seed,
            global_batch=recipe.global_batch,
            content=task.content,
            order=recipe.data.order,
            files=train.files,
            storage_options=train.storage_options,
        ),
        recipe.data.stream,
        world.rank,
        world.size,
        pin=world.device.type == "cuda",
    )

    def batches_from(first: int) -> Generator[DetectionBatch, None, None]:
        with closing(stream.from_step(first)) as batches:
            for packed in batches:
                yield task.to_device(packed, world.device)

    metadata = partial(_metadata, recipe, task.kind, train.classes, _chain(recipe, host, task))
    keeper = _keeper(recipe, host, metadata) if world.is_first else None
    stage = Stage(
        recipe=recipe,
        model=task.model,
        backbone=task.backbone,
        objective=task.objective,
        batches_per_epoch=stream.batches_per_epoch,
        batches_from=batches_from,
        counters=lambda: _counters(stream),
        evaluate=_heard(task, keeper),
        judge=keeper.judge if keeper else None,
        metadata=metadata(),
    )
    return train_stage(stage, host)


def _chain(recipe: FinetuneRecipe, host: Host, task: Task[P]) -> tuple[str, ...]:
    """What the run began from, what that began from, and so on; leaves the report of it."""
    report = task.load_report
    if report is None:
        try:
            stored = json.loads(host.folder.read(LOAD_REPORT))
        except FileNotFoundError:
            return (recipe.init,) if recipe.init else ()
        return tuple(stored["chain"])
    if host.world.is_first:
        logger.info("first weights, tensors by part:\n%s", report.table())
        host.folder.write(LOAD_REPORT, json.dumps(report.content(), indent=1).encode())
    return report.chain


def _heard(task: Task[P], keeper: Keeper | None) -> Evaluate | None:
    evaluate = task.evaluate
    if evaluate is None:
        return None

    def heard(model: nn.Module, alive: Callable[[], None]) -> Scoring:
        scoring = evaluate(model, lambda *_: alive())
        return lambda: keeper.hear(scoring()) if keeper else {}

    return heard


def _keeper(recipe: FinetuneRecipe, host: Host, metadata: Metadata) -> Keeper:
    """Of the first worker, which alone scores."""
    return Keeper(host.folder, host.uploads, recipe.best_metric, recipe.early_stop, metadata)


def _metadata(
    recipe: FinetuneRecipe,
    kind: ArtefactKind,
    classes: Classes,
    chain: tuple[str, ...],
    evaluated: Evaluated | None = None,
) -> dict[str, str]:
    sizes = recipe.evaluation.sizes
    provenance = Provenance(run=recipe.run, init=chain, data=recipe.data.train)
    if evaluated is not None:
        judged = {
            "step": evaluated.step,
            "averaged": recipe.ema is not None,
            "metrics": dict(evaluated.metrics),
        }
        provenance = provenance.model_copy(update=judged)
    picture_input = PictureInput(
        short_side=sizes.short_side,
        max_size=sizes.max_size,
        query_side=recipe.one_shot.crops.side if kind == "one_shot" else None,
    )
    if kind == "classifier":
        picture_input = classifier_input(recipe.classify.sizes)
    masks = recipe.panoptic.head if kind == "panoptic" else None
    named = None if kind == "one_shot" else classes
    return artefact_metadata(kind, recipe.model, named, picture_input, provenance, masks)


def _counters(stream: ExactStream[P]) -> dict[str, float]:
    reading = asdict(stream.counters.reading)
    return {
        **{f"reading/{name}": float(value) for name, value in reading.items()},
        **{f"data/{name}": float(value) for name, value in stream.counters.content.items()},
    }


def _stopped_early(recipe: FinetuneRecipe, host: Host) -> Position | None:
    """Where a run stands that early stopping ended in an earlier start; None for all others."""
    if recipe.early_stop is None:
        return None
    stop = stopped_at(history_of(host.folder, recipe.early_stop.metric), recipe.early_stop)
    newest = newest_checkpoint(host.folder)
    if stop is None or newest is None or newest.step < stop:
        return None
    logger.info(
        "the run stopped early at step %d: %s no longer grows", stop, recipe.early_stop.metric
    )
    return Position(step=newest.step)
