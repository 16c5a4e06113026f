"""A pipeline: stages in one folder, of which later ones use what earlier ones made.

    folder: s3://bucket/walk
    stages:
      pretrained: {pretrain: imagenet_r50, set: [data.shards=s3://bucket/shards]}
      finetuned: {finetune: coco_r50, set: [init=$pretrained, data.train=s3://bucket/coco.json]}
      judged: {evaluate: $finetuned, data: s3://bucket/val.json}
      exported: {export: $finetuned, format: hf}

Every stage has the folder of its name below `folder`; `$name` stands for the folder of an earlier
one. It is data, as a recipe is: nothing in it runs, and everything is checked before the first
stage begins.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, JsonValue

from data.detection_set import SetKind
from finetune.export import ExportFormat
from finetune.predict import Device
from models.settings import Settings
from training.recipe import RecipeError, load_recipe, override, parse_recipe
from training.run_recipe import absolute
from training.storage_settings import StorageSettings

STAGE_WORDS = ("pretrain", "finetune", "evaluate", "export")
"""Each stage has one of them as a key: what it does."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_REFERENCE = re.compile(r"\$([A-Za-z0-9_-]+)")


class PretrainStage(Settings):
    """`querypatch pretrain`."""

    pretrain: str | dict[str, JsonValue]
    """A shipped recipe's name, a YAML file, or the recipe itself."""
    set: tuple[str, ...] = ()
    """Overrides KEY=VALUE of the recipe; `run` is the stage's folder."""


class FinetuneStage(Settings):
    """`querypatch finetune`."""

    finetune: str | dict[str, JsonValue]
    """A shipped recipe's name, a YAML file, or the recipe itself."""
    set: tuple[str, ...] = ()
    """Overrides KEY=VALUE of the recipe; `run` is the stage's folder."""


class EvaluateStage(Settings):
    """`querypatch evaluate`; its numbers go into `scores.json`."""

    evaluate: str
    """The weights: an earlier stage, or a path or URL."""
    data: str
    """The labelled set."""
    kind: SetKind | None = None
    """What `data` is; null finds it out."""
    pictures: str | None = None
    """Folder of the pictures of a COCO json that does not lie beside them."""
    set: tuple[str, ...] = ()
    """Overrides KEY=VALUE of the evaluation."""
    device: Device = "auto"


class ExportStage(Settings):
    """`querypatch export`, into the stage's folder."""

    export: str
    """The weights: an earlier stage, or a path or URL."""
    format: ExportFormat = "querypatch"
    """Whose names and files."""


StageSettings = PretrainStage | FinetuneStage | EvaluateStage | ExportStage


class PipelineSettings(Settings):
    """The file of a pipeline, its stages still as they were written."""

    folder: str
    """Where the stages have their folders: a path or any fsspec URL."""
    storage: StorageSettings = StorageSettings()
    """How object stores are reached, by every stage."""
    stages: dict[str, dict[str, object]] = Field(min_length=1)
    """By name, in their order."""


@dataclass(frozen=True)
class Stage:
    """One stage, with nothing left to be looked up."""

    name: str
    url: str
    """Its folder."""
    settings: StageSettings


@dataclass(frozen=True)
class Pipeline:
    """What a file describes."""

    folder: str
    storage: StorageSettings
    stages: tuple[Stage, ...]


def parse_pipeline(source: str | Path | Mapping[str, object], overrides: Sequence[str]) -> Pipeline:
    """The pipeline of a YAML file (or text, or values) with `a.b=c` laid over it.

    Raises RecipeError: one line for each mistake.
    """
    settings = load_recipe(PipelineSettings, override(parse_recipe(source), overrides))
    folder = absolute(settings.folder.rstrip("/"))
    assert folder is not None
    stages: list[Stage] = []
    for name, values in settings.stages.items():
        if not _NAME.fullmatch(name):
            raise RecipeError(f"stages.{name}: a stage's name is small letters, digits, _ and -")
        stage = Stage(name, f"{folder}/{name}", _stage_settings(name, values))
        stages.append(_resolved(stage, {earlier.name: earlier.url for earlier in stages}))
    return Pipeline(folder, settings.storage, tuple(stages))


def pipeline_values(pipeline: Pipeline) -> dict[str, object]:
    """What parses to the same pipeline."""
    stages = {
        stage.name: stage.settings.model_dump(mode="json", exclude_unset=True)
        for stage in pipeline.stages
    }
    storage = pipeline.storage.model_dump(mode="json")
    return {"folder": pipeline.folder, "storage": storage, "stages": stages}


def _stage_settings(name: str, values: Mapping[str, object]) -> StageSettings:
    said = [word for word in STAGE_WORDS if word in values]
    if len(said) != 1:
        raise RecipeError(
            f"stages.{name}: give exactly one of {', '.join(STAGE_WORDS)}; it has "
            f"{', '.join(said or values) or 'nothing'}"
        )
    kinds: dict[str, type[StageSettings]] = {
        "pretrain": PretrainStage,
        "finetune": FinetuneStage,
        "evaluate": EvaluateStage,
        "export": ExportStage,
    }
    try:
        return load_recipe(kinds[said[0]], values)
    except RecipeError as error:
        lines = [f"stages.{name}.{line}" for line in str(error).splitlines()]
        raise RecipeError("\n".join(lines)) from None


def _resolved(stage: Stage, urls: Mapping[str, str]) -> Stage:
    """The stage with the folders of earlier ones in place of their names, and absolute paths."""

    def named(text: str) -> str:
        def url_of(reference: re.Match[str]) -> str:
            if reference[1] not in urls:
                known = ", ".join(f"${name}" for name in urls) or "none"
                raise RecipeError(
                    f"stages.{stage.name}: ${reference[1]} is no earlier stage; there is {known}"
                )
            return urls[reference[1]]

        return _REFERENCE.sub(url_of, text)

    told: dict[str, object]
    match stage.settings:
        case PretrainStage() | FinetuneStage() as settings:
            for text in settings.set:
                if text.partition("=")[0].strip() == "run":
                    raise RecipeError(f"stages.{stage.name}.set: run is {stage.url}, of the name")
            told = {"set": tuple(named(text) for text in settings.set)}
        case EvaluateStage() as settings:
            told = {
                "evaluate": absolute(named(settings.evaluate)),
                "data": absolute(settings.data),
                "pictures": absolute(settings.pictures),
                "set": tuple(named(text) for text in settings.set),
            }
        case ExportStage() as settings:
            told = {"export": absolute(named(settings.export))}
    return replace(stage, settings=stage.settings.model_copy(update=told))
