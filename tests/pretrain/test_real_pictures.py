"""Sparse DETR is pretrained on genuine ImageNet photographs."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from cluster.worker import run_alone
from data.shards import ShardSettings, write_shards
from data.sources import list_source
from tests.pretrain.small_run import SPARSE, small_recipe


@pytest.mark.slow
def test_a_sparse_detector_learns_from_photographs_what_its_decoder_reads(
    shared_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for picture in sorted((shared_data / "imagenet-sample").glob("*.JPEG"))[::40]:
        shutil.copy(picture, tmp_path / "pictures")
    settings = ShardSettings(samples_per_shard=8)
    write_shards(list_source(str(tmp_path / "pictures")), str(tmp_path / "shards"), settings)
    run = tmp_path / "run"
    told = (*SPARSE, "global_batch=4", "loop.steps=30", "optimiser.lr=3e-3")
    run_alone(small_recipe(tmp_path / "shards", run, *told), Console(quiet=True))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert len(trained) == 30
    for name in ("loss", "loss/loss_mask_prediction", "loss/loss_giou"):
        first, last = trained[:5], trained[-5:]
        assert sum(line[name] for line in last) < 0.9 * sum(line[name] for line in first), name
