"""`querypatch preflight`: every fault that was planted is named, with the way out, in seconds."""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import cluster.preflight.data as preflight_data
import cluster.preflight.kit as preflight_kit
import cluster.preflight.memory as preflight_memory
import cluster.preflight.room as preflight_room
import cluster.preflight.run as preflight_run
import cluster.preflight.store as preflight_store
import cluster.preflight.trial as preflight_trial
from cluster.preflight.run import Report, Wishes, preflight_here
from cluster.stages import Recipe
from data.batches import PackedPatchBatch
from finetune.recipe import FinetuneRecipe
from models.structures import PatchBatch
from querypatch import app
from tests.cluster.refusing_store import refused
from tests.finetune import small_run as labelled
from tests.pretrain.small_run import RECIPE, small_recipe, small_shards
from training.recipe import load_recipe

__all__ = ["refused"]

MINUTE_S = 60.0


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a second: these tests want names, not numbers."""
    for name, value in {"STEPS_S": 1.0, "LOADER_S": 0.2, "TOGETHER_S": 0.5, "_MOST": 3}.items():
        monkeypatch.setattr(preflight_trial, name, value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and labelled sets that are as they should be, to be copied and spoilt."""
    place = tmp_path_factory.mktemp("made")
    small_shards(place)
    labelled.small_sets(place / "sets")
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy for one test."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def pretraining(place: Path, *overrides: str) -> Recipe:
    return small_recipe(place / "shards", place / "run", *overrides)


def finetuning(place: Path, *overrides: str) -> Recipe:
    told = [*labelled.sets_of(place / "sets"), f"run={place / 'run'}", *overrides]
    return load_recipe(FinetuneRecipe, labelled.RECIPE, told)


def looked(recipe: Recipe, depth: preflight_data.Depth = "quick") -> Report:
    began = time.monotonic()
    report = preflight_here(recipe, Wishes(depth), lambda check: None)
    assert time.monotonic() - began < MINUTE_S
    return report


def named(report: Report, name: str, state: str = "fault") -> str:
    """What is said of the one check of that name, which must be of that state."""
    (found,) = [check for check in report.checks if check.name == name]
    assert found.state == state, found
    assert report.is_ready == (state != "fault")
    return found.said


def test_a_job_that_is_well_is_ready_and_leaves_nothing_behind(place: Path) -> None:
    before = sorted(place.rglob("*"))
    report = looked(pretraining(place), "trial")
    assert [check for check in report.checks if check.state in ("fault", "unchecked")] == []
    assert sorted(place.rglob("*")) == before
    assert report.forecast is not None
    assert report.forecast.updates == 6
    names = {check.name for check in report.checks}
    assert {"run folder: rights", "data.shards", "data.shards: pictures", "batches"} <= names
    assert {"weights", "memory", "speed", "checkpoint", "disk", "forecast"} <= names


