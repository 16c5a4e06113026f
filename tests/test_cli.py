"""The command line: its commands do what they say, and errors are one line."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

import querypatch
from cluster import stages
from cluster.cli import words
from data import detection_set, source_items
from data.synthetic import write_scenes
from finetune import export
from tests.finetune import small_run as finetuning
from tests.pretrain.small_run import RECIPE

SCRATCH = ("tiny_cpu_scratch", "run=/no/such/run", "data.train=/no/such/set.json")


def call(*arguments: object, status: int = 0) -> str:
    """What a command says, on both streams."""
    done = CliRunner().invoke(querypatch.app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done.output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "pictures"
    write_scenes(folder, seed=4, count=9)
    return folder


def test_pictures_become_shards_of_which_some_are_held_out(pictures: Path, tmp_path: Path) -> None:
    said = call("shards", "write", pictures, tmp_path / "s", "--hold-out", 2)
    assert "7 pictures in 1 shards" in said
    train, held_out = tmp_path / "s" / "train", tmp_path / "s" / "held_out"
    with tarfile.open(next(train.glob("*.tar"))) as tar:
        assert [name.endswith(".jpg") for name in tar.getnames()] == [True] * 7
    assert "no fault" in call("shards", "check", train)
    assert "no fault" in call("shards", "check", held_out)


def test_a_changed_shard_is_a_fault_and_status_1(pictures: Path, tmp_path: Path) -> None:
    call("shards", "write", pictures, tmp_path / "s")
    shard = next((tmp_path / "s").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 0xFF
    shard.write_bytes(data)
    said = call("shards", "check", tmp_path / "s", status=1)
    assert f"{shard.name}: " in said


def test_tars_of_others_are_indexed(pictures: Path, tmp_path: Path) -> None:
    call("shards", "write", pictures, tmp_path / "s")
    first = json.loads((tmp_path / "s/index.json").read_text())
    (tmp_path / "s/index.json").unlink()
    assert "9 samples in 1 shards indexed" in call("shards", "index", tmp_path / "s")
    assert json.loads((tmp_path / "s/index.json").read_text()) == first


def test_a_run_is_begun_resumed_and_looked_at(pictures: Path, tmp_path: Path) -> None:
    call("shards", "write", pictures, tmp_path / "s")
    (tmp_path / "own.yaml").write_text(RECIPE)
    run, shards = tmp_path / "run", f"data.shards={tmp_path / 's'}"
    begin = ("pretrain", tmp_path / "own.yaml", f"run={run}", shards, "--local")
    assert "step 6/6" in call(*begin)
    assert f"{run}: finished (pretrain)\n  step        6 of 6" in call("status", run)
    assert f"{run} is not running: finished at step 6" in call("stop", run)
    assert (run / "checkpoints/step_000006/manifest.json").is_file()
    call("resume", run, "--local", "resources.workers=1")
    call("show", "patches", run, "-o", tmp_path / "drawn.png", "--count", 2)
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    assert f"{run} is over at step 6: its last step is done" in call(*begin, "--continue")
    assert "holds a run already" in call(*begin, status=1)


def test_a_detector_is_finetuned_judged_used_and_exported(tmp_path: Path) -> None:
    sets, run = finetuning.small_sets(tmp_path / "sets", count=6), tmp_path / "run"
    train, validation = (text.partition("=")[2] for text in finetuning.sets_of(sets))
    (tmp_path / "own.yaml").write_text(finetuning.RECIPE)
    told = (f"run={run}", *finetuning.sets_of(sets), "loop.evaluate_every=3")
    assert f"{train}: no fault" in call("data", "check", train)
    call("show", "data", train, "-o", tmp_path / "data.png", "--count", 2)
    said = call("finetune", tmp_path / "own.yaml", *told, "--local")
    assert "step 6/6" in said
    assert "evaluation at step 6: ap " in said
    call("resume", run, "--local", "evaluation.batch_size=2")
    assert "holds a run already" in call("finetune", tmp_path / "own.yaml", *told, status=1)
    judged = call("evaluate", run, validation, "processes=0", "-o", tmp_path / "scores.json")
    assert "COCO, 3 pictures of" in judged
    assert json.loads((tmp_path / "scores.json").read_text())["pictures"] == 3
    call("predict", run, sets / "val", "-o", tmp_path / "found", "--threshold", 0)
    assert len(json.loads((tmp_path / "found/images.json").read_text())["images"]) == 3
    assert len(list((tmp_path / "found").glob("**/*.jpg"))) == 3
    assert "best/model.safetensors" in call("weights", "show", run)
    call("export", run, tmp_path / "export")
    assert "box head " in call("weights", "show", tmp_path / "export")
    assert "exists" in call("export", run, tmp_path / "export", status=1)


def test_recipes_are_listed_shown_and_described() -> None:
    assert "pretrain/imagenet_r50" in call("recipe", "list")
    assert "finetune/voc_few_scratch" in call("recipe", "list")
    assert json.loads(call("recipe", "schema", "finetune"))["title"] == "FinetuneRecipe"
    assert "num_patches: 5" in call("recipe", "show", "imagenet_r50", "queries.num_patches=5")
    assert json.loads(call("recipe", "schema"))["title"] == "PretrainRecipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "tiny_cpu", "run=/r"), "data.shards: missing; give it in the recipe or as"),
        (("pretrain", "tiny_cpu", "a.b=c"), "a: unknown key"),
        (("resume", "/no/such/run"), "/no/such/run holds no run"),
        (("shards", "write", "/no/such/pictures", "/tmp/d"), "nothing at /no/such/pictures"),
        (("shards", "check", "/no/such/shards"), "/no/such/shards has no index.json"),
        (("show", "patches", "/no/such/run"), "/no/such/run has no index.json"),
        (("finetune", "tiny_cpu", "run=/r"), "data.train: missing; give it in the recipe or as"),
        (
            ("finetune", "imagenet_r50", "run=/r"),
            "'imagenet_r50' is neither a file nor one of classify_tiny_cpu_scratch",
        ),
        (("finetune", "tiny_cpu", "run=/r", "data.train=/no.json"), "name the weights to start"),
        (("finetune", *SCRATCH), "/no/such/set.json"),
        (("evaluate", "/no/such", "/no/such/set.json"), "/no/such holds no weights"),
        (("predict", "/no/such", "a.jpg", "-o", "/no/such/out"), "/no/such holds no weights"),
        (("export", "/no/such/weights", "/no/such/out"), "/no/such/weights holds no weights"),
        (("weights", "show", "/no/such/weights"), "/no/such/weights holds no weights"),
        (("data", "check", "/no/such/set"), "/no/such/set"),
        (("show", "data", "/no/such/set"), "/no/such/set"),
        (("status", "/no/such/run"), "/no/such/run holds no run"),
        (("stop", "/no/such/run"), "/no/such/run holds no run"),
        (("pipeline", "/no/such/file"), "is neither the YAML file of a pipeline nor a folder"),
        (("submit", "tiny_cpu", "--address", "http://h:1"), "say pretrain/tiny_cpu or finetune/"),
        (("logs", "a-1", "--address", "head"), "--address head is no http://HEAD:8265"),
        (("recipe", "show", "tiny_cpu"), "say pretrain/tiny_cpu or finetune/tiny_cpu"),
    ],
)
def test_errors_are_lines_that_name_the_thing(arguments: tuple[str, ...], message: str) -> None:
    said = call(*arguments, status=1)
    assert message in said
    assert "Traceback" not in said


def test_the_demo_refuses_a_folder_in_use_and_too_few_pictures(
    pictures: Path, tmp_path: Path
) -> None:
    said = call("demo", "--pictures", pictures, "--out", tmp_path / "new", status=1)
    assert "holds 9 pictures; the demo needs 24 or more" in said
    (tmp_path / "used" / "pretrained").mkdir(parents=True)
    said = call("demo", "--out", tmp_path / "used", status=1)
    assert "exists already; remove" in said


def test_words_that_are_written_out_for_speed_are_those_of_their_modules() -> None:
    assert get_args(words.StageName) == get_args(stages.StageName)
    assert get_args(words.SourceKind) == get_args(source_items.SourceKind)
    assert get_args(words.SetKind) == get_args(detection_set.SetKind)
    assert get_args(words.ExportFormat) == get_args(export.ExportFormat)


def test_help_waits_for_neither_torch_nor_ray() -> None:
    look = (
        "import sys, querypatch; from typer.testing import CliRunner; "
        "done = CliRunner().invoke(querypatch.app, ['--help']); assert 'finetune' in done.output; "
        "print({'torch', 'ray', 'cv2', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
