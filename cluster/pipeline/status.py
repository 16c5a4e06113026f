"""How a pipeline is: the status of each of its stages, told by their folders."""

import json
from collections.abc import Iterator

from cluster.jobs.status import NoRun, RunStatus, read_status, status_json, status_text
from cluster.pipeline.stages import Pipeline, Stage, StageSettings, parse_pipeline
from cluster.pipeline.steps import Step, is_done
from models.urls import public_url
from training.run_folder import RunFolder, open_run_folder

PIPELINE = "pipeline.yaml"
"""In the pipeline's folder: what was asked for last."""


def read_pipeline(folder: RunFolder) -> Pipeline | None:
    """The pipeline that was begun in a folder; None where none was.

    Raises RecipeError where it is none of this version.
    """
    try:
        return parse_pipeline(folder.read(PIPELINE).decode(), [])
    except FileNotFoundError:
        return None


def pipeline_text(pipeline: Pipeline) -> str:
    """For a person: a few lines for each stage that began."""
    return "\n".join(_stage_text(stage) for stage in pipeline.stages)


def pipeline_json(pipeline: Pipeline) -> str:
    """For programs: the status of each stage by its name; null where it has not begun."""
    stages = {stage.name: _stage_content(stage) for stage in pipeline.stages}
    return json.dumps({"folder": public_url(pipeline.folder), "stages": stages}, indent=1)


def stage_that_is_written(folder: RunFolder) -> str | None:
    """URL of the stage whose run is going on; None where there is none."""
    pipeline = read_pipeline(folder)
    for stage, status in _runs(pipeline) if pipeline else ():
        if status.state in ("running", "stopping", "silent"):
            return stage.url
    return None


def _runs(pipeline: Pipeline) -> Iterator[tuple[Stage, RunStatus]]:
    for stage in pipeline.stages:
        status = _status_of(stage)
        if isinstance(status, RunStatus):
            yield stage, status


def _status_of(stage: Stage) -> RunStatus | bool:
    """Of a run, or whether a step is done; False too where a run has not begun."""
    if isinstance(stage.settings, Step):
        return is_done(stage.settings, stage.url)
    try:
        return read_status(open_run_folder(stage.url))
    except NoRun:
        return False


def _stage_text(stage: Stage) -> str:
    status = _status_of(stage)
    if isinstance(status, RunStatus):
        return status_text(status)
    kind = _word(stage.settings)
    return f"{public_url(stage.url)}: {'done' if status else 'not begun'} ({kind})"


def _stage_content(stage: Stage) -> object:
    status = _status_of(stage)
    if isinstance(status, RunStatus):
        return json.loads(status_json(status))
    return {"state": "done"} if status else None


def _word(settings: StageSettings) -> str:
    return type(settings).__name__.removesuffix("Stage").lower()
