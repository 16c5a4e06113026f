"""The whole service on several nodes and a real S3 server, as a test; see service_walk.py."""

import json
from pathlib import Path

import pytest

from data.synthetic import write_labelled_scenes, write_scenes
from tests.cluster.ray_nodes import RayNodes
from tests.cluster.service_walk import TOKEN, Size, Walk, cluster_environment, walk_whole
from tests.finetune.small_run import RECIPE as FINETUNING
from tests.pretrain.small_run import RECIPE as PRETRAINING
from tests.servers import S3Store

STEPS = 800


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_a_lost_node_a_stop_and_a_resume_and_a_detector_is_finetuned_from_it(
    s3_store: S3Store, tmp_path: Path
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    write_scenes(place / "pictures", seed=6, count=12)
    write_labelled_scenes(place, "train", seed=2, count=9)
    (place / "pretraining.yaml").write_text(PRETRAINING)
    (place / "finetuning.yaml").write_text(FINETUNING.replace("from_scratch: true\n", ""))
    size = Size(
        pretraining="pretraining.yaml",
        finetuning="finetuning.yaml",
        pretrain=(f"loop.steps={STEPS}", "loop.checkpoint_every_steps=40"),
        finetune=("loop.checkpoint_every_steps=null",),
        killed_after=40,
        stopped_after=40,
    )
    with RayNodes(TOKEN, cluster_environment(s3_store)) as nodes:
        nodes.start_head()
        walk = Walk(nodes, s3_store, place)
        labelled = str(place / "annotations/instances_train.json")
        detector = walk_whole(walk, size, place / "pictures", labelled)
    night = walk.folder(f"{s3_store.url}/runs/night")
    record = [json.loads(line) for line in night.read("metrics.jsonl").decode().splitlines()]
    assert [line["step"] for line in record] == list(range(1, STEPS + 1))
    chain = json.loads(walk.folder(detector).read("load_report.json"))["chain"]
    assert chain[0].startswith(f"{s3_store.url}/runs/night/")
    said = "\n".join(walk.told)
    assert TOKEN not in said
    assert str(s3_store.storage_options["secret"]) not in said
