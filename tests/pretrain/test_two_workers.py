"""Two workers: resumed to the last bit, and the same training of a sparse detector as one."""

import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.distributed
import torch.multiprocessing
from rich.console import Console

from cluster.worker import run_worker
from data.pictures import decode_picture
from data.shards import write_shards
from data.sources import list_source
from data.synthetic import draw_scene
from pretrain.recipe import PretrainRecipe
from tests.pretrain.small_run import SPARSE, small_recipe, small_shards
from training.checkpoint import load_newest
from training.checkpoint_writer import CheckpointWriter
from training.progress import open_display
from training.recipe import load_recipe, recipe_yaml
from training.run_folder import open_run_folder
from training.world import World

# Loader processes, as a real run has: starting them must change nothing.
STREAM = "data.stream.processes=1"
UNEVEN = "global_batch=3"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_shards(tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_two_workers_resume_to_the_last_bit(shards: Path, tmp_path: Path) -> None:
    _train(shards, tmp_path / "whole", 2, STREAM, UNEVEN)
    _train(shards, tmp_path / "cut", 2, STREAM, UNEVEN, "loop.steps=4")
    _train(shards, tmp_path / "cut", 2, STREAM, UNEVEN)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    ours, theirs = _weights(tmp_path / "cut"), _weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_workers_teach_a_sparse_detector_what_one_teaches(tmp_path: Path) -> None:
    # Pictures of one size, as each worker pads its own part; dropout is drawn per worker.
    shards = _equal_shards(tmp_path)
    same = (UNEVEN, *SPARSE, "model.dropout=0", "loop.steps=2")
    _train(shards, tmp_path / "one", 1, *same)
    _train(shards, tmp_path / "two", 2, *same)
    (_, one), (_, two) = _numbers(tmp_path / "one"), _numbers(tmp_path / "two")
    assert one.keys() == two.keys()
    assert (one["pictures"], two["pictures"]) == (6, 6)
    learned = ("loss", "grad_norm", "loss/loss_ce", "loss/loss_bbox_0", "loss/loss_feature")
    for name in (*learned, "loss/loss_mask_prediction"):
        assert two[name] == pytest.approx(one[name], rel=2e-4), name


def _equal_shards(place: Path) -> Path:
    (place / "pictures").mkdir()
    for number in range(7):
        scene = decode_picture(draw_scene(8, number).jpeg)[:160, :160]
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(scene))
        (place / "pictures" / f"{number}.jpg").write_bytes(jpeg)
    write_shards(list_source(str(place / "pictures")), str(place / "shards"))
    return place / "shards"


def _numbers(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def _train(shards: Path, run: Path, workers: int, *overrides: str) -> None:
    recipe = small_recipe(shards, run, f"resources.workers={workers}", *overrides)
    meeting = run.parent / f"{run.name}-{len(list(run.parent.iterdir()))}.meeting"
    torch.multiprocessing.spawn(_work, (recipe_yaml(recipe), str(meeting), workers), nprocs=workers)


def _work(rank: int, recipe_text: str, meeting: str, workers: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers
    )
    run_worker(
        load_recipe(PretrainRecipe, recipe_text),
        World(rank, workers, torch.device("cpu")),
        lambda: False,
        lambda start, total: open_display(Console(quiet=True), start, total),
        _unannounced,
    )
    torch.distributed.destroy_process_group()


def _unannounced(writer: CheckpointWriter, _: World) -> CheckpointWriter:
    return writer


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(int(line["step"]), line["loss"]) for line in _numbers(run)]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    snapshot = load_newest(open_run_folder(str(run)))
    assert snapshot is not None
    return dict(snapshot.model)
