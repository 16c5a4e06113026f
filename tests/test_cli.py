"""The command line: its commands do what they say, and errors are one line."""

import json
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import querypatch
from data.synthetic import write_scenes
from tests.pretrain.small_run import RECIPE


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
    said = call("pretrain", tmp_path / "own.yaml", f"run={run}", shards, "--local")
    assert "step 6/6" in said
    assert (run / "checkpoints/step_000006/manifest.json").is_file()
    call("resume", run, "--local", "resources.workers=1")
    call("show", "patches", run, "-o", tmp_path / "drawn.png", "--count", 2)
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
    said = call("pretrain", tmp_path / "own.yaml", f"run={run}", shards, "--local", status=1)
    assert "holds a run already" in said


def test_recipes_are_listed_shown_and_described() -> None:
    assert "imagenet_r50" in call("recipe", "list")
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
