"""Pipelines: what a file may say, and a walk whose done stages are not done again."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cluster.pipeline.commands
from cluster.jobs.commands import Submission, status_of
from cluster.jobs.submitting import Order
from cluster.pipeline.commands import opened_pipeline, submit_pipeline, walk_pipeline
from cluster.pipeline.stages import EvaluateStage, FinetuneStage, parse_pipeline, pipeline_values
from cluster.pipeline.status import PIPELINE, stage_that_is_written
from tests.finetune import small_run as finetuning
from tests.pretrain import small_run as pretraining
from training.recipe import RecipeError
from training.run_folder import open_run_folder
from training.strict_yaml import dump_yaml

WALK = """
folder: s3://bucket/walk
stages:
  first: {pretrain: tiny_cpu, set: [data.shards=s3://bucket/shards, loop.steps=3]}
  second: {finetune: tiny_cpu, set: [init=$first, "data.train=s3://bucket/a.json"]}
  judged: {evaluate: $second, data: s3://bucket/b.json}
  exported: {export: $second, format: detr}
"""


def test_later_stages_name_the_folders_of_earlier_ones() -> None:
    pipeline = parse_pipeline(WALK, ["stages.judged.kind=coco"])
    first, second, judged, _ = pipeline.stages
    assert first.url == "s3://bucket/walk/first"
    assert isinstance(second.settings, FinetuneStage)
    assert second.settings.set[0] == "init=s3://bucket/walk/first"
    assert isinstance(judged.settings, EvaluateStage)
    assert (judged.settings.evaluate, judged.settings.kind) == ("s3://bucket/walk/second", "coco")
    assert parse_pipeline(dump_yaml(pipeline_values(pipeline)), []) == pipeline


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.first.set=[init=$second]"], r"stages\.first: \$second is no earlier stage"),
        (["stages.second.set=[run=/r]"], r"second\.set: run is s3://bucket/walk/second"),
        (["stages.judged={data: a}"], r"judged: give exactly one of pretrain, .*; it has data"),
        (["stages.judged.export=$first"], r"judged: .*; it has evaluate, export"),
        (["stages.judged.colour=red"], r"stages\.judged\.colour: unknown key"),
        (["stages.judged={evaluate: $second}"], r"stages\.judged\.data: missing"),
        (["stages.Ann={export: $first}"], r"stages\.Ann: a stage's name is small letters"),
        (["folder=null"], r"folder=null"),
        (["stages={}"], r"stages="),
        (["storage.options.s3.secret=x"], r"looks like a secret"),
    ],
)
def test_mistakes_are_lines_that_name_the_stage(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_pipeline(WALK, overrides)


def test_mistakes_in_recipes_are_told_before_anything_begins(tmp_path: Path) -> None:
    (tmp_path / "walk.yaml").write_text(WALK)
    folder = f"folder={tmp_path / 'walk'}"
    change = "stages.second.set=[init=$first,data.train=a.json,loop.stepz=1]"
    with pytest.raises(RecipeError, match=r"stages\.second: loop\.stepz: unknown key"):
        walk_pipeline(str(tmp_path / "walk.yaml"), [folder, change], True, None, Console())
    assert not (tmp_path / "walk").exists()
    with pytest.raises(RecipeError, match="neither the YAML file of a pipeline nor a folder with"):
        opened_pipeline(str(tmp_path / "nothing"), [])


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with walk.yaml, which was walked into its folder `out`."""
    place = tmp_path_factory.mktemp("walk")
    shards, sets = pretraining.small_shards(place), finetuning.small_sets(place / "sets", count=4)
    (place / "pretrain.yaml").write_text(pretraining.RECIPE)
    (place / "finetune.yaml").write_text(finetuning.RECIPE.replace("from_scratch: true\n", ""))
    train, validation = finetuning.sets_of(sets)
    content = {
        "folder": str(place / "out"),
        "stages": {
            "first": {
                "pretrain": str(place / "pretrain.yaml"),
                "set": [f"data.shards={shards}", "loop.steps=2"],
            },
            "second": {
                "finetune": str(place / "finetune.yaml"),
                "set": ["init=$first", train, validation, "loop.steps=2"],
            },
            "judged": {
                "evaluate": "$second",
                "data": validation.partition("=")[2],
                "set": ["processes=0"],
            },
            "exported": {"export": "$second", "format": "querypatch"},
        },
    }
    (place / "walk.yaml").write_text(dump_yaml(content))
    assert walk_pipeline(str(place / "walk.yaml"), [], True, None, Console(quiet=True))
    return place


def test_each_stage_leaves_what_it_made_in_its_folder(walked: Path) -> None:
    out = walked / "out"
    assert json.loads((out / "first/finished.json").read_text())["step"] == 2
    assert f"init: {out / 'first'}" in (out / "second/recipe.yaml").read_text()
    assert json.loads((out / "judged/scores.json").read_text())["pictures"] == 2
    assert (out / "exported/model.safetensors").is_file()


def test_what_is_done_is_not_done_again(walked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given by its file or by its folder."""
    made = {path: path.stat().st_mtime_ns for path in _products(walked)}
    for name in (walked / "walk.yaml", walked / "out"):
        assert walk_pipeline(str(name), [], True, None, Console())
    assert capsys.readouterr().out.count("done before") == 8
    assert {path: path.stat().st_mtime_ns for path in _products(walked)} == made


def test_a_done_run_is_held_to_its_recipe_and_an_evaluation_is_made_anew(walked: Path) -> None:
    change = "stages.first.set=[data.shards=/s,loop.steps=3]"
    with pytest.raises(RecipeError, match=r"loop\.steps: 2 -> 3"):
        walk_pipeline(str(walked / "walk.yaml"), [change], True, None, Console(quiet=True))
    scores = walked / "out/judged/scores.json"
    before = json.loads(scores.read_text())
    change = "stages.judged.set=[processes=0,max_pictures=1]"
    assert walk_pipeline(str(walked / "walk.yaml"), [change], True, None, Console(quiet=True))
    assert (before["pictures"], json.loads(scores.read_text())["pictures"]) == (2, 1)


def test_a_run_that_was_asked_to_stop_ends_the_walk(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.pipeline.commands, "run_alone", lambda *_: None)
    change = f"folder={tmp_path / 'out'}"
    told = io.StringIO()
    assert not walk_pipeline(str(walked / "walk.yaml"), [change], True, None, Console(file=told))
    assert "stage 1 of 4, first: stopped" in told.getvalue()
    assert not (tmp_path / "out/second").exists()


def test_the_status_of_a_folder_of_stages_is_that_of_each(walked: Path, tmp_path: Path) -> None:
    said = status_of(str(walked / "out"), None, False, False)
    assert f"{walked / 'out/second'}: finished (finetune)" in said
    assert f"{walked / 'out/exported'}: done (export)" in said
    told = json.loads(status_of(str(walked / "out"), None, False, True))
    assert told["stages"]["first"]["step"] == 2
    (tmp_path / PIPELINE).write_bytes((walked / "walk.yaml").read_bytes())
    change = (tmp_path / PIPELINE).read_text().replace(str(walked / "out"), str(tmp_path))
    (tmp_path / PIPELINE).write_text(change)
    assert f"{tmp_path / 'first'}: not begun" in status_of(str(tmp_path), None, False, False)
    assert stage_that_is_written(open_run_folder(str(tmp_path))) is None


def test_a_submitted_pipeline_carries_the_recipes_that_it_names(
    walked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they mean the same in another folder on another machine."""
    sent: list[Order] = []

    def take(order: Order, *_: Any) -> bool:
        sent.append(order)
        return True

    monkeypatch.setattr(cluster.pipeline.commands, "submit_order", take)
    how = Submission("http://head:8265")
    assert submit_pipeline(str(walked / "walk.yaml"), [], how, Console(quiet=True))
    (order,) = sent
    assert order.words == ("pipeline", f"submitted/{PIPELINE}", "--address", "auto")
    (tmp_path / "submitted").mkdir()
    (tmp_path / "submitted" / PIPELINE).write_bytes(order.files[PIPELINE])
    kept = (walked / "out" / PIPELINE).read_bytes()
    for recipe in ("pretrain.yaml", "finetune.yaml"):
        assert recipe.encode() not in order.files[PIPELINE] + kept
    monkeypatch.chdir(tmp_path)
    assert walk_pipeline(order.words[1], [], True, None, Console(quiet=True))


def _products(place: Path) -> list[Path]:
    names = ("metrics.jsonl", "scores.json", "model.safetensors", "done.json", "finished.json")
    return [path for path in (place / "out").rglob("*") if path.name in names]