def test_the_command_prints_a_line_for_each_and_ends_with_1_where_one_is_a_fault(
    place: Path,
) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text(f"stage: pretrain\n{RECIPE}")
    words = ["preflight", str(recipe), f"run={place / 'run'}", "--depth", "quick"]
    done = CliRunner().invoke(app, [*words, f"data.shards={place / 'shards'}"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "ready")
    done = CliRunner().invoke(app, [*words, f"data.shards={place / 'none'}", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ready"]) == (1, False)
    (fault,) = [check for check in told["checks"] if check["state"] == "fault"]
    assert fault["name"] == "data.shards"
    assert "has no index.json: run `querypatch shards index" in fault["said"]


@pytest.mark.parametrize(
    ("word", "name", "way_out"),
    [
        ("write", "run folder: write", "may not write .*check the credentials"),
        ("read", "run folder: read", "may not read .*check the credentials"),
        ("list", "run folder: list", "may not list .*check the credentials"),
        ("delete", "run folder: delete", "may not delete .*check the credentials"),
        ("changes", "run folder: read", "gave back .*use another store"),
        ("hides", "run folder: list", "does not list .*allow listing"),
        ("keeps", "run folder: delete", "kept .*allow deleting"),
    ],
)
def test_each_word_that_the_store_refuses_is_named(
    place: Path, refused: set[str], word: str, name: str, way_out: str
) -> None:
    refused.add(word)
    said = named(looked(pretraining(place, f"run=refusing:/{place}/run")), name)
    assert re.search(way_out, said)


def test_a_store_without_conditional_writes_is_a_warning(place: Path, refused: set[str]) -> None:
    refused.add("overwrites")
    report = looked(pretraining(place, f"run=refusing:/{place}/run"))
    assert "start one at a time" in named(report, "run folder: lease", "warning")


def test_a_store_that_does_not_answer_is_given_up(
    place: Path, refused: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_store, "ANSWER_S", 0.1)
    refused.add("sleeps")
    report = looked(pretraining(place, f"run=refusing:/{place}/run"))
    assert "does not answer within 0.1 s; check its URL" in named(report, "run folder")


def test_a_folder_with_a_run_in_it_is_named(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run/recipe.yaml").write_text("stage: pretrain")
    said = named(looked(pretraining(place)), "run folder")
    assert "continue it with `querypatch resume" in said


def _missing_shard(shards: Path) -> None:
    next(shards.glob("*.tar")).unlink()


def _cut_shard(shards: Path) -> None:
    path = next(shards.glob("*.tar"))
    path.write_bytes(path.read_bytes()[:-512])


def _fewer_than_announced(shards: Path) -> None:
    report = json.loads((shards / "report.json").read_text())
    (shards / "report.json").write_text(json.dumps({**report, "num_samples": 1000}))


def _unknown_shard(shards: Path) -> None:
    shutil.copyfile(next(shards.glob("*.tar")), shards / "more.tar")


@pytest.mark.parametrize(
    ("spoil", "way_out"),
    [
        (_missing_shard, "is in the index, but not there: copy it again"),
        (_cut_shard, "it is cut off: copy it again"),
        (_fewer_than_announced, "announces 1000 pictures, the index has 10: copy the whole folder"),
        (_unknown_shard, "is there, but not in the index .*run `querypatch shards index"),
    ],
)
def test_shards_that_are_not_what_the_index_says_are_named(
    place: Path, spoil: Callable[[Path], None], way_out: str
) -> None:
    spoil(place / "shards")
    report = looked(pretraining(place), "trial")
    assert re.search(way_out, named(report, "data.shards"))
    unchecked = {check.name for check in report.checks if check.state == "unchecked"}
    assert {"data.shards: pictures", "weights"} <= unchecked


def test_more_broken_pictures_than_the_stream_bears_are_named(place: Path) -> None:
    """One of ten; the shard keeps its size, as after bad copies of the source."""
    path = sorted((place / "shards").glob("*.tar"))[0]
    data = path.read_bytes()
    start = data.index(b"\xff\xd8")
    path.write_bytes(data[:start] + b"no picture" + data[start + 10 :])
    said = named(looked(pretraining(place), "trial"), "data.shards: pictures")
    assert "1 cannot be used" in said
    assert "write the set again without them" in said
    lenient = pretraining(place, "data.stream.max_broken_share=0.2")
    assert "leaves them out" in named(looked(lenient, "trial"), "data.shards: pictures", "warning")


def test_a_batch_larger_than_the_data_is_named(place: Path) -> None:
    said = named(looked(pretraining(place, "global_batch=11")), "batches")
    assert "use a batch of at most that many" in said


def test_workers_with_unequal_shares_are_told_a_better_number(place: Path) -> None:
    report = looked(pretraining(place, "global_batch=8", "resources.workers=5"))
    assert "resources.workers=4 shares the batch evenly" in named(report, "batches", "warning")


def test_a_label_of_no_class_is_named_with_its_object(place: Path) -> None:
    path = place / "sets/annotations/instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["category_id"] = 99
    path.write_text(json.dumps(content))
    said = named(looked(finetuning(place)), "data.train: labels")
    assert "99" in said
    assert "`querypatch data check" in said


def test_classes_that_a_given_head_would_learn_as_background_are_named(place: Path) -> None:
    said = named(looked(finetuning(place, "model.num_classes=4")), "data.train: labels")
    assert "leave num_classes out, or say 6" in said


def test_more_objects_than_queries_is_a_warning(place: Path) -> None:
    said = named(looked(finetuning(place)), "data.train: labels", "warning")
    assert "use model.num_queries=" in said


def test_weights_that_lack_a_tensor_and_are_not_there_are_named(
    place: Path, made_weights: Path
) -> None:
    tensors = load_file(made_weights)
    save_file({name: tensors[name] for name in list(tensors)[1:]}, place / "cut.safetensors")
    report = looked(pretraining(place, f"init={place / 'cut.safetensors'}"), "trial")
    assert next(iter(tensors)) in named(report, "weights")
    report = looked(pretraining(place, "init=/none.safetensors"), "trial")
    assert "/none.safetensors" in named(report, "weights")


def test_a_first_update_that_is_not_finite_is_named(place: Path, made_weights: Path) -> None:
    tensors = load_file(made_weights)
    name = next(name for name in tensors if "class_head" in name)
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, place / "nan.safetensors")
    report = looked(pretraining(place, f"init={place / 'nan.safetensors'}"), "trial")
    assert "look whether init= or model.backbone.weights hold numbers" in named(report, "memory")


@pytest.fixture(scope="module")
def made_weights(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first weights of the small run."""
    kit = preflight_kit.open_kit(pretraining(made), torch.device("cpu"))
    path = tmp_path_factory.mktemp("weights") / "first.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in kit.model.state_dict().items()}, path)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(place: Path) -> None:
    report = looked(pretraining(place, "resources.device=cuda"), "trial")
    assert "use cpu or auto" in named(report, "kernels")


def test_a_step_that_does_not_fit_is_told_what_would(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(act: Callable[[], None]) -> tuple[float, float]:
        act()
        return 1e9, 1.1e9

    monkeypatch.setattr(preflight_memory, "_peak_of", tight)
    monkeypatch.setattr(preflight_run, "free_memory", lambda: 0.06e9)
    said = named(looked(pretraining(place), "trial"), "memory")
    assert "say resources.max_pictures_per_pass=1" in said


def test_a_loader_that_is_waited_for_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = preflight_kit.to_device

    def slow(packed: PackedPatchBatch, device: torch.device) -> PatchBatch:
        time.sleep(0.3)
        return moved(packed, device)

    monkeypatch.setattr(preflight_kit, "to_device", slow)
    report = looked(pretraining(place), "trial")
    said = named(report, "speed", "warning")
    assert "the worker waits for pictures" in said
    assert "data.stream.processes=2" in said


def test_a_disk_that_is_too_small_is_named(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_room, "free_bytes", lambda place: 1000)
    said = named(looked(pretraining(place), "trial"), "disk")
    assert "make room, or keep fewer (checkpoints.keep_last)" in said


def test_a_checkpoint_that_the_store_changes_is_named(
    place: Path, refused: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = preflight_room.load_checkpoint
    monkeypatch.setattr(preflight_room, "load_checkpoint", lambda *of: replace(read(*of), model={}))
    said = named(looked(pretraining(place), "trial"), "checkpoint")
    assert "came back as another; use another store" in said
