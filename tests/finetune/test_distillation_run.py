"""A whole run with a teacher: resumed to the last bit, and a plain detector afterwards."""

from pathlib import Path

import pytest
import torch

from finetune.artefacts import build_detector, open_weights
from tests.finetune.small_run import (
    lines,
    run_until,
    run_whole,
    small_recipe,
    small_sets,
    weights,
)

WIDER = ("model.hidden_dim=24", "model.num_queries=9", "model.decoder_layers=3", "loop.steps=2")
EVALUATED = ("loop.evaluate_every=3",)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def teacher(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a deeper and wider detector."""
    place = tmp_path_factory.mktemp("teacher") / "run"
    run_whole(small_recipe(sets, place, *WIDER, "model.backbone.weights=random"))
    return place


def test_a_run_with_a_teacher_goes_on_to_the_last_bit_and_its_detector_is_a_plain_one(
    sets: Path, teacher: Path, tmp_path: Path
) -> None:
    told = (f"distill.teacher={teacher}", *EVALUATED)
    whole, cut = (small_recipe(sets, tmp_path / name, *told) for name in ("whole", "cut"))
    run_whole(whole)
    run_until(cut, 3)
    run_whole(cut)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    terms = lines(tmp_path / "whole", "train")[-1]
    named = {name.removeprefix("loss/") for name in terms}
    assert {"kd/main/cross/layer1", "kd/aux/self/layer0", "aux/loss_bbox"} <= named
    assert {"kd/match_change_rate", "kd/ratio_to_det"} <= named
    assert "query_projection.weight" in one
    student = build_detector(open_weights(str(tmp_path / "whole")))
    assert student.settings == whole.model
    assert "query_projection.weight" not in student.state_dict()
    found = {key for key in lines(tmp_path / "whole", "evaluation")[-1] if key.startswith("eval/")}
    assert "eval/ap" in found


def test_a_teacher_that_is_not_there_or_does_not_fit_is_told_before_anything_is_spent(
    sets: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        small_recipe(sets, tmp_path / "run", f"distill.teacher={tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match=r"9 queries, the student 12.*distill\.adaptive=false"):
        small_recipe(sets, tmp_path / "run", f"distill.teacher={teacher}", "model.num_queries=12")
