"""Conditional DETR and DAB-DETR from pretraining to use: pretrained, finetuned, exported."""

from pathlib import Path

import pytest
import torch

from finetune.artefacts import open_weights
from finetune.export import export
from finetune.predict import load_detector
from models.interop.checkpoint_files import WeightsError
from tests.finetune.small_family import ANCHORS, CONDITIONAL
from tests.finetune.small_run import (
    run_until,
    run_whole,
    small_recipe,
    small_sets,
    weights,
)
from tests.pretrain.small_run import small_recipe as pretraining_recipe
from tests.pretrain.small_run import small_shards


@pytest.mark.parametrize(
    ("kind", "asked"),
    [(CONDITIONAL, ("model.num_queries=8",)), (ANCHORS, ("model.num_patterns=2",))],
    ids=["conditional", "anchors"],
)
def test_a_pretrained_transformer_is_finetuned_and_used(
    kind: tuple[str, ...], asked: tuple[str, ...], tmp_path: Path
) -> None:
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    run_whole(pretraining_recipe(small_shards(tmp_path), pretrained, *kind, "loop.steps=2"))
    sets = small_sets(tmp_path / "sets")
    told = (*kind, *asked, f"init={pretrained}", "from_scratch=false", "loop.steps=4")
    run_until(small_recipe(sets, run, *told), 1)
    first, origin = weights(run), weights(pretrained)
    known = origin["detector.queries.weight"]
    torch.testing.assert_close(first["queries.weight"][: len(known)], known, atol=0.01, rtol=0)
    run_whole(small_recipe(sets, run, *told))
    last = weights(run)
    still = [name for name in last if torch.equal(last[name], first[name])]
    assert {name.partition(".")[0] for name in still} == {"backbone"}
    assert open_weights(str(run)).detector.total_queries == (8 if kind == CONDITIONAL else 12)
    picture = str(next((sets / "val").glob("*.jpg")))
    found = load_detector(str(run), "cpu").predict(picture, threshold=0.0)[0]
    export(str(run), str(tmp_path / "file.pth"), "detr")
    again = load_detector(str(tmp_path / "file.pth"), "cpu").predict(picture, threshold=0.0)[0]
    assert len(found.scores) > 0
    assert found.scores.tolist() == again.scores.tolist()
    with pytest.raises(WeightsError, match=r"cannot express .*conditional; .* detr or onnx"):
        export(str(run), str(tmp_path / "hf"), "hf")


def test_a_recipe_with_other_queries_than_its_weights_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    sets, run = small_sets(tmp_path, count=4), tmp_path / "run"
    run_until(small_recipe(sets, run, *CONDITIONAL, "loop.steps=1"), 1)
    told = (*ANCHORS, f"init={run}", "from_scratch=false")
    with pytest.raises(
        WeightsError, match=r"query_kind=anchor in the recipe, position in the file"
    ):
        small_recipe(sets, tmp_path / "other", *told)
