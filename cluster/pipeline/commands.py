"""`querypatch pipeline`: walks the stages one by one, or sends the walk to a cluster as one job.

A stage that is done is passed over, a run that was interrupted goes on, so the same command may be
given until all is done. Everything is checked before the first stage begins.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.commands.bars import say
from cluster.jobs.commands import Submission, submit_order
from cluster.jobs.continuing import begun_or_continued, held_to_its_run, said
from cluster.jobs.orders import ON_ITS_CLUSTER
from cluster.jobs.packaging import EXTRAS
from cluster.jobs.submitting import Order
from cluster.launch import run_with_ray
from cluster.pipeline.stages import (
    FinetuneStage,
    Pipeline,
    PretrainStage,
    Stage,
    parse_pipeline,
    pipeline_values,
)
from cluster.pipeline.status import PIPELINE
from cluster.pipeline.steps import do_step, is_done
from cluster.stages import StageName, parsed_recipe, recipe_values
from cluster.worker import run_alone
from models.urls import public_url
from training.outcome import read_outcome
from training.recipe import RecipeError, override
from training.run_folder import open_run_folder
from training.storage_settings import apply_storage_options
from training.strict_yaml import dump_yaml


def walk_pipeline(
    file: str, overrides: Sequence[str], local: bool, address: str | None, console: Console
) -> bool:
    """Does what is not done yet; False where a stage was asked to stop.

    Raises RecipeError before anything began, and the errors of the stages.
    """
    pipeline = opened_pipeline(file, overrides)
    open_run_folder(pipeline.folder).write(PIPELINE, _self_contained(pipeline))
    for number, stage in enumerate(pipeline.stages, start=1):
        head = f"stage {number} of {len(pipeline.stages)}, {stage.name}"
        if _is_over(stage, pipeline):
            say(console, f"{head}: done before")
            continue
        say(console, f"{head}: {public_url(stage.url)}")
        if not _walk(stage, pipeline, local, address, console):
            say(console, f"{head}: stopped; the same command goes on with it")
            return False
    say(console, f"all {len(pipeline.stages)} stages are done: {public_url(pipeline.folder)}")
    return True


def submit_pipeline(
    file: str, overrides: Sequence[str], how: Submission, console: Console, name: str | None = None
) -> bool:
    """Sends the pipeline with its recipes to a cluster; returns as `submit_order`."""
    pipeline = opened_pipeline(file, overrides)
    files = {PIPELINE: _self_contained(pipeline)}
    words = ("pipeline", f"{EXTRAS}/{PIPELINE}", *ON_ITS_CLUSTER)
    url = public_url(pipeline.folder)
    return submit_order(Order(words, name or pipeline.folder, url, files), how, console)


def opened_pipeline(file: str, overrides: Sequence[str]) -> Pipeline:
    """The pipeline of a file, or the one that was begun in a folder, with its recipes checked.

    Raises RecipeError: one line for each mistake.
    """
    source: str | Path = Path(file)
    if not Path(file).is_file():
        try:
            source = open_run_folder(file).read(PIPELINE).decode()
        except FileNotFoundError:
            raise RecipeError(
                f"{file} is neither the YAML file of a pipeline nor a folder with {PIPELINE}"
            ) from None
    pipeline = parse_pipeline(source, overrides)
    apply_storage_options(pipeline.storage)
    for stage in pipeline.stages:
        _run_of(stage, pipeline)
    return pipeline


def _self_contained(pipeline: Pipeline) -> bytes:
    """The pipeline as YAML with its recipes in it: it means the same on other machines."""
    runs = [(stage.name, _run_of(stage, pipeline)) for stage in pipeline.stages]
    stages = {name: {run.kind: override({}, run.said)} for name, run in runs if run}
    values = pipeline_values(pipeline)
    named = [f"stages.{name}={json.dumps(stage)}" for name, stage in stages.items()]
    return dump_yaml(override(values, named)).encode()


@dataclass(frozen=True)
class _Run:
    """A stage that is a run."""

    kind: StageName
    recipe: str | Mapping[str, object]
    """A shipped one's name, a file, or itself."""
    overrides: tuple[str, ...]
    said: tuple[str, ...]
    """Overrides for all that the recipe and the stage say, with absolute paths."""


def _run_of(stage: Stage, pipeline: Pipeline) -> _Run | None:
    """The run of a stage; RecipeError for mistakes in its recipe."""
    kind: StageName
    match stage.settings:
        case PretrainStage(pretrain=name, set=told):
            kind = "pretrain"
        case FinetuneStage(finetune=name, set=told):
            kind = "finetune"
        case _:
            return None
    options = pipeline.storage.options
    storage = (f"storage.options={json.dumps(options)}",) if options else ()
    overrides = (*storage, *told, f"run={stage.url}")
    try:
        values = recipe_values(kind, name, overrides)
        recipe = parsed_recipe(values, (), kind)
    except RecipeError as error:
        lines = [f"stages.{stage.name}: {line}" for line in str(error).splitlines()]
        raise RecipeError("\n".join(lines)) from None
    return _Run(kind, name, overrides, tuple(said(values, recipe)))


def _is_over(stage: Stage, pipeline: Pipeline) -> bool:
    """Whether the stage was done as the file says; RecipeError where it was another run."""
    match stage.settings:
        case PretrainStage() | FinetuneStage():
            folder = open_run_folder(stage.url)
            if read_outcome(folder) is None:
                return False
            run = _run_of(stage, pipeline)
            assert run is not None
            held_to_its_run(folder, run.said)
            return True
        case step:
            return is_done(step, stage.url)


def _walk(
    stage: Stage, pipeline: Pipeline, local: bool, address: str | None, console: Console
) -> bool:
    """Does one stage; False where it was asked to stop."""
    match stage.settings:
        case PretrainStage() | FinetuneStage():
            run = _run_of(stage, pipeline)
            assert run is not None
            recipe = begun_or_continued(run.kind, run.recipe, run.overrides)
            if local:
                run_alone(recipe, console)
            else:
                run_with_ray(recipe, address, console)
            return read_outcome(open_run_folder(stage.url)) is not None
        case step:
            say(console, do_step(step, stage.url, pipeline.storage, None if local else address))
            return True
